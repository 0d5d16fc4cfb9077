"""Turns for large images, so that what decoders hold at once stays within `loader.max_memory`.

Small images never wait, nor do they take a lock. An image that is larger than the whole limit is
decoded while no other large one is. There is no deadlock: whoever has a turn waits for nobody, and
whoever waits has none.

The room is one for the process, as Pillow's limits are, and a process runs one job. A process that
decodes for another asks for its turns there (decode_process.py), where they end with it.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Protocol

from batchclf.system.alive import away
from batchclf.system.children import available_memory

SMALL_BYTES = 2**25
"""Of an image of 8 megapixels in a JPEG; what needs less does not ask."""
SHARE = 0.25
"""Of the memory that is available when a job begins, what its large images may take together."""


def default_limit() -> int:
    """What large images may take together where a job does not say, in bytes."""
    return int(SHARE * available_memory())


class Room(Protocol):
    """Gives turns."""

    def take(self, num_bytes: int, limit: int) -> None:
        """Wait until so much is free of `limit`, or all of it."""

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""


class SharedRoom:
    """The room of the threads of this process; turns are given in the order of asking."""

    def __init__(self) -> None:
        self._taken = 0
        self._asking: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, num_bytes: int, limit: int) -> None:
        """Wait until so much is free of `limit`, or all of it."""
        turn = object()

        def has_come() -> bool:
            is_free = self._taken + num_bytes <= limit or self._taken == 0
            return self._asking[0] is turn and is_free

        with self._changed:
            self._asking.append(turn)
            try:
                if not has_come():
                    with away():  # an image that waits is not being decoded
                        self._changed.wait_for(has_come)
                self._taken += num_bytes
            finally:
                self._asking.remove(turn)
                self._changed.notify_all()

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._taken -= num_bytes
            self._changed.notify_all()


_room: list[Room] = [SharedRoom()]


def the_room() -> Room:
    """This process's room."""
    return _room[0]


def ask_elsewhere(room: Room) -> None:
    """Let the images of this process take their turns in another room than its own."""
    _room[0] = room


class Claim:
    """What one image takes, until the end of the block."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def __enter__(self) -> "Claim":
        return self

    def __call__(self, num_bytes: int) -> None:
        """Wait for the turn of an image that will hold so many bytes, in all."""
        if num_bytes < SMALL_BYTES or num_bytes <= self._taken:
            return
        self._give_back()  # nobody waits who has a turn
        the_room().take(num_bytes, self._limit)
        self._taken = num_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        if self._taken:
            _return_freed_memory()
            the_room().give(self._taken)
            self._taken = 0


@lru_cache(1)
def _trim() -> Callable[[int], int] | None:
    """The C library's malloc_trim(3); None: it has none, and keeps nothing either."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _return_freed_memory() -> None:
    """Give the system what an image has left: glibc keeps it, for each thread by itself."""
    trim = _trim()
    if trim is not None:
        trim(0)
