"""How far a job is, told from its output alone: on this machine or another, while it runs.

A run that was killed says `running` in run.json still; its lease, which it renewed every few
seconds, tells that nobody is behind it any more. In a bucket there is no lease, but run.json itself
is written again with each part.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import orjson

from batchclf.errors import UsageError
from batchclf.results.files import RunFiles, read_json, reading
from batchclf.results.listing import open_listing
from batchclf.results.lock import LEASE_S
from batchclf.results.mirror import fetched_figures
from batchclf.results.output import files_of_parts
from batchclf.results.run_record import read_run
from batchclf.results.stats import are_of_one_run
from batchclf.system.machine import boot_id

State = Literal["complete", "running", "stale", "interrupted", "failed", "not begun"]
SENT_S = 600.0
"""A run that has not written run.json to its bucket for so long is given up. It does so every 30 s,
but only behind the records of that time, and at its end behind all records as one object."""
END_BYTES = 1 << 16
"""Of stats.jsonl: its last line is in there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One shard of a job, or a job without shards."""

    shard: str | None
    """I/N; None: the whole job."""
    state: State
    """stale: it says `running`, and nobody is behind it."""
    host: str | None = None
    pid: int | None = None
    num_images: int | None = None
    """There are to be; None: not known yet."""
    num_done: int = 0
    num_errors: int = 0
    errors_by_code: Mapping[str, int] = field(default_factory=dict)
    images_per_s: float | None = None
    """Since its last run began."""
    images_per_s_now: float | None = None
    """Between its last two figures, some 10 s apart; None: it is not at work, or has not two."""
    left_s: float | None = None
    """At that rate."""
    seconds_since_news: float | None = None
    """Since its figures were written, or since its lease was renewed."""
    bottleneck: str | None = None
    device: str | None = None
    error: str | None = None
    """Why it ended, where it did not complete."""
    nodes: Mapping[str, float] = field(default_factory=dict)
    """Images per second of each, where several work on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A job's parts, and their sums."""

    state: State
    output: str
    num_images: int | None
    num_done: int
    num_errors: int
    errors_by_code: Mapping[str, int]
    images_per_s: float | None
    images_per_s_now: float | None
    left_s: float | None
    parts: Sequence[Part]


def status_of(output: Path | str) -> Status:
    """Read how far a job is, in a folder or at an address; nothing there is changed.

    Raises:
        UsageError: no job has begun there.
        ResumeRefused: what is there was written by another version, or is damaged.
        EnvironmentFailed: it cannot be read.
    """
    if isinstance(output, Path):
        return _status_in(output, None)
    with fetched_figures(output) as folder:
        return _status_in(folder, output)


def _status_in(folder: Path, address: str | None) -> Status:
    """`address`: of the bucket from which the folder's files were fetched."""
    output = folder if address is None else address
    all_files = [replace(files, address=address) for files in files_of_parts(folder)]
    parts = [_part(files) for files in all_files]
    if not parts:
        raise UsageError(
            f"output: {output}: no job has begun there: it holds no run.json; "
            "give the `output` of a job that was run"
        )
    codes: Counter[str] = Counter()
    for one in parts:
        codes.update(one.errors_by_code)
    rates = [one.images_per_s for one in parts if one.state == "running" and one.images_per_s]
    rates_now = [one.images_per_s_now for one in parts if one.images_per_s_now is not None]
    listing = open_listing(RunFiles(folder))
    num_images = None if listing is None else listing.num_images
    if len(parts) == 1:
        num_images = parts[0].num_images
    num_done = sum(one.num_done for one in parts)
    rate = round(sum(rates), 2) if rates else None
    if len(parts) == 1:
        rate = parts[0].images_per_s
    return Status(
        state=_state_of(parts),
        output=str(output),
        num_images=num_images,
        num_done=num_done,
        num_errors=codes.total(),
        errors_by_code=dict(codes.most_common()),
        images_per_s=rate,
        images_per_s_now=round(sum(rates_now), 2) if rates_now else None,
        left_s=_seconds_left(num_images, num_done, rate) if rates else None,
        parts=parts,
    )


def _state_of(parts: Sequence[Part]) -> State:
    """Of a job: what most needs to be known."""
    states = {one.state for one in parts}
    order: tuple[State, ...] = ("failed", "stale", "running", "interrupted", "not begun")
    return next((state for state in order if state in states), "complete")


