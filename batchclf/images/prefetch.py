"""Ordered, bounded prefetch: worker threads decode images straight into preallocated batches.

All memory for pixels is allocated at the start: `num_slots` batches. A batch is lent to the
consumer and comes back with `release`; while none is free, the workers wait. So memory is bounded
by the number of slots, whatever the number of images.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np

from batchclf.results.records import Batch, ImageRef, Loaded, Pixels

Allocate = Callable[[Sequence[int]], Pixels]
"""Makes the zeroed memory of one batch, uint8 of the given shape NHWC."""
Load = Callable[[ImageRef, Pixels], Loaded]
"""Reads one image into one slot (uint8, shape HWC); a bad image is a returned failure."""


def zeroed_pixels(shape: Sequence[int]) -> Pixels:
    """A batch in ordinary memory."""
    return np.zeros(shape, np.uint8)


class _Pending:
    """A batch being filled: rows are handed to the workers one by one."""

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

    def __init__(
        self,
        refs: Iterator[ImageRef],
        load: Load,
        *,
        batch_size: int,
        image_shape: tuple[int, int, int],
        num_slots: int,
        num_workers: int,
        allocate: Allocate = zeroed_pixels,
    ) -> None:
        self._refs = refs
        self._load = load
        self._batch_size = batch_size
        # Zeros, so that the padding of a first, short batch is the same on every run.
        self._free = [allocate((batch_size, *image_shape)) for _ in range(num_slots)]
        self._pending: deque[_Pending] = deque()
        self._num_batches = 0
        self._closed = False
        self._exhausted = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
            for number in range(num_workers)
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

    def _work(self) -> None:
        try:
            while (row := self._take_row()) is not None:
                pending, index = row
                loaded = self._load(pending.refs[index], pending.pixels_NHWC[index])
                self._finish_row(pending, index, loaded)
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take_row(self) -> tuple[_Pending, int] | None:
        with self._changed:
            while not self._closed and self._error is None:
                if self._pending and self._pending[-1].num_taken < len(self._pending[-1].refs):
                    pending = self._pending[-1]
                    pending.num_taken += 1
                    return pending, pending.num_taken - 1
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

    def _finish_row(self, pending: _Pending, index: int, loaded: Loaded) -> None:
        with self._changed:
            pending.loaded[index] = loaded
            pending.num_left -= 1
            if pending.num_left == 0:
                self._changed.notify_all()


def _finished(pending: _Pending) -> Batch:
    loaded = tuple(one for one in pending.loaded if one is not None)
    return Batch(pending.sequence, tuple(pending.refs), loaded, pending.pixels_NHWC)
