"""Records behind those that are there, durable from time to time."""

import time
from pathlib import Path

from batchclf.errors import ErrorLimitPassed, Interrupted
from batchclf.results.files import RunFiles
from batchclf.results.lines import Lines
from batchclf.results.parts import Committed, Folders, find_parts
from batchclf.results.run_record import NOTHING_DURABLE, RunState
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import RecordWriter, append_stats
from batchclf.run.classify import Work, classify
from batchclf.run.crew import collect
from batchclf.run.decide import Append
from batchclf.run.ranges import Gaps, gaps_between
from batchclf.run.ready import Begun

INTERVAL_S = 10.0
SYNC_S = 5.0
"""Seconds between syncs; a power loss costs as much work, or a batch that takes longer."""


class SyncedSink:
    """A `Sink` into a file: synced every SYNC_S; every INTERVAL_S a line in stats.jsonl."""

    def __init__(
        self,
        files: RunFiles,
        writer: RecordWriter,
        stats: StatsCollector,
        state: RunState | None = None,
        num_images: int = 0,
    ) -> None:
        """`state`: where it is noted what is durable; None: it is not yet anything's.

        `num_images`: what the writer has at the beginning.
        """
        self.num_images = num_images
        self._files = files
        self._writer = writer
        self._stats = stats
        self._state = state
        self._next_sync = time.monotonic() + SYNC_S
        self._next_interval = time.monotonic() + INTERVAL_S

    def write(self, lines: Lines) -> None:
        """Append the records of one batch."""
        self._writer.write(lines)
        self.num_images += lines.num_images

    def take(self, path: Path, part: Committed) -> None:
        """Append a part that others have written."""
        self._writer.copy(path, part.num_bytes)
        self.num_images += part.num_images

    def tick(self) -> None:
        """Sync, and tell figures, when it is time."""
        if time.monotonic() >= self._next_sync:
            self.sync()
            self._next_sync = time.monotonic() + SYNC_S
        if time.monotonic() >= self._next_interval:
            self._next_interval += INTERVAL_S
            append_members(self._files, self._stats)
            append_stats(self._files, self._stats.snapshot())

    def sync(self) -> None:
        """Make what is written survive a power loss, and only then note that it does."""
        self._writer.sync()
        if self._state is not None:
            self._state.note_durable(self._writer.num_bytes, self.num_images)


def append_members(files: RunFiles, stats: StatsCollector) -> None:
    """A line in stats.jsonl for each node, where several work on the job.

    Raises:
        EnvironmentFailed: as `append_stats`.
    """
    for node, figures in stats.members().items():
        append_stats(files, figures, node)


def append(begun: Begun, todo: Append, state: RunState) -> None:
    """Classify what has no record yet, noting what is durable.

    Raises:
        BatchclfError: as `classify`; what is written is durable then.
    """
    files, stats, work = begun.run.files, begun.ready.stats, begun.ready.work
    previous, before_write = begun.ready.previous, begun.run.reporter.before_write
    durable = NOTHING_DURABLE if previous is None else previous.durable
    before_write()
    with RecordWriter(
        files.predictions, todo.kept.num_bytes, stats.add_write, durable.num_bytes
    ) as writer:
        for part in todo.kept.parts:
            writer.copy(Folders(files.parts, files.parts).path(part.first), part.num_bytes)
        sink = SyncedSink(files, writer, stats, state, todo.done.num_images)
        sink.sync()
        if work is None:
            stats.start(0.0)
            return
        try:
            _classify(begun, todo.done.num_images, work, sink)
        except (Interrupted, ErrorLimitPassed):
            before_write()
            sink.sync()
            raise
        before_write()
        sink.sync()


def _classify(begun: Begun, num_done: int, work: Work, sink: SyncedSink) -> None:
    files, listing = begun.run.files, begun.listing
    first, last = files.shard.bounds(listing.num_images)
    if work.crew is None:
        classify(work, listing.refs(first + num_done, last), sink)
        return
    folders = work.crew.folders
    folders.make_parts()
    found = list(find_parts(files, listing, first + num_done))
    for part in found:
        work.stats.resume(part.num_ok, part.errors_by_code)
    if found:
        num_there = sum(part.num_images for part in found)
        work.reporter.log(f"{num_there:,} more images have a record in {folders.parts}")
    gaps = gaps_between(first + num_done, last, [(part.first, part.stop) for part in found])
    collect(work, Gaps(listing, gaps, first), folders, sink, found)
