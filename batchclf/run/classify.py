"""The flow of images: listing → prefetched batches → streams of inference → records, in order."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Protocol

import batchclf
from batchclf.errors import BatchclfError, ErrorLimitPassed
from batchclf.images.ahead import reading_ahead
from batchclf.images.decode_pool import Workers, open_decoding
from batchclf.images.prefetch import Decoding, Memory, Prefetcher, noted
from batchclf.results.lines import Lines, encode
from batchclf.results.records import ImageRef, Record
from batchclf.results.stats import StatsCollector
from batchclf.run.blame import explained
from batchclf.run.plan import Plan, Task
from batchclf.run.reporter import Reporter
from batchclf.run.sameness import FirstAnswers
from batchclf.runtime.ranking import rank
from batchclf.runtime.streams import Rank, Streams
from batchclf.sessions.open import Opened
from batchclf.spec.job import JobSpec, auto
from batchclf.system.interrupt import StopRequest

if TYPE_CHECKING:
    from batchclf.run.crew import Crew
    from batchclf.run.feeders import Feeders

TICK_S = 1.0


class Sink(Protocol):
    """Where records go."""

    def write(self, lines: Lines) -> None:
        """Take the records of one batch, the next in the order of the listing."""

    def tick(self) -> None:
        """Do what is to be done from time to time; called after each batch, and every TICK_S."""


@dataclass(frozen=True, slots=True)
class Work:
    """A plan with open sessions, and who hears of its progress."""

    plan: Plan
    opened: Opened
    stats: StatsCollector
    reporter: Reporter
    stop: StopRequest
    feeders: "Feeders | None" = None
    """The processes of several GPUs that classify; None: this one does."""
    crew: "Crew | None" = None
    """Those who classify elsewhere; `classify` is theirs to call."""

    @property
    def num_streams(self) -> int:
        """Batches that are inferred at once."""
        if self.crew is not None:
            return self.crew.num_streams
        return self.feeders.num_streams if self.feeders else len(self.opened.classifiers)

    def close(self) -> None:
        """End the processes that were started for it."""
        for one in (self.feeders, self.crew):
            if one is not None:
                one.close()


def classify(work: Work, refs: Iterator[ImageRef], sink: Sink) -> None:
    """Classify `refs`, what a task has left, into records in the order of the listing.

    Raises:
        ErrorLimitPassed: after the batch that passed `errors.max`.
        Interrupted: after a signal, with all written that was in flight.
        OutOfMemory: for so many images at once.
        DeviceLost: the device does not answer any more; another process may find that it does.
    """
    task, stats, stop = work.plan.task, work.stats, work.stop
    work.reporter.begin(task.num_images, stats.num_images, stats.num_errors)
    with (
        explained(task, work.opened.part.num_images, has_sessions=work.feeders is None),
        stop.drained_by_caller(),
        _flowing(work, refs) as flow,
    ):
        stats.start(time.perf_counter() - batchclf.STARTED, work.num_streams)
        ticker = Ticker(work)
        for lines in flow:
            work.reporter.before_write()
            if lines is not None:
                sink.write(lines)
                stats.add_lines(lines)
                check_error_limit(task.job, stats, task.num_images)
            sink.tick()
            work.reporter.update(stats.num_images, stats.num_errors)
            ticker.tick()
        ticker.tell()
    if stats.num_images < task.num_images:
        stop.raise_if_requested()
        raise BatchclfError(  # cannot happen; an incomplete output must never exit 0
            f"{stats.num_images:,} of {task.num_images:,} records written; run again to resume"
        )


class Ticker:
    """Tells of a run every TICK_S or so."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._next = time.monotonic() + TICK_S

    def tick(self) -> None:
        """Tell, when it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TICK_S
            self.tell()

    def tell(self) -> None:
        """Tell now."""
        self._work.reporter.live(self._work.stats.live(self._work.plan.batch_size))


@contextmanager
def _flowing(work: Work, refs: Iterator[ImageRef]) -> Iterator[Iterator[Lines | None]]:
    """The records of each batch, in order, up to a signal; None whenever TICK_S bring none."""
    if work.feeders is None:
        with flowing(work, refs) as flow:
            yield (None if records is None else encoded(records, work.stats) for records in flow)
        return
    yield work.feeders.results(refs, work.stats, work.stop, TICK_S)


def encoded(records: Sequence[Record], stats: StatsCollector) -> Lines:
    """The lines of some records, counted among what writing takes."""
    started = time.perf_counter()
    lines = encode(records)
    stats.add_write(time.perf_counter() - started)
    return lines


@contextmanager
def flowing(work: Work, refs: Iterator[ImageRef]) -> Iterator[Iterator[list[Record] | None]]:
    """The same of what this process itself classifies, as records."""
    first = FirstAnswers()
    with (
        _prefetched(work, refs) as (decoding, batches),
        Streams(
            batches.next_batch, work.opened.classifiers, _ranking(work.plan.task),
            work.stats.add_batch,
        ) as streams,
        _stopping(batches),
    ):  # fmt: skip

        def flow() -> Iterator[list[Record] | None]:
            for result in streams.results(TICK_S):
                if result is None:
                    yield None
                else:
                    batch, records = result
                    yield records
                    _warn(work, first.look(batch, records))
                    batches.release(batch)
                if work.stop.signal_number is not None:
                    batches.stop()

        work.stats.count_cpu(decoding.cpu_seconds)
        work.stats.watch_queue(batches.num_ready)
        yield flow()
    _warn(work, first.end())


def _warn(work: Work, warning: str | None) -> None:
    if warning is not None:
        work.reporter.log(warning)


@contextmanager
def _prefetched(work: Work, refs: Iterator[ImageRef]) -> Iterator[tuple[Decoding, Prefetcher]]:
    """Batches of `refs`, and what decodes them."""
    plan, task = work.plan, work.plan.task
    num_batches = num_batches_of(task.job, len(work.opened.classifiers))
    batch_shape = (plan.batch_size, *task.model.preprocess.crop, 3)
    memory = Memory(num_batches, batch_shape, work.opened.memory)
    loader, watch = plan.loader, work.reporter.watch

    def hand_over(
        worker: int, refs: Sequence[ImageRef]
    ) -> AbstractContextManager[Sequence[ImageRef]]:
        return loader.fetched(refs, partial(watch.reading, worker))

    workers = Workers(plan.num_workers, task.job.loader.max_seconds, watch.beat, hand_over)
    with open_decoding(loader, plan.backend, workers, memory) as decoding:
        # Processes mind themselves what their images do to them.
        watched = noted(decoding, watch) if plan.backend == "threads" else decoding
        with (
            reading_ahead(loader.read_far, refs, watched, watch) as (ahead, fed),
            Prefetcher(ahead, fed) as batches,
        ):
            yield decoding, batches


def num_batches_of(job: JobSpec, num_streams: int) -> int:
    """Batches that there is memory for: of the streams, ahead of them, and being written."""
    return num_streams + auto(job.loader.prefetch, max(2, num_streams)) + 1


def _ranking(task: Task) -> Rank:
    """Scores to the predictions that the job asks for."""
    return partial(
        rank,
        labels=task.model.labels,
        top_k=task.job.top_k,
        activation=task.model.bundle.meta.activation,
    )


@contextmanager
def _stopping(batches: Prefetcher) -> Iterator[None]:
    """However the block ends, hand out no further batch, so that the streams end too."""
    try:
        yield
    finally:
        batches.stop()


def check_error_limit(job: JobSpec, stats: StatsCollector, num_images: int) -> None:
    """End a job in which too many images failed.

    Raises:
        ErrorLimitPassed: more than `errors.max`.
    """
    if passes_error_limit(job, stats.num_errors, num_images):
        raise error_limit_passed(job, stats.num_images, stats.num_errors)


def passes_error_limit(job: JobSpec, num_errors: int, num_images: int) -> bool:
    """Whether so many failures, in a job of so many images, are too many."""
    limit = job.errors.max
    if limit is None:
        return False
    # Not as a float: 29% of 100 would be fewer than 29.
    allowed = Fraction(limit.rstrip("%")) / 100 * num_images if isinstance(limit, str) else limit
    return num_errors > allowed


def error_limit_passed(job: JobSpec, num_done: int, num_errors: int) -> ErrorLimitPassed:
    """The error that a job in which too many images failed ends with."""
    return ErrorLimitPassed(
        f"{num_errors:,} of {num_done:,} images failed; errors.max is {job.errors.max}. "
        f"The reasons are in the records in {job.output}; raise errors.max to resume"
    )
