"""Turns for large images, so that what decoders hold at once stays within `loader.max_memory`.

Small images never wait, nor do they take a lock. An image that is larger than the whole limit is
read and decoded while no other large one is.

What an image will take comes out bit by bit: its archive tells the size of its content, and that
the size of its pixels. So whoever holds something may ask for more, before all who hold nothing.
There is no deadlock: where all wait who hold something, the first of them is given more, beyond the
limit if need be. As it stays the first until it has given all back, only one is ever beyond.

The room is one for the process, as Pillow's limits are, and a process runs one job. A process that
decodes for another asks for its turns there (decode_process.py), where they end with it.
"""

import ctypes
import threading
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
        """Wait until so much more is free of `limit`, or nobody goes on who could give any back."""

    def give(self, num_bytes: int) -> None:
        """Give back what this thread took."""


class SharedRoom:
    """The room of the threads of this process, each of which has one image at a time.

    Turns are given in the order of asking, to those first that hold something: the longest first.
    """

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        """What each thread holds; in the order in which they began to."""
        self._asking: dict[int, None] = {}
        """The threads that wait, in the order of asking."""
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """What all hold."""
        return sum(self._held.values())

    def take(self, num_bytes: int, limit: int) -> None:
        """As `Room`."""
        own = threading.get_ident()

        def has_come() -> bool:
            holders = [one for one in self._held if one in self._asking]
            if next(iter(holders or self._asking)) != own:
                return False
            return self.taken + num_bytes <= limit or len(holders) == len(self._held)

        with self._changed:
            self._asking[own] = None
            self._changed.notify_all()  # perhaps the last one that could have given any back
            try:
                if not has_come():
                    with away():  # an image that waits is not being decoded
                        self._changed.wait_for(has_come)
                self._held[own] = self._held.get(own, 0) + num_bytes
            finally:
                del self._asking[own]
                self._changed.notify_all()

    def give(self, num_bytes: int) -> None:
        """As `Room`."""
        own = threading.get_ident()
        with self._changed:
            self._held[own] -= num_bytes
            if not self._held[own]:
                del self._held[own]
            self._changed.notify_all()


_room: list[Room] = [SharedRoom()]


def the_room() -> Room:
    """This process's room."""
    return _room[0]


def ask_elsewhere(room: Room) -> None:
    """Let the images of this process take their turns in another room than its own."""
    _room[0] = room


class Claim:
    """What an image takes while it is read and decoded, until the end of the block."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = 0
        self._taken = 0

    def __enter__(self) -> "Claim":
        return self

    def __call__(self, num_bytes: int) -> None:
        """Wait for the turn of what will take so many bytes, in all, beside what is kept."""
        wanted = self._kept + num_bytes
        if wanted < SMALL_BYTES or wanted <= self._taken:
            return
        the_room().take(wanted - self._taken, self._limit)
        self._taken = wanted

    def keep(self, num_bytes: int) -> None:
        """The same of what is there to the end, such as an image's content."""
        self(num_bytes)
        self._kept += num_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._taken:
            _return_freed_memory()
            the_room().give(self._taken)


@lru_cache(1)
def _trim() -> Callable[[int], int] | None:
    """The C library's malloc_trim(3); None: it has none, and keeps nothing either."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _return_freed_memory() -> None:
    """Give the system what an image has left: glibc keeps it, for each thread by itself."""
    trim = _trim()
    if trim is not None:
        trim(0)
