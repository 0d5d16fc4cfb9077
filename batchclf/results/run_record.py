"""run.json while a job runs: its facts, its status, and what of its records is durable."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from batchclf.errors import BatchclfError, EnvironmentFailed, Interrupted
from batchclf.results.files import RunFiles, read_json, replace_file
from batchclf.system.machine import boot_id


@dataclass(frozen=True, slots=True)
class Durable:
    """Up to where predictions.jsonl survives a power loss, and on which start of the machine."""

    num_bytes: int = 0
    num_images: int = 0
    boot_id: str = ""

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the machine has been up since: what was written later is then still there."""
        return self.boot_id != "" and self.boot_id == boot_id()


class RunState:
    """run.json while a job runs: its facts, its status, and what is durable."""

    def __init__(self, files: RunFiles, run: Mapping[str, object]) -> None:
        self._files = files
        self._run = dict(run)

    def write(self, status: str, *, must_last: bool = True, **facts: object) -> None:
        """Replace the status, and the facts given; `must_last` as in `replace_file`.

        Raises:
            EnvironmentFailed: disk full, I/O error.
        """
        self._run |= {**facts, "status": status}
        write_run(self._files, self._run, must_last=must_last)

    def note_durable(self, num_bytes: int, num_images: int) -> None:
        """Note that so much of predictions.jsonl was synced.

        Raises:
            EnvironmentFailed: disk full, I/O error.
        """
        self.write("running", durable=asdict(Durable(num_bytes, num_images, boot_id())))


@contextmanager
def kept_status(files: RunFiles, run: Mapping[str, object]) -> Iterator[RunState]:
    """Keep run.json's status true: running, then complete, interrupted or failed."""
    state = RunState(files, run)
    state.write("running")
    try:
        yield state
    except BaseException as error:
        stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)  # a signal
        status = "interrupted" if stopped else "failed"
        try:
            state.write(status, error=str(error) or type(error).__name__, ended_at=now())
        except EnvironmentFailed as unwritable:  # the disk that failed the job fails this as well
            if not isinstance(error, EnvironmentFailed):
                error.add_note(str(unwritable))
        raise
    # All records are durable, and noted so: without this, another start finds nothing left to do.
    # An error after it had been written would belie what it says.
    state.write("complete", must_last=False, ended_at=now())


def mark_ended(files: RunFiles, error: BatchclfError) -> None:
    """Say in run.json that a run was stopped whose own process no longer could."""
    run = read_run(files)
    if run is not None and run.get("status") == "running":
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        RunState(files, run).write(status, error=str(error), ended_at=now())


def write_run(files: RunFiles, run: Mapping[str, object], *, must_last: bool = True) -> None:
    """Replace run.json whole; `must_last` as in `replace_file`.

    Raises:
        EnvironmentFailed: disk full, I/O error.
    """
    # json and not orjson: a path that is not UTF-8 is kept as escapes.
    data = json.dumps(run, indent=2).encode("ascii") + b"\n"
    replace_file(files.run, data, must_last=must_last)


def read_run(files: RunFiles) -> dict[str, Any] | None:
    """What run.json says; None when there is none, or none that parses.

    Raises:
        EnvironmentFailed: it cannot be read.
    """
    return read_json(files.run)


def now() -> str:
    """The time, as run.json says it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
