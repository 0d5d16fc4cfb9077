"""run.json: what a run is, how far it is, and what of its records survives a power loss."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from batchclf.errors import EnvironmentFailed, Interrupted, ResumeRefused
from batchclf.results.files import RunFiles, read_bytes, replace_file
from batchclf.results.identity import Fingerprint, Strict, as_written
from batchclf.results.records import (
    ActiveProvider,
    DecodeBackend,
    DecodeMode,
    Part,
    PrecisionCheck,
)
from batchclf.system.machine import boot_id

FORMAT_VERSION: Literal[1] = 1
"""Counted up when a key of run.json comes, goes or changes its meaning."""
Status = Literal["running", "complete", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Durable:
    """Up to where predictions.jsonl survives a power loss, and on which start of the machine."""

    num_bytes: int
    num_images: int
    boot_id: str

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the machine has been up since: what was written later is then still there."""
        return self.boot_id != "" and self.boot_id == boot_id()


NOTHING_DURABLE = Durable(0, 0, "")


@dataclass(frozen=True, kw_only=True)
class Segment(Strict):
    """How the records from number `first` of the shard on were made, up to the next segment."""

    first: int
    started_at: str
    batchclf: str
    """The version that wrote them."""
    provider: str
    device: str
    batch_size: int
    num_streams: int
    num_workers: int
    backend: DecodeBackend
    limits: Mapping[str, Any]
    """Keys of `loader` that decide which images are refused."""


@dataclass(frozen=True, kw_only=True)
class Retry(Segment):
    """An attempt of --retry-failed: which errors it tries again, and how."""

    codes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class How(Strict):
    """How and on what a run goes; the summary line says it as well."""

    batch_size: int
    part: Part
    provider: ActiveProvider
    precision: str
    precision_check: PrecisionCheck | None
    decode: DecodeMode
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RunRecord(How):
    """All that run.json says."""

    format_version: Literal[1]
    status: Status
    job: Mapping[str, Any]
    """The resolved job."""
    fingerprint: Fingerprint
    started_at: str
    ended_at: str | None
    error: str | None
    """Why it ended, where it did not complete."""
    num_images: int
    num_left_out: int
    model: Mapping[str, str | int | None]
    converted_model: Mapping[str, str | int | None] | None
    num_streams: int
    num_workers: int
    backend: DecodeBackend
    jpeg_decoder: str
    resampler: str
    durable: Durable
    segments: tuple[Segment, ...]
    retry: Retry | None
    """One that has not put its records in place yet."""
    retries: tuple[Retry, ...]
    """Those that have."""
    num_merged: int = 0
    """How many shards its records were merged from; 0: they were not."""

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do, or all records are durable."""
        return self.status == "complete" or self.durable.num_images == self.num_images

    @property
    def how(self) -> How:
        """The part of it that a summary repeats."""
        return How(**{one.name: getattr(self, one.name) for one in fields(How)})


@dataclass(slots=True)
class RunState:
    """run.json while a job runs."""

    files: RunFiles
    record: RunRecord = field(repr=False)

    def write(self, *, must_last: bool = True, **changes: Any) -> None:
        """Replace some of what it says; `must_last` as in `replace_file`.

        Raises:
            EnvironmentFailed: disk full, I/O error.
        """
        self.record = replace(self.record, **changes)
        write_run(self.files, self.record, must_last=must_last)

    def note_durable(self, num_bytes: int, num_images: int) -> None:
        """Note that so much of predictions.jsonl was synced.

        Raises:
            EnvironmentFailed: disk full, I/O error.
        """
        self.write(durable=Durable(num_bytes, num_images, boot_id()))

    def note_retried(self, num_bytes: int, num_images: int) -> None:
        """Note that the records of the retry are in place, and durable.

        Raises:
            EnvironmentFailed: disk full, I/O error.
        """
        attempt = self.record.retry
        assert attempt is not None, "there is one"
        self.write(
            durable=Durable(num_bytes, num_images, boot_id()),
            retry=None,
            retries=(*self.record.retries, attempt),
        )


@contextmanager
def kept_status(
    files: RunFiles, record: RunRecord, before_write: Callable[[], None] = lambda: None
) -> Iterator[RunState]:
    """Keep true what run.json says of a run, `running` by now: how it ends.

    `before_write` is called before that is written after an error, which may have taken long.
    """
    state = RunState(files, record)
    try:
        yield state
    except BaseException as error:
        try:
            before_write()
            state.write(**_ending(error))
        except EnvironmentFailed as unwritable:  # the disk that failed the job fails this as well
            if not isinstance(error, EnvironmentFailed):
                error.add_note(str(unwritable))
        raise
    # All records are durable, and noted so: without this, another start finds nothing left to do.
    # An error after it had been written would belie what it says.
    state.write(status="complete", must_last=False, ended_at=now())


def _ending(error: BaseException) -> dict[str, Any]:
    stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)  # a signal
    status = "interrupted" if stopped else "failed"
    return {"status": status, "error": str(error) or type(error).__name__, "ended_at": now()}


def mark_ended(files: RunFiles, error: BaseException) -> None:
    """Say in run.json that a run was stopped whose own process no longer could.

    A file that cannot be read or written stays as it is: what failed the job fails this as well.
    """
    with suppress(EnvironmentFailed, ResumeRefused):
        record = read_run(files)
        if record is not None and record.status == "running":
            RunState(files, record).write(**_ending(error))


def write_run(files: RunFiles, record: RunRecord, *, must_last: bool = True) -> None:
    """Replace run.json whole; `must_last` as in `replace_file`.

    Raises:
        EnvironmentFailed: disk full, I/O error.
    """
    # json and not orjson: a path that is not UTF-8 is kept as escapes.
    data = json.dumps(asdict(record), indent=2).encode("ascii") + b"\n"
    replace_file(files.run, data, must_last=must_last)


def read_run(files: RunFiles) -> RunRecord | None:
    """What run.json says; None when there is none.

    Raises:
        ResumeRefused: it is damaged, or of another version of batchclf.
        EnvironmentFailed: it cannot be read.
    """
    data = read_bytes(files.run)
    if data is None:
        return None
    try:
        said = json.loads(data)
    except ValueError as error:
        raise _unknown(files, f"it is no JSON: {error}") from None
    found = said.get("format_version") if isinstance(said, dict) else None
    if found != FORMAT_VERSION:
        raise _unknown(files, f"its format_version is {found!r}, this version's {FORMAT_VERSION}")
    try:
        return as_written(RunRecord, said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unknown(files, f"`{where}`: {first['msg']}") from None


def _unknown(files: RunFiles, why: str) -> ResumeRefused:
    return ResumeRefused(
        f"output: {files.run} cannot be gone on from: {why}. Use the version of batchclf that "
        "wrote it, give another output, or --overwrite to start anew"
    )


def now() -> str:
    """The time, as run.json says it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
