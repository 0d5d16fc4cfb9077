"""Run a job from a program, on the engine that the job names."""

import os
import time
from contextlib import closing, nullcontext

from batchclf.engines.display import Bar, ProgramDisplay, RunDisplay, ShowProgress
from batchclf.engines.local.engine import run_in_worker
from batchclf.run.request import RunResult
from batchclf.runtime.providers import require_flavour
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest


def run_job(
    job: JobSpec | str | os.PathLike[str],
    options: RunOptions | None = None,
    *,
    progress: ShowProgress | bool = False,
    handle_signals: bool = False,
) -> RunResult:
    """Run a job to its end, or resume it, as `batchclf run` does; also from a thread.

    The work is done in a process that this one watches and starts again when it dies. Lines for
    people go to the logger `batchclf`.

    Args:
        job: what `load_job` gives, or the path of a job file.
        options: what `batchclf run` takes as options, such as `RunOptions(overwrite=True)`.
        progress: called with a `Progress` some times a second; True: a bar of tqdm's.
        handle_signals: let SIGINT, SIGTERM, SIGHUP and SIGUSR1 drain the job and end it with
            `Interrupted`, as the command does; in the main thread only. Otherwise a
            KeyboardInterrupt ends it without draining, and what is written can be resumed.

    Raises:
        BatchclfError: whatever would end the command, with its `exit_code`; run it again to resume.
    """
    started, stop, bar = time.perf_counter(), StopRequest(), Bar()
    show = (bar if progress else None) if isinstance(progress, bool) else progress

    def prepare() -> tuple[JobSpec, RunOptions, RunDisplay]:
        spec = job if isinstance(job, JobSpec) else load_job(job)
        require_flavour()
        return spec, options or RunOptions(), ProgramDisplay(show)

    with closing(bar), stop.installed() if handle_signals else nullcontext():
        return run_in_worker(prepare, stop, started)
