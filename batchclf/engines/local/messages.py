"""What parent and worker say to each other."""

from dataclasses import dataclass

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


Message = tuple[str, object]
"""A word and what goes with it: `log` text, `begin` (images, done,
errors), `guilty` (path or Stretch, Failure),
`listing` Archive or None, `unlistable` (Archive, Failure); and
as the last one `result` RunResult, `error` BatchclfError, or `bug`, a traceback as text."""
