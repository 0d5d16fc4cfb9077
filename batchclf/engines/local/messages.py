"""What parent and worker say to each other."""

from dataclasses import dataclass

from batchclf.run.duty import Attempt, Duty
from batchclf.run.recovery import Recovery
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is to do."""

    job: JobSpec
    options: RunOptions
    recovery: Recovery
    started: float
    """time.perf_counter() from which start-up counts."""


@dataclass(frozen=True, slots=True)
class ServeSetup:
    """The same of a worker that is one of a crew; more attempts follow, and None as the last."""

    duty: Duty
    recovery: Recovery
    attempts: tuple[Attempt, ...]
    """What the worker before it was at."""


Message = tuple[str, object]
"""A word and what goes with it: `log` text, `begin` (images, done, errors), `live` Live,
`guilty` (path or Stretch, Failure), `listing` Archive or None, `unlistable` (Archive, Failure); of
a crew `opened` (Opened, streams), `committed` (Attempt, Committed), `doubtful` Doubt, `figures`
RunStats; and as the last one `result` RunResult, `error` BatchclfError, or `bug`, a traceback as
text."""
