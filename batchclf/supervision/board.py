"""What a worker process lets its parent see at any moment, also after its death: shared memory.

Plain numbers of 8 bytes each, so each is read and written whole; nobody waits for anybody.
"""

import mmap
import os
import time
from collections.abc import Iterator

MAX_THREADS = 1024
"""As many as `loader.workers` may ask for."""
_NUM_IMAGES, _NUM_ERRORS, _RENEWED_NS, _FIRST_SLOT = range(4)
_NUM_NUMBERS = _FIRST_SLOT + MAX_THREADS
_IDLE = 0


class Board:
    """Counts, and the image that each decoding thread is at."""

    def __init__(self, descriptor: int) -> None:
        """Map a descriptor that `new_descriptor` made, in this process or in its parent."""
        self._numbers = memoryview(mmap.mmap(descriptor, 8 * _NUM_NUMBERS)).cast("q")

    @staticmethod
    def new_descriptor() -> int:
        """Memory for one board, all zero; the caller closes it."""
        descriptor = os.memfd_create("batchclf-board", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, 8 * _NUM_NUMBERS)
        return descriptor

    # ---- written by the worker -------------------------------------------------------------------

    def count(self, num_images: int, num_errors: int) -> None:
        """Note how many images have a record, and how many of those are errors."""
        self._numbers[_NUM_IMAGES] = num_images
        self._numbers[_NUM_ERRORS] = num_errors

    def at(self, thread: int, index: int | None) -> None:
        """Note the image, by index in the listing, that a decoding thread begins; None: no one."""
        self._numbers[_FIRST_SLOT + thread] = _IDLE if index is None else index + 1

    def clear(self) -> None:
        """Forget what a dead worker's threads were at; what it counted is in the output."""
        for thread, _ in self.in_flight():
            self.at(thread, None)

    # ---- written by the parent -------------------------------------------------------------------

    def renewed(self) -> None:
        """Note that the output was this job's just now."""
        self._numbers[_RENEWED_NS] = time.monotonic_ns()

    # ---- read by the other -----------------------------------------------------------------------

    @property
    def num_images(self) -> int:
        return self._numbers[_NUM_IMAGES]

    @property
    def num_errors(self) -> int:
        return self._numbers[_NUM_ERRORS]

    @property
    def seconds_since_renewed(self) -> float:
        """How long ago the output was surely this job's."""
        return (time.monotonic_ns() - self._numbers[_RENEWED_NS]) / 1e9

    def in_flight(self) -> Iterator[tuple[int, int]]:
        """Each busy decoding thread and the index of the image that it is at."""
        for thread, number in enumerate(self._numbers[_FIRST_SLOT:]):
            if number != _IDLE:
                yield thread, number - 1
