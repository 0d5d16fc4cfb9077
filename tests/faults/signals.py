"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 at random moments, from a job's first instant to its last.

A job ends with 128 and the signal's number within 8 s, and the same command finishes it; a repeat
within a moment changes nothing, a second one after REPEAT_S ends it at once. SIGUSR1 counts as
SIGTERM, once the job has begun to listen. A job that has nothing left to do when the
signal comes ends with 0.
"""

import random
import signal
import time
from functools import partial
from pathlib import Path

from batchclf.system.interrupt import REPEAT_S
from tests.faults.jobs import Job, Start, children_of, lines_of, make_job, state_of, whole_prefix
from tests.faults.report import Options, Report, emptied
from tests.tiny import link_digits

KEYS = {"batch_size": 16}
MAX_S = 8.0
MAX_SECOND_S = 2.0
"""A second signal ends a job at once; the rest is a busy machine's."""
SIGNALS = (*[signal.SIGTERM] * 6, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""One of them each time."""
COLD = 8
"""Every so many starts, the model has to be prepared again."""


def signals(options: Options, num_images: int = 5_000) -> Report:
    """A signal at a random moment, the same command again, until `count` were single SIGTERMs."""
    report = options.report("signals", num_sigterms=0, num_signals=0, num_jobs=0, num_tracebacks=0)
    images = link_digits(options.folder / "images", num_images)
    job = make_job(options.folder / "job", images, options.environment, **KEYS)

    def lane(number: int, count: int) -> None:
        output = emptied(options.folder / f"out-{number}")
        rng, num_starts, num_sigterms = options.rng(number), 0, 0
        while num_sigterms < count and not options.is_over:
            cold = str(options.folder / f"cold-{number}-{num_starts}")
            environment = {} if num_starts % COLD else {"BATCHCLF_CACHE_DIR": cold}
            num_starts += 1
            if (sent := _disturb(job, output, rng, environment, report)) is not None:
                num_sigterms += sent == (signal.SIGTERM,)
                continue
            report.add("num_jobs")
            report.check_none(job.complaints(output), "finished after signals")
            emptied(output)
        report.check_none(job.resumed(output), "the last start")
        report.add("num_jobs")

    options.lanes(lane)
    return report


def _disturb(
    job: Job, output: Path, rng: random.Random, environment: dict[str, str], report: Report
) -> tuple[signal.Signals, ...] | None:
    """Start the job; the signals sent at a random moment. None: it was finished before."""
    number, to_group = rng.choice(SIGNALS), rng.random() < 0.3
    with job.started(output, environment=environment) as start:
        if (exit_code := start.wait(rng.uniform(0, 0.8 * job.wall_s))) is not None:
            report.check(exit_code == 0, f"ended with {exit_code}: {start.stderr[-400:]}")
            return None
        start.send(number, to_group=to_group)
        is_repeated, is_double = rng.random() < 0.3, rng.random() < 0.2
        if is_repeated:
            time.sleep(rng.uniform(0, 0.2))
            start.send(number, to_group=to_group)
        if is_double:
            time.sleep(REPEAT_S + rng.uniform(0, 0.2))
            start.send(number, to_group=to_group)
        exit_code = _check_end(start, number, MAX_SECOND_S if is_double else MAX_S, report)
    if exit_code == 0 and not is_double:
        return None
    if number == signal.SIGTERM and not is_double:
        report.add("num_sigterms")
    whole = whole_prefix(lines_of(output), job.lines)
    report.check(whole is not None, f"{number.name} left other records than the first ones")
    return (number, number) if is_double else (number,)


def _check_end(start: Start, number: signal.Signals, max_s: float, report: Report) -> int | None:
    """The job ends in time and as promised, and leaves no process behind; its exit code."""
    sent_at = time.monotonic()
    exit_code = start.wait()
    took_s = time.monotonic() - sent_at
    report.add("num_signals")
    said = f"{exit_code} after {took_s:.1f} s: {start.stderr[-400:]}"
    allowed = (0, 128 + number, *([128 + signal.SIGTERM] if number == signal.SIGUSR1 else []))
    report.check(exit_code in allowed, f"{number.name}: ended with {said}")
    report.add(f"num_exit_{exit_code}")
    figure = "max_s" if max_s == MAX_S else "max_second_s"
    report.took(figure, took_s, max_s, f"{number.name}: ended with {said}")
    report.add("num_tracebacks", "Traceback" in start.stderr)
    report.check(not start.num_left(), f"{number.name}: processes are left, ended with {said}")
    return exit_code


def as_pid_1(options: Options, num_images: int = 5_000) -> Report:
    """The same as the first process of a container, which has no default handlers, nor a parent."""
    report = options.report("pid-1", num_signals=0, num_jobs=0, num_zombies=0)
    images = link_digits(options.folder / "images", num_images)
    job = make_job(options.folder / "job", images, options.environment, **KEYS)
    through = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

    def lane(number: int, count: int) -> None:
        output = emptied(options.folder / f"out-{number}")
        rng, num_signals = options.rng(number), 0
        while num_signals < count and not options.is_over:
            with job.started(output, through=through) as start:
                start.wait_until(partial(_first_process, start))
                if start.wait(rng.uniform(0.0, 0.8 * job.wall_s)) is None:
                    num_signals += _end_pid_1(start, rng.choice(SIGNALS), report)
                    continue
            report.add("num_jobs")
            report.check_none(job.complaints(output), "finished after signals")
            emptied(output)
        report.check_none(job.resumed(output), "the last start")

    options.lanes(lane)
    return report


def _first_process(start: Start) -> int | None:
    """The job itself: `start` is unshare. None: it does not run yet, or any more."""
    return next((pid for pid in children_of(start.pid) if state_of(pid) != "Z"), None)


def _end_pid_1(start: Start, number: signal.Signals, report: Report) -> bool:
    """Look for zombies, and send the signal; False: the job was faster."""
    first = _first_process(start)
    if first is None:
        return False
    zombies = [pid for pid in children_of(first) if state_of(pid) == "Z"]
    time.sleep(0.2)  # one that has just ended is being waited for
    num_zombies = sum(state_of(pid) == "Z" for pid in zombies)
    report.add("num_zombies", num_zombies)
    report.check(num_zombies == 0, f"{num_zombies} zombies")
    start.send_to(first, number)
    _check_end(start, number, MAX_S, report)
    return True
