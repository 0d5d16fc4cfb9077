"""A process of a crew: opens the job's sessions once, and classifies range after range.

Sessions and decoding stay warm from one range to the next. Records go into a draft; a process that
takes the place of one that died goes on with its drafts.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from batchclf.images.prefetch import HostMemory
from batchclf.images.resize import require_pillow
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.results.lines import Lines
from batchclf.results.listing import Listing
from batchclf.results.records import ImageRef, Record
from batchclf.results.stats import StatsCollector
from batchclf.run.blame import explained, try_suspects
from batchclf.run.classify import TICK_S, Work, encoded, flowing
from batchclf.run.draft import Draft, num_missing
from batchclf.run.duty import Attempt, Doubt, Duty, Inbox, ServeReporter
from batchclf.run.landmarks import require_landmarks
from batchclf.run.plan import Task, make_plan
from batchclf.run.recovery import Recovery
from batchclf.run.request import Run
from batchclf.sessions.open import Wanted, open_devices, settle_provider
from batchclf.sessions.sample import Sample
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb

WAIT_S = 0.2
"""How long a batch that is not full waits for another range, before it is classified as it is."""
IDLE_S = 0.5


def serve(
    duty: Duty, inbox: Inbox, reporter: ServeReporter, stop: StopRequest, recovery: Recovery
) -> None:
    """Classify what comes until there is no more, or a signal comes; then commit what is there.

    Raises:
        ProviderError: the provider does not work here.
        OutOfMemory, DeviceLost: as `classify`.
        BatchclfError: what else ends it.
    """
    pending: deque[Attempt] = deque()
    run = Run(duty.job, RunOptions(), reporter, stop, recovery)
    require_pillow(duty.job.loader.decode)
    fallback = settle_provider(duty.job, reporter.log)
    store = open_store(source_of(duty.job))
    store.require_listed(duty.first)
    require_landmarks(store, duty.landmarks)
    task = Task(duty.job, store.source, duty.model, duty.num_images)
    if recovery.suspects or recovery.readers:
        while (attempt := inbox.take(0.0)) is not None:
            pending.append(attempt)
        run = try_suspects(
            run, task, chain.from_iterable(a.range.refs(duty.listing) for a in pending)
        )
    work = _opened(duty, run, task, fallback)
    told = replace(work.opened, classifiers=(), memory=HostMemory())
    reporter.opened(told, work.num_streams)
    bench = _Bench(work, reporter, duty.listing, inbox, pending, recovery.num_images)
    work.stats.start(0.0, work.num_streams)
    with stop.drained_by_caller():
        while bench.wait():
            with explained(task, work.opened.part.num_images), flowing(work, bench.refs()) as flow:
                for records in flow:
                    bench.write(records or ())
            bench.write(())
        bench.close()


def _opened(duty: Duty, run: Run, task: Task, fallback: str | None) -> Work:
    plan, reporter = make_plan(run, task), run.reporter
    sample = Sample(task.job, plan.loader, duty.sample, reporter.watch)
    wanted = Wanted(task.job, task.model, plan.batch_size, sample, reporter.log)
    with explained(task, plan.batch_size):
        opened = open_devices(wanted, fallback)
    return Work(plan, opened, StatsCollector(cpu_seconds, peak_rss_mb), reporter, run.stop)


@dataclass(slots=True)
class _Bench:
    """The ranges at work: their images go in at one end, and their records come out in order."""

    work: Work
    reporter: ServeReporter
    listing: Listing
    inbox: Inbox
    pending: deque[Attempt]
    num_images: int
    """Records written by this process, and by those whose place it took."""
    num_errors: int = 0
    """Of these, without missing images: whether they are, is told by what is committed."""
    _drafts: deque[Draft] = field(default_factory=deque, init=False)
    """Of ranges whose images went in, and whose records are not all there."""
    _next_figures: float = field(default=0.0, init=False)

    def wait(self) -> bool:
        """Wait for a range; False: there are no more, or a signal came."""
        while self.work.stop.signal_number is None:
            if self.pending:
                return True
            if (attempt := self.inbox.take(IDLE_S)) is not None:
                self.pending.append(attempt)
            elif self.inbox.has_ended:
                return False
            self.reporter.beat()
        return False

    def refs(self) -> Iterator[ImageRef]:
        """The images of all ranges that come, until none comes for a while."""
        while True:
            attempt = self.pending.popleft() if self.pending else self.inbox.take(WAIT_S)
            if attempt is None:
                return
            draft = Draft(attempt, self.listing, self.work.stats.add_write)
            self._drafts.append(draft)
            yield from attempt.range.refs(self.listing, draft.num_images)

    def write(self, records: Sequence[Record]) -> None:
        """Take the next records, and commit each range that has all of its own."""
        self.reporter.before_write()
        while self._drafts:
            draft = self._drafts[0]
            own, records = records[: draft.num_left], records[draft.num_left :]
            if own:
                lines = encoded(own, self.work.stats)
                draft.write(lines)
                self._count(lines)
            if draft.num_left:
                break
            self._commit(self._drafts.popleft())
        if time.monotonic() >= self._next_figures:
            self._next_figures = time.monotonic() + TICK_S
            self.reporter.figures(self.work.stats.snapshot())

    def _count(self, lines: Lines) -> None:
        self.work.stats.add_lines(lines)
        self.num_images += lines.num_images
        self.num_errors += lines.num_errors - num_missing(lines.errors_by_code)
        self.reporter.update(self.num_images, self.num_errors)

    def _commit(self, draft: Draft) -> None:
        if draft.is_doubtful:
            draft.give_up()
            self.reporter.doubts(Doubt(draft.attempt))
            return
        part = draft.commit()
        self.reporter.figures(self.work.stats.snapshot())
        self.reporter.committed(draft.attempt, part)

    def close(self) -> None:
        """Commit what is there of the first range; the others have nothing yet."""
        if self._drafts and self._drafts[0].num_images:
            self._commit(self._drafts.popleft())
        for draft in self._drafts:
            draft.give_up()
