"""A worker that stands still, an image that never ends, and two jobs at one output."""

import os
import signal
import time
from pathlib import Path

from tests.faults.jobs import Job, make_job
from tests.faults.report import Options, Report, emptied
from tests.tiny import link_digits

STALL_TIMEOUT_S = 3.0
BUSY_FACTOR = 10
"""How much longer than an idle worker a busy one is waited for (README.md)."""
IDLE_SHARE = 0.8
"""Of that, what an idle one surely takes less than, also on a machine that others use."""
MAX_BEYOND_S = 5.0
"""Within so long of the timeout, a worker that stands still is gone."""
MAX_REFUSAL_S = 2.0


def stall(options: Options, num_images: int = 4_000) -> Report:
    """SIGSTOP to the worker at random moments: it is replaced, and the job ends by itself."""
    report = options.report("stall", num_stops=0)
    images = link_digits(options.folder / "images", num_images)
    os.mkfifo(images / "000100-fifo.jpg")
    # An image may take a minute, so it is the timeout, not an image, that ends a worker.
    keys = {"batch_size": 16, "stall_timeout": STALL_TIMEOUT_S}
    job = make_job(options.folder / "job", images, options.environment, **keys)
    fifo = [line for line in job.lines if b"-fifo.jpg" in line]
    report.check(len(fifo) == 1 and b'"not_regular_file"' in fifo[0], f"the FIFO: {fifo}")

    def lane(number: int, count: int) -> None:
        output = options.folder / f"out-{number}"
        rng, num_stops = options.rng(number), 0
        while num_stops < count and not options.is_over:
            moment_s = rng.uniform(0, 0.8 * job.wall_s)
            num_stops += _stop_worker(job, emptied(output), moment_s, report)

    options.lanes(lane)
    return report


def _stop_worker(job: Job, output: Path, moment_s: float, report: Report) -> bool:
    """Run the job, its worker stopped at a moment; False: the job was faster."""
    with job.started(output) as start:
        start.wait(moment_s)
        start.wait_until(start.worker)
        worker = start.worker()
        if worker is None:
            return False
        start.send_to(worker, signal.SIGSTOP)
        stopped_at = time.monotonic()
        gone = start.wait_until(lambda: worker not in start.members())
        took_s = time.monotonic() - stopped_at
        report.add("num_stops")
        report.check(gone, f"not replaced after {took_s:.1f} s")
        report.check(
            took_s < IDLE_SHARE * BUSY_FACTOR * STALL_TIMEOUT_S,
            f"replaced after {took_s:.1f} s, as if it had been busy",
        )
        limit_s = STALL_TIMEOUT_S + MAX_BEYOND_S
        report.took("max_replaced_s", took_s, limit_s, "until the worker was replaced")
        exit_code = start.wait()
        report.check(exit_code == 0, f"ended with {exit_code}: {start.stderr[-600:]}")
    report.check_none(job.complaints(output), "after a worker that stood still")
    return True


def locks(options: Options, num_images: int = 20_000) -> Report:
    """A second job at one output is refused; the lock of one that was killed is taken over."""
    report = options.report("locks", num_refusals=0, num_taken_over=0)
    images = link_digits(options.folder / "images", num_images)
    job = make_job(options.folder / "job", images, options.environment, batch_size=16)
    output, host = options.folder / "out", os.uname().nodename
    for _ in range(options.count):
        if options.is_over:
            break
        with job.started(emptied(output)) as first:
            first.wait_until((output / "run.json").exists)
            began = time.monotonic()
            exit_code, stderr = job.run(output)
            took_s = time.monotonic() - began
            said = f"the second ended with {exit_code} after {took_s:.1f} s: {stderr[-400:]}"
            report.check(first.is_running, "the first job was too short")
            report.add("num_refusals", exit_code == 2)
            report.took("max_refusal_s", took_s, MAX_REFUSAL_S, said)
            report.check(exit_code == 2, said)
            report.check(host in stderr and str(first.pid) in stderr, f"no host and pid: {said}")
            report.check(len(stderr.splitlines()) == 1, said)
            first.kill()
        complaints = job.resumed(output)
        report.add("num_taken_over", not complaints)
        report.check_none(complaints, "after the first was killed")
    return report
