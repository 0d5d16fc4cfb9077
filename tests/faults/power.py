"""Power loss: what a disk holds at some moment, copied while a job writes to it.

The output lies on an ext4 file system in a file. What the file holds is what the disk was told so
far: a copy of it, mounted, is the disk of a machine that lost its power there. A copy is used only
where nothing was written to the disk while it was made, which takes a fraction of a millisecond.
Half of the copies are made at random moments, half when something is written after such a moment.

ext4 is kept from writing what replaced or cut files hold before anybody asks for it, as it does by
itself to help programs that do not (noauto_da_alloc, ext4(5)): other file systems do not either.

The control is the same with fsync made to do nothing: there the same check must fail.
"""

import json
import math
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faults.calls import make_shim
from tests.faults.disks import mounted
from tests.faults.jobs import Job, Start, make_job, run_json
from tests.faults.report import Options, Report
from tests.tiny import link_digits

MODES = ("ordered", "writeback")
"""Of ext4's journal: ext4(5)."""
DISK_BYTES = 32 << 20
BATCH_SIZE = 16
NUM_IMAGES = 3_000
SLOW_WRITE_MS = 250
"""So long takes each of 188 writes of records; a job then lasts for several intervals of fsync."""
POLL_S = 0.0002
WATCH_S = 3.0
"""A disk to which nothing is written for so long is copied as it is."""
ANOTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True, slots=True)
class Copy:
    """A disk, and what was reported just before."""

    disk: Path
    num_durable: int
    """Bytes of predictions.jsonl that run.json called durable."""
    is_finished: bool
    """Whether the job had ended with exit code 0."""


def power_loss(
    options: Options, num_images: int = NUM_IMAGES, slow_write_ms: int = SLOW_WRITE_MS
) -> Report:
    """Copies in both modes of the journal, then the control."""
    report = options.report("power-loss", num_copies=0, num_lost=0)
    control = options.report("control", num_copies=0, num_lost=0)
    images = link_digits(options.folder / "images", num_images)
    job = make_job(options.folder / "job", images, options.environment, batch_size=BATCH_SIZE)
    with mounted(options.folder / "disks", "-t", "tmpfs", "tmpfs") as disks:
        places = (
            *(Place(disks / mode, mode, "count", report) for mode in MODES),
            Place(disks / "control", "ordered", "lie", control),
        )
        for place in places:
            make_shim(options.folder, place.folder.name)
        options.each(places, lambda place: _lose_power(options, job, place, slow_write_ms))
    report.figures["num_copies_control"] = control.figures["num_copies"]
    report.figures["num_lost_control"] = control.figures["num_lost"]
    report.check(control.figures["num_lost"], "the check does not see that fsync does nothing")
    return report


@dataclass(frozen=True, slots=True)
class Place:
    """A disk of its own for one job."""

    folder: Path
    mode: str
    how: str
    """What becomes of its calls: `count`, or `lie` for the control."""
    report: Report


