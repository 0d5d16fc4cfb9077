"""What parent and worker say to each other."""

import signal
from dataclasses import dataclass

from batchclf.job import JobSpec
from batchclf.request import Recovery, RunOptions

STOP_SIGNALS = {signal.SIGRTMIN + 1: signal.SIGINT, signal.SIGRTMIN + 2: signal.SIGTERM}
"""How the parent passes a signal on. The worker hears no other: a terminal's Ctrl-C goes to both
processes, and would count twice."""
DUMP_SIGNAL = signal.SIGUSR2
"""Has the worker write the stacks of its threads to stderr."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is to do."""

    job: JobSpec
    options: RunOptions
    recovery: Recovery
    started: float
    """time.perf_counter() from which start-up counts."""


Message = tuple[str, object]
"""A word and what goes with it: `log` text, `begin` (images, done), `guilty` (index, Failure); and
as the last one `result` RunResult, `error` BatchclfError, or `bug`, a traceback as text."""
