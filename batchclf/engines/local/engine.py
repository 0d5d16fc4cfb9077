"""A run on this machine: a worker process, started before all else, and who watches it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from batchclf.engines.local.process import Workers

if TYPE_CHECKING:
    from batchclf.engines.display import RunDisplay
    from batchclf.run.request import RunResult
    from batchclf.spec.job import JobSpec
    from batchclf.spec.options import RunOptions
    from batchclf.system.interrupt import StopRequest

Prepare = Callable[[], "tuple[JobSpec, RunOptions, RunDisplay]"]
"""What to run, and who is shown it; called once the worker has been started."""


def run_in_worker(
    prepare: Prepare, stop: "StopRequest", started: float, *, adopts: bool = False
) -> "RunResult":
    """Run a job to its end, or resume it, in a process that imports while this one prepares.

    `started`: time.perf_counter() from which start-up counts; `adopts` as in `Workers`.

    Raises:
        BatchclfError: with the exit code and what to do; the output stays resumable.
    """
    with Workers(adopts=adopts) as workers:
        job, options, display = prepare()
        from batchclf.engines.local.supervisor import Supervisor

        return Supervisor(workers, display, stop, started).run(job, options)
