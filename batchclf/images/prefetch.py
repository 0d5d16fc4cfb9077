"""Ordered, bounded prefetch: worker threads decode images straight into preallocated batches.

All memory for pixels is allocated at the start, as a few batches. A batch is lent to the consumer
and comes back with `release`; while none is free, the workers wait. So memory is bounded by the
number of those batches, whatever the number of images.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import starmap
from types import TracebackType

import numpy as np

from batchclf.images.watch import Watch
from batchclf.results.records import Batch, ImageRef, Loaded, Pixels

Allocate = Callable[[Sequence[int]], Pixels]
"""Makes zeroed memory of the given shape, uint8."""
Lock = Callable[[Pixels], AbstractContextManager[object]]
"""Prepares memory that processes share for the device, as long as its block lasts."""
Load = Callable[[ImageRef, Pixels], Loaded]
"""Reads one image into one slot (uint8, shape HWC); a bad image is a returned failure."""
LoadRows = Callable[[Sequence[ImageRef], Pixels], Sequence[Loaded]]
"""Reads some images into as many rows of a batch (uint8, shape NHWC)."""


def zeroed_pixels(shape: Sequence[int]) -> Pixels:
    """Ordinary memory."""
    return np.zeros(shape, np.uint8)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How memory for pixels is had, as the device that takes them likes it best."""

    allocate: Allocate = zeroed_pixels
    lock: Lock = nullcontext


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory for pixels: so many batches of one shape, and how it is had."""

    num_batches: int
    batch_shape: tuple[int, int, int, int]
    """NHWC."""
    host: HostMemory = HostMemory()

    def batches(self) -> list[Pixels]:
        """The batches, allocated now."""
        return list(self.host.allocate((self.num_batches, *self.batch_shape)))


@dataclass(frozen=True, slots=True)
class Decoding:
    """What decodes, and where to."""

    workers: Sequence[LoadRows]
    """One function per worker thread."""
    batches: Sequence[Pixels]
    """Memory that the workers can reach, uint8 NHWC."""
    num_rows: int = 1
    """Images that a worker is given at once, at most."""
    cpu_seconds: Callable[[], float] = lambda: 0.0
    """CPU seconds that other processes have used for it."""
    abandon: Callable[[], None] = lambda: None
    """Let workers return at once, whatever they are at: nobody wants it any more."""


def threads(load: Load, num_workers: int, memory: Memory) -> Decoding:
    """Decoding in this process, in one thread per worker."""

    def load_rows(refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        return [load(ref, slot_HWC) for ref, slot_HWC in zip(refs, rows_NHWC, strict=True)]

    return Decoding([load_rows] * num_workers, memory.batches())


def noted(decoding: Decoding, watch: Watch) -> Decoding:
    """The same, its workers noting what they are at. They must be given one image at a time."""

    def noting(number: int, load_rows: LoadRows) -> LoadRows:
        def load_and_note(refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
            with watch.loading(number, refs[0].index):
                return load_rows(refs, rows_NHWC)

        return load_and_note

    return replace(decoding, workers=list(starmap(noting, enumerate(decoding.workers))))


class _Pending:
    """A batch being filled: its rows are handed to the workers, some at a time."""

    def __init__(self, sequence: int, refs: list[ImageRef], pixels_NHWC: Pixels) -> None:
        self.sequence = sequence
        self.refs = refs
        self.pixels_NHWC = pixels_NHWC
        self.loaded: list[Loaded | None] = [None] * len(refs)
        self.num_taken = 0
        self.num_left = len(refs)


class Prefetcher:
    """Batches of decoded images, in the order of `refs`; use as a context manager.

    `next_batch` may be called from several threads; batches are handed out in order.
    """

    def __init__(self, refs: Iterator[ImageRef], decoding: Decoding) -> None:
        self._refs = refs
        self._free = list(decoding.batches)
        self._batch_size = len(self._free[0])
        self._num_rows = decoding.num_rows
        self._abandon = decoding.abandon
        self._pending: deque[_Pending] = deque()
        self._num_batches = 0
        self._closed = False
        self._exhausted = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._work, args=(load,), name=f"decode-{number}", daemon=True)
            for number, load in enumerate(decoding.workers)
        ]

    def __enter__(self) -> "Prefetcher":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._abandon()
        for worker in self._workers:
            worker.join()

    def next_batch(self) -> Batch | None:
        """The next batch in order, waiting for its images; None at the end or after `stop`.

        Raises:
            Exception: what `load` or the listing raised (a bad image raises nothing).
        """
        with self._changed:
            while not self._closed:
                if self._error is not None:
                    raise self._error
                if self._pending and self._pending[0].num_left == 0:
                    finished = _finished(self._pending.popleft())
                    if not self._pending:
                        self._changed.notify_all()  # perhaps the last one: others wait for it
                    return finished
                if self._exhausted and not self._pending:
                    return None
                self._changed.wait()
        return None

    def num_ready(self) -> int:
        """Batches that are decoded and wait to be handed out."""
        with self._changed:
            return sum(pending.num_left == 0 for pending in self._pending)

    def release(self, batch: Batch) -> None:
        """Give a batch's pixels back, for another batch to be decoded into."""
        with self._changed:
            self._free.append(batch.pixels_NHWC)
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out no further batch; what is decoded but not handed out is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- the workers -----------------------------------------------------------------------------

    def _work(self, load: LoadRows) -> None:
        try:
            while (taken := self._take_rows()) is not None:
                pending, rows = taken
                loaded = load(pending.refs[rows], pending.pixels_NHWC[rows])
                self._finish_rows(pending, rows, loaded)
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take_rows(self) -> tuple[_Pending, slice] | None:
        with self._changed:
            while not self._closed and self._error is None:
                if self._pending and self._pending[-1].num_taken < len(self._pending[-1].refs):
                    pending = self._pending[-1]
                    first = pending.num_taken
                    pending.num_taken = min(first + self._num_rows, len(pending.refs))
                    return pending, slice(first, pending.num_taken)
                if self._exhausted:
                    return None
                if self._free:
                    self._begin_batch()
                else:
                    self._changed.wait()
        return None

    def _begin_batch(self) -> None:
        refs: list[ImageRef] = []
        for ref in self._refs:
            refs.append(ref)
            if len(refs) == self._batch_size:
                break
        if len(refs) < self._batch_size:
            self._exhausted = True
            self._changed.notify_all()
        if refs:
            pixels_NHWC = self._free.pop()
            pixels_NHWC[len(refs) :] = 0
            self._pending.append(_Pending(self._num_batches, refs, pixels_NHWC))
            self._num_batches += 1

    def _finish_rows(self, pending: _Pending, rows: slice, loaded: Sequence[Loaded]) -> None:
        with self._changed:
            pending.loaded[rows] = loaded
            pending.num_left -= len(loaded)
            if pending.num_left == 0:
                self._changed.notify_all()


def _finished(pending: _Pending) -> Batch:
    loaded = tuple(one for one in pending.loaded if one is not None)
    return Batch(pending.sequence, tuple(pending.refs), loaded, pending.pixels_NHWC)