def _lose_power(options: Options, job: Job, place: Place, slow_write_ms: int) -> None:
    """Run the job on a disk of its own, copy that, and look at every copy."""
    folder, report, ext4 = place.folder, place.report, f"loop,noauto_da_alloc,data={place.mode}"
    disk = make_disk(folder.with_suffix(".ext4"))
    num_batches = len(job.lines) // BATCH_SIZE
    expected_s = job.wall_s + num_batches * slow_write_ms / 1000
    rng = random.Random(f"{options.seed}/{folder.name}")
    moments = sorted(rng.uniform(0, expected_s) for _ in range(options.count // 2 - 1))
    shim = make_shim(options.folder, folder.name)
    disturbed = shim.environment(folder, place.how, delay_ms=slow_write_ms)
    with mounted(folder, "-o", ext4, str(disk)):
        output = folder / "out"
        with job.started(output, environment=disturbed) as start:
            copies = list(_copies(start, output, disk, moments))
            said = f"ended with {start.wait()}: {start.stderr[-400:]}"
            report.check(copies[-1].is_finished, said)
        records, listing = (read(output / name) for name in ("predictions.jsonl", "listing.nul"))
    report.add("num_copies", len(copies))
    report.largest("num_different_durable", len({one.num_durable for one in copies}))
    for copy in copies:
        with mounted(folder.with_suffix(".copy"), "-o", ext4, str(copy.disk)) as copied:
            lost = missing(copy, copied / "out", records, listing)
            report.add("num_lost", bool(lost))
            when = f"{place.mode}, {copy.disk.name}, {copy.num_durable:,} bytes durable"
            report.check_none(lost, when)
            if place.how == "count":
                started_again(copied / "out")
                report.check_none(job.resumed(copied / "out"), f"{when}, resumed")
        copy.disk.unlink()


def missing(copy: Copy, output: Path, records: bytes, listing: bytes) -> list[str]:
    """What was reported durable, and is not on the copy; and what is torn, which nothing may be.

    A run.json that can be seen need not be durable itself: it is once the next one is written.
    """
    complaints = []
    run: dict[str, Any] = {}
    try:
        run = run_json(output)
    except ValueError as error:
        complaints.append(f"run.json is torn: {error}")
    kept = read(output / "predictions.jsonl")
    if kept[: copy.num_durable] != records[: copy.num_durable]:
        complaints.append(f"{len(kept):,} of {copy.num_durable:,} durable bytes, or others")
    if copy.num_durable and not run:
        complaints.append("no run.json")
    if copy.num_durable and read(output / "listing.nul") != listing:
        complaints.append("another listing")
    if copy.is_finished and (kept != records or run.get("status") != "complete"):
        complaints.append("the exit code was 0, and the output is incomplete")
    return complaints


def read(path: Path) -> bytes:
    """A file's content; nothing where there is no file."""
    return path.read_bytes() if path.exists() else b""


def started_again(output: Path) -> None:
    """Let run.json be of another boot: the kernel that wrote it lost its power, and this one lives.

    With its own boot's id, a job would believe what only the page cache of that kernel held.
    """
    run = run_json(output)
    if "durable" in run:
        run["durable"]["boot_id"] = ANOTHER_BOOT
        (output / "run.json").write_text(json.dumps(run))


# ---- disks ---------------------------------------------------------------------------------------


def make_disk(path: Path) -> Path:
    """An ext4 file system in a new file; with everything of its own written already."""
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    features = ["-b", "1024", "-J", "size=1", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", "-q", *features, path], check=True)
    return path


def _copies(start: Start, output: Path, disk: Path, moments: Sequence[float]) -> Iterator[Copy]:
    """Copies of a running job's disk at these seconds from its start, and one after its end."""
    device = loop_of(disk)
    for number, (moment, following) in enumerate(pairwise([*moments, math.inf])):
        if start.wait(max(0.0, start.started_at + moment - time.time())) is not None:
            break
        if number % 2:
            until = start.started_at + min(following, moment + WATCH_S)
            _wait_for_a_write(device, until)
        yield _copy(device, output, disk, disk.with_suffix(f".{number}"), is_finished=False)
    is_finished = start.wait() == 0
    yield _copy(device, output, disk, disk.with_suffix(".last"), is_finished=is_finished)


def _wait_for_a_write(device: str, until: float) -> None:
    """Wait until something is written to a block device, or it is `until`."""
    seen = num_writes(device)
    while num_writes(device) == seen and time.time() < until:
        time.sleep(POLL_S)


def _copy(device: str, output: Path, disk: Path, target: Path, *, is_finished: bool) -> Copy:
    """A copy of a disk as it was at one moment."""
    while True:
        durable = run_json(output).get("durable", {})
        before = num_writes(device)
        copy_sparse(disk, target)
        if num_writes(device) == before:
            return Copy(target, int(durable.get("num_bytes", 0)), is_finished)


def num_writes(device: str) -> tuple[str, ...]:
    """Changes with every write to a block device, begun or done.

    Source: Documentation/block/stat.rst of Linux, `write I/Os` and `in_flight`.
    """
    fields = Path("/sys/block", device, "stat").read_text().split()
    return fields[4], fields[6], fields[8]


def loop_of(disk: Path) -> str:
    """The name of the loop device behind which a file is mounted."""
    for folder in Path("/sys/block").glob("loop*"):
        backing = folder / "loop" / "backing_file"
        if backing.exists() and backing.read_text().strip() == str(disk):
            return folder.name
    raise FileNotFoundError(f"{disk} is mounted by no loop device")


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file without its holes, inside the kernel."""
    with source.open("rb") as file, target.open("wb") as copy:
        reader, writer = file.fileno(), copy.fileno()
        size = os.fstat(reader).st_size
        os.ftruncate(writer, size)
        at = 0
        while (at := _next_data(reader, at)) < size:
            end = os.lseek(reader, at, os.SEEK_HOLE)
            os.lseek(writer, at, os.SEEK_SET)
            while at < end:
                at += os.sendfile(writer, reader, at, end - at)


def _next_data(descriptor: int, at: int) -> int:
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # nothing but a hole is left
        return os.fstat(descriptor).st_size
