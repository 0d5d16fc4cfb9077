"""What can only be read from its beginning on, and is asked for almost in order by many threads.

One cursor per archive goes forward, for all threads of a process. What it has just passed is kept
for those that come a little late: a bounded number of bytes. Only who asks for what lies further
back makes it begin again.
"""

import atexit
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import BinaryIO, Generic, NamedTuple, Protocol, TypeVar

from batchclf.results.records import Failure
from batchclf.system.alive import alive, away

KEPT_BYTES = 2**26
MAX_CURSORS = 4
"""At once in a process: the threads are at one archive, or between two."""
MAX_KEPT_BYTES = 2**30 // MAX_CURSORS
"""Kept bytes are doubled, up to so many, when something was asked for just after it was let go."""
_Payload = TypeVar("_Payload", covariant=True)


class Refused(Exception):
    """A file cannot be opened, or not be read at all; whoever asks again tries again."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def required(file: BinaryIO | Failure) -> BinaryIO:
    """A file that was opened.

    Raises:
        Refused: it was not.
    """
    if isinstance(file, Failure):
        raise Refused(file)
    return file


class Chunk(NamedTuple, Generic[_Payload]):
    """Some units, such as bytes or rows, that follow each other."""

    num_units: int
    payload: _Payload | Failure
    """Or why these units cannot be had."""
    num_bytes: int
    """Of memory that it takes."""


class Passage(Protocol[_Payload]):
    """What is read from its beginning on, or from one of several places on."""

    def start_for(self, unit: int) -> int:
        """The last place at or before a unit from which reading can begin."""

    def begin(self, start: int) -> Iterator[Chunk[_Payload]]:
        """What there is from such a place on.

        Raises:
            OSError, Refused: the disk fails, or the file; damage is a chunk with a failure instead.
        """


class Cursor(Generic[_Payload]):
    """A passage, and where one is in it."""

    def __init__(self, passage: Passage[_Payload]) -> None:
        self.passage = passage
        self._kept: deque[tuple[int, Chunk[_Payload]]] = deque()
        self._coming: Iterator[Chunk[_Payload]] = iter(())
        self._position = -1
        """The unit that comes next; negative: it has not begun."""
        self._kept_bytes = 0
        self._may_keep = KEPT_BYTES
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> list[tuple[int, Chunk[_Payload]]]:
        """The chunks with the units `start` to `stop`, each with its first unit; fewer at the end.

        Raises:
            OSError, Refused: as `Passage`; the next call begins again.
        """
        # Neither what lies before nor the wait for other threads is this image's fault.
        with away(), self._lock:
            first = self._kept[0][0] if self._kept else self._position
            if start < first or self._position < self.passage.start_for(start):
                self._restart(start, first)
            try:
                self._go_on(start, stop)
            except BaseException:
                self._position = -1
                self._kept.clear()
                raise
            return [
                (at, chunk)
                for at, chunk in self._kept
                if at < stop and start < at + chunk.num_units
            ]

    def _restart(self, start: int, first: int) -> None:
        if 0 <= first - start <= self._position - first:
            self._may_keep = min(2 * self._may_keep, MAX_KEPT_BYTES)
        self._kept.clear()
        self._kept_bytes = 0
        self._position = self.passage.start_for(start)
        self._coming = self.passage.begin(self._position)

    def _go_on(self, start: int, stop: int) -> None:
        while self._position < stop and (chunk := next(self._coming, None)) is not None:
            alive()
            self._kept.append((self._position, chunk))
            self._kept_bytes += chunk.num_bytes
            self._position += chunk.num_units
            self._let_go(start)

    def _let_go(self, start: int) -> None:
        """Of the oldest, before a unit that is wanted, what is more than may be kept."""
        while self._kept_bytes > self._may_keep:
            at, chunk = self._kept[0]
            if at + chunk.num_units > start:
                return
            self._kept_bytes -= chunk.num_bytes
            self._kept.popleft()


_cursors: OrderedDict[Hashable, Cursor[object]] = OrderedDict()
_looking = threading.Lock()
atexit.register(_cursors.clear)  # so that they close their files while there is an interpreter


def cursor_at(key: Hashable, make: Callable[[], Passage[_Payload]]) -> Cursor[_Payload]:
    """The cursor of this process in a passage, made where there is none.

    Raises:
        Exception: what `make` raises.
    """
    with _looking:
        cursor = _cursors.pop(key, None) or Cursor(make())
        _cursors[key] = cursor
        while len(_cursors) > MAX_CURSORS:
            _cursors.popitem(last=False)
    return cursor  # type: ignore[return-value]  # the key says of what
