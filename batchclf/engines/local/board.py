"""What a worker process lets its parent see at any moment, also after its death: shared memory.

Plain numbers of 8 bytes each, so each is read and written whole; nobody waits for anybody.
"""

import mmap
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

MAX_DEVICES = 64
MAX_THREADS = 1024 + 64 * MAX_DEVICES
"""As many as `loader.workers` may ask for, and those that read ahead (`Depth` of images/ahead.py)
in the process of each device.
"""
_NUM_IMAGES, _NUM_ERRORS, _RENEWED_NS, _BEAT_NS, _FIRST_SLOT = range(5)
_FIRST_STEP = _FIRST_SLOT + MAX_THREADS
_NUM_NUMBERS = _FIRST_STEP + MAX_THREADS
_IDLE = 0


class Seen(NamedTuple):
    """What a thread is at."""

    thread: int
    image: int
    """By index in the listing."""
    step: int
    """How many places of an archive it has passed on its way to the image; 0: it has it."""


class Board:
    """Counts, and the image that each thread is at."""

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

    def at(self, thread: int, index: int | None, step: int = 0) -> None:
        """Note the image, by index in the listing, that a thread is at, None: no one; as `Seen`."""
        self._numbers[_FIRST_STEP + thread] = step
        self._numbers[_FIRST_SLOT + thread] = _IDLE if index is None else index + 1

    def beat(self) -> None:
        """Note that all is well, though no count shows it."""
        self._numbers[_BEAT_NS] = _now_ns()

    def clear(self) -> None:
        """Forget what a dead worker's threads were at; what it counted is in the output."""
        for seen in self.in_flight():
            self.at(seen.thread, None)

    # ---- written by the parent -------------------------------------------------------------------

    def renewed(self) -> None:
        """Note that the output was this job's just now."""
        self._numbers[_RENEWED_NS] = _now_ns()

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
        return (_now_ns() - self._numbers[_RENEWED_NS]) / 1e9

    @property
    def last_beat(self) -> int:
        """Another number after each `beat`."""
        return self._numbers[_BEAT_NS]

    def in_flight(self) -> Iterator[Seen]:
        """What each busy thread is at."""
        for thread, number in enumerate(self._numbers[_FIRST_SLOT:_FIRST_STEP]):
            if number != _IDLE:
                yield Seen(thread, number - 1, self._numbers[_FIRST_STEP + thread])


def _now_ns() -> int:
    """A clock of all processes that goes on while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
