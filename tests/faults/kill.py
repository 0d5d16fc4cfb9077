"""SIGKILL at random moments: of the whole process group, of the parent alone, of the worker alone.

`max_repeated_s`, the work that one kill costs at most: the seconds from the last write of
predictions.jsonl to the kill, and the records that were in the file then, but that the next start
did not keep, at the rate of the undisturbed run. Images that were decoded ahead of their turn are
no part of it: they are NUM_AHEAD at most, as many as there are slots. Where a start had written
nothing yet, no image's work is lost, but what starting had taken by then: `max_starting_s`.
"""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Literal

from tests.faults.jobs import Job, Start, lines_of, make_job, whole_prefix
from tests.faults.report import Options, Report, emptied
from tests.tiny import link_digits

Whom = Literal["group", "parent", "worker"]
KEYS = {"batch_size": 16, "runtime": {"streams": 2}, "loader": {"workers": 2, "prefetch": 2}}
NUM_AHEAD = 16 * (2 + 2 + 1)
"""Batch size x (streams + prefetched + 1) of KEYS."""
MAX_REPEATED_S = 2.0
MAX_ORPHAN_S = 5.0


def kill_group(options: Options, num_images: int = 20_000) -> Report:
    """Kill all of a job, again and again; the same command finishes it."""
    return _kill(options, num_images, "group")


def kill_parent(options: Options, num_images: int = 20_000) -> Report:
    """Kill the parent alone: the worker is gone within 5 s, and the same command goes on."""
    return _kill(options, num_images, "parent")


def kill_worker(options: Options, num_images: int = 20_000) -> Report:
    """Kill the worker alone: the job goes on by itself, and loses nothing."""
    report = options.report("kill-worker", num_kills=0, num_jobs=0, num_images=num_images)
    job = _job(options, num_images)

    def lane(number: int, count: int) -> None:
        output = options.folder / f"out-{number}"
        rng, num_kills = options.rng(number), 0
        while num_kills < count and not options.is_over:
            with job.started(emptied(output)) as start:
                killed = _kill_workers(start, output, rng, count - num_kills)
                exit_code = start.wait()
                num_kills += killed
                report.add("num_kills", killed)
                report.add("num_jobs")
                report.check(exit_code == 0, f"ended with {exit_code}: {start.stderr[-600:]}")
                left = start.num_left()
            report.check(not left, f"{left} processes outlived their job")
            report.check_none(job.complaints(output), f"after {killed} kills of the worker")
            if not report.check(killed, "the job has no worker process that could be killed"):
                return

    options.lanes(lane)
    return report


def _kill(options: Options, num_images: int, whom: Whom) -> Report:
    report = options.report(f"kill-{whom}", num_kills=0, num_jobs=0, num_images=num_images)
    job = _job(options, num_images)
    report.figures["images_per_s"] = round(num_images / job.wall_s)
    report.figures["num_ahead_at_most"] = NUM_AHEAD

    def lane(number: int, count: int) -> None:
        output = emptied(options.folder / f"out-{number}")
        rng = options.rng(number)
        repeated = _Repeated(report, num_images / job.wall_s)
        num_kills = 0
        while num_kills < count and not options.is_over:
            with job.started(output) as start:
                exit_code = start.wait(rng.uniform(0, 0.6 * job.wall_s))
                if exit_code is None:
                    _kill_one(start, whom, report)
                    num_kills += 1
                repeated.kept(start.num_resumed)
                if exit_code is None:
                    _inspect(job, output, start, repeated, report)
                else:
                    report.check(exit_code == 0, f"ended with {exit_code}: {start.stderr[-600:]}")
            if exit_code is not None:
                report.check_none(job.complaints(output), "finished after kills")
                report.add("num_jobs")
                emptied(output)
        report.check_none(job.resumed(output), "the last start")
        report.add("num_jobs")

    options.lanes(lane)
    return report


def _job(options: Options, num_images: int) -> Job:
    images = link_digits(options.folder / "images", num_images)
    return make_job(options.folder / "job", images, options.environment, **KEYS)


def _kill_one(start: Start, whom: Whom, report: Report) -> None:
    report.add("num_kills")
    start.kill(group=whom == "group")
    left = start.num_left()
    orphan_s = time.time() - start.killed_at
    report.check(not left, f"{left} processes are alive {orphan_s:.0f} s after the kill")
    report.took("max_orphan_s", orphan_s, MAX_ORPHAN_S, "until the last process was gone")


def _inspect(job: Job, output: Path, start: Start, repeated: "_Repeated", report: Report) -> None:
    """What a kill left: whole records of the first images, and the last one torn at worst."""
    num_whole = whole_prefix(lines_of(output), job.lines)
    if report.check(num_whole is not None, "a kill left other records than the first ones"):
        repeated.killed(output, start, num_whole or 0)


class _Repeated:
    """Measures the work that kills cost, as told at the top of this module."""

    def __init__(self, report: Report, images_per_s: float) -> None:
        self._report = report
        self._images_per_s = images_per_s
        self._num_whole = 0
        self._idle_s = 0.0

    def killed(self, output: Path, start: Start, num_whole: int) -> None:
        """`start` was killed just now, and left so many whole records."""
        predictions = output / "predictions.jsonl"
        written_at = predictions.stat().st_mtime if predictions.exists() else 0.0
        has_written = written_at > start.started_at
        self._idle_s = start.killed_at - written_at if has_written else 0.0
        if not has_written:
            self._report.largest("max_starting_s", start.killed_at - start.started_at)
        self._num_whole = num_whole

    def kept(self, num_resumed: int | None) -> None:
        """The next start kept so many; None: it had nothing to keep, or did not get so far."""
        if num_resumed is None:
            return
        num_cut = max(0, self._num_whole - num_resumed)
        self._report.largest("max_records_cut", num_cut)
        repeated_s = self._idle_s + num_cut / self._images_per_s
        said = f"{self._idle_s:.2f} s since the last record, {num_cut} records cut"
        self._report.took("max_repeated_s", repeated_s, MAX_REPEATED_S, f"repeated: {said}")


def _kill_workers(start: Start, output: Path, rng: random.Random, count: int) -> int:
    """Kill the worker at random moments, each after it got on; returns how many times."""
    predictions = output / "predictions.jsonl"
    num_bytes = -1
    num_killed = 0
    while num_killed < count:
        if not start.wait_until(partial(_is_larger, predictions, num_bytes)):
            break
        if start.wait(rng.uniform(0, 1.0)) is not None:
            break
        worker = start.worker()
        if worker is None:  # not yet started, or on its way out
            continue
        num_bytes = _size(predictions)
        start.send_to(worker, signal.SIGKILL)
        num_killed += 1
    return num_killed


def _is_larger(path: Path, num_bytes: int) -> bool:
    return _size(path) > num_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