def _part(files: RunFiles) -> Part:
    shard = None if files.shard.count == 1 else f"{files.shard.index}/{files.shard.count}"
    record = read_run(files)
    if record is None:
        return Part(shard=shard, state="not begun", num_images=_planned(files))
    holder = _holder(files)
    figures = _last_figures(files)
    last = figures.of_all
    # Figures are written every 10 s, and before that not at all.
    num_done = max(last.get("num_images", 0), record.durable.num_images)
    if record.status == "complete":
        num_done = record.num_images
    codes = last.get("errors_by_code", {})
    is_running = record.status == "running"
    state: State = record.status
    if is_running and not holder.is_there:
        state = "stale"
    rate = last.get("images_per_s")
    ages = [age for age in (holder.age_s, figures.age_s) if age is not None]
    return Part(
        shard=shard,
        state=state,
        host=holder.lease.get("host"),
        pid=holder.lease.get("pid"),
        num_images=record.num_images,
        num_done=num_done,
        num_errors=sum(codes.values()),
        errors_by_code=codes,
        images_per_s=rate,
        images_per_s_now=figures.images_per_s_now if state == "running" else None,
        left_s=_seconds_left(record.num_images, num_done, rate) if state == "running" else None,
        seconds_since_news=round(min(ages), 1) if ages and is_running else None,
        bottleneck=last.get("bottleneck"),
        device=f"{record.provider.active} ({record.provider.device})",
        error=record.error,
        nodes=figures.of_nodes,
    )


def _planned(files: RunFiles) -> int | None:
    listing = open_listing(files)
    if listing is None:
        return None
    first, last = files.shard.bounds(listing.num_images)
    return last - first


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who is behind a run."""

    lease: Mapping[str, Any]
    age_s: float | None
    """Since it gave a sign; None: there is none."""
    patience_s: float

    @property
    def is_there(self) -> bool:
        """Whether it lives: seen on its own machine, else told by its last sign."""
        if self.age_s is None:
            return False
        if self.lease.get("boot_id") == boot_id() and boot_id():
            return os.path.exists(f"/proc/{self.lease.get('pid')}")
        return self.age_s <= self.patience_s


def _holder(files: RunFiles) -> _Holder:
    if files.address is not None:
        return _Holder({}, _age_s(files.run), SENT_S)
    return _Holder(read_json(files.lease) or {}, _age_s(files.lease), LEASE_S)


def _age_s(path: Path) -> float | None:
    with reading(path), suppress(FileNotFoundError):
        return max(0.0, time.time() - path.stat().st_mtime)
    return None


@dataclass(frozen=True, slots=True)
class _Figures:
    """What stats.jsonl says last."""

    of_all: Mapping[str, Any] = field(default_factory=dict)
    images_per_s_now: float | None = None
    """Between the last two of the job."""
    of_nodes: Mapping[str, float] = field(default_factory=dict)
    """Images per second of each node, where several work on the job."""
    age_s: float | None = None


def _last_figures(files: RunFiles) -> _Figures:
    """The last figures of the job, and those of its nodes that stand before them."""
    with reading(files.stats), suppress(FileNotFoundError), files.stats.open("rb") as file:
        found = os.fstat(file.fileno())
        file.seek(max(0, found.st_size - END_BYTES))
        lines = list(_objects(reversed(file.read().splitlines())))
        of_all = [number for number, line in enumerate(lines) if line.get("type") != "node"]
        if of_all:
            last = lines[of_all[0]]
            of_nodes = takewhile(lambda line: line.get("type") == "node", lines[of_all[0] + 1 :])
            rates = {line["node"]: line["images_per_s"] for line in of_nodes}
            now = _rate_between(lines[of_all[1]], last) if len(of_all) > 1 else None
            return _Figures(last, now, rates, max(0.0, time.time() - found.st_mtime))
    return _Figures()


def _rate_between(before: Mapping[str, Any], last: Mapping[str, Any]) -> float | None:
    """Images per second between two figures of one run; None: they are of two."""
    seconds, count = last["wall_s"] - before["wall_s"], last["num_new"] - before["num_new"]
    return round(count / seconds, 2) if are_of_one_run(before, last) and seconds > 0 else None


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(orjson.JSONDecodeError):  # torn by a power loss, or being written
            found = orjson.loads(line)
            if isinstance(found, dict):
                yield found


def _seconds_left(num_images: int | None, num_done: int, rate: float | None) -> float | None:
    if num_images is None or not rate:
        return None
    return round((num_images - num_done) / rate, 1)
