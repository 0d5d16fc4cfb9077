"""A crew: processes, anywhere, that classify ranges of a job's listing into parts.

Here is what a run asks of it, and how the run makes one file of what it commits.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import batchclf
from batchclf.errors import BatchclfError
from batchclf.models.bundle import Bundle
from batchclf.models.resolve import Log, ResolvedModel
from batchclf.results.files import RunFiles
from batchclf.results.listing import Listing
from batchclf.results.parts import Committed, Folders
from batchclf.results.records import Entry, ImageRef
from batchclf.results.stats import RunStats
from batchclf.run.landmarks import Witness
from batchclf.run.ranges import Ranges
from batchclf.sessions.open import Opened
from batchclf.spec.job import JobSpec
from batchclf.system.interrupt import StopRequest

if TYPE_CHECKING:
    from batchclf.run.append import SyncedSink
    from batchclf.run.classify import Work


@dataclass(frozen=True, slots=True)
class Order:
    """What a crew is hired for."""

    job: JobSpec
    model: ResolvedModel
    variant: tuple[str, Bundle] | None
    """The same model at the job's precision, where that is another file, and its folder's name."""
    listing: Listing
    """In its place once work begins: who opens late or elsewhere could not read it before."""
    num_images: int
    """Of the job or of its shard."""
    first: tuple[Entry, ...]
    """Of the listing, its first ones."""
    sample: tuple[ImageRef, ...]
    """Of the listing, where sessions may be opened with a sample."""
    files: RunFiles
    log: Log
    beat: Callable[[], None]
    """Called some times a second: nothing hangs."""
    stop: StopRequest
    witness: Witness


class Crew(Protocol):
    """Those who were hired: their sessions are open and proven."""

    opened: Opened
    """What one of them opened, without its classifiers."""
    num_streams: int
    """Of all."""
    folders: Folders

    def work(self, ranges: Ranges, folders: Folders) -> Iterator[Committed | None]:
        """Do all ranges; each part as it is committed, None some times a second.

        After a signal, what can be committed soon is, and that is all.

        Raises:
            BatchclfError: what ended one of them, where the others cannot go on.
        """

    def underway(self) -> tuple[int, int]:
        """Images that have a record, though not in a part yet; and how many of those are errors.

        Not those that are missing: a lost mount is not to pass `errors.max`.
        """

    def figures(self) -> Mapping[str, RunStats]:
        """The figures of each node."""

    def stop(self) -> None:
        """Have `work` end as after a signal."""

    def close(self) -> None:
        """End all, whatever they are at; what they have not committed is gone."""


Hire = Callable[[Order], Crew]


def collect(
    work: "Work", ranges: Ranges, folders: Folders, sink: "SyncedSink", found: Iterable[Committed]
) -> None:
    """Have a crew do the ranges, and append to the sink each part as soon as it is its turn.

    `found` are parts that were committed before, beyond what the sink has.

    Raises:
        ErrorLimitPassed: with the records that passed `errors.max`, in parts or not yet in any.
        Interrupted: after a signal, with all appended that can be.
        BatchclfError: as `Crew.work`.
    """
    from batchclf.run.classify import Ticker, error_limit_passed, passes_error_limit

    crew, task, stats = work.crew, work.plan.task, work.stats
    assert crew is not None
    waiting = {part.first: part for part in found}
    limit_passed = None
    work.reporter.begin(task.num_images, stats.num_images, stats.num_errors)
    stats.start(time.perf_counter() - batchclf.STARTED, work.num_streams)
    ticker = Ticker(work)
    with work.stop.drained_by_caller():
        for part in crew.work(ranges, folders):
            work.reporter.beat()
            work.reporter.before_write()
            if part is not None:
                waiting[part.first] = part
                stats.add_part(part.num_ok, part.errors_by_code)
            while (following := waiting.pop(ranges.origin + sink.num_images, None)) is not None:
                sink.take(folders.path(following.first), following)
            sink.tick()
            num_more, num_errors = crew.underway()
            seen = min(stats.num_images + num_more, task.num_images), stats.num_errors + num_errors
            work.reporter.update(*seen)
            if limit_passed is None and passes_error_limit(task.job, seen[1], task.num_images):
                limit_passed = error_limit_passed(task.job, *seen)
                crew.stop()  # so that the records that tell of the errors are there
            ticker.tick()
        ticker.tell()
    if limit_passed is not None:
        raise limit_passed
    if waiting or stats.num_images < task.num_images:
        work.stop.raise_if_requested()
        raise BatchclfError(  # cannot happen; an incomplete output must never exit 0
            f"{stats.num_images:,} of {task.num_images:,} records written; run again to resume"
        )
