"""What can only be read from its beginning on, and is asked for almost in order by many threads.

One cursor per archive goes forward, for all threads of a process. What it has just passed is kept
for those that come a little late: a bounded number of bytes. Only who asks for what lies further
back makes it begin again.

Nothing is read that nobody asked for: where reading ends this process, or holds it up, whatever
lies before that place can be had still.
"""

import atexit
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Generic, NamedTuple, Protocol, TypeVar

from batchclf.results.records import Failure
from batchclf.system.alive import Place, TellPlace, away, passing

BEHIND_ALL = 2**62
"""More units than anything has."""
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

    @property
    def kept_bytes(self) -> int:
        """How much is kept at first: the more, the more it costs to begin again."""

    def span_of(self, unit: int) -> Place:
        """The last place at or before a unit from which reading can begin, and the one behind."""

    def size_of(self, unit: int) -> int:
        """How many bytes a unit takes, as far as that is told before it is read."""

    def begin(self, start: int) -> Iterator[Chunk[_Payload]]:
        """What there is from such a place on.

        Raises:
            OSError, Refused: the disk fails, or the file; damage is a chunk with a failure instead.
        """


class Cursor(Generic[_Payload]):
    """A passage, and where one is in it."""

    def __init__(self, make: Callable[[], Passage[_Payload]], may_keep: int = 0) -> None:
        """`make` is called when something is read, and again where it raised something.

        `may_keep`: bytes that another one had to keep, whose readers are now this one's.
        """
        self._make = make
        self._passage: Passage[_Payload] | None = None
        self._kept: deque[tuple[int, Chunk[_Payload]]] = deque()
        self._coming: Iterator[Chunk[_Payload]] = iter(())
        self._position = -1
        """The unit that comes next; negative: it has not begun."""
        self._kept_bytes = 0
        self.may_keep = may_keep
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> list[tuple[int, Chunk[_Payload]]]:
        """The chunks with the units `start` to `stop`, each with its first unit; fewer at the end.

        Raises:
            OSError, Refused: as `Passage`; the next call begins again.
        """
        with self._turn():
            try:
                with passing() as tell:
                    self._reach(start, stop, tell)
                return self._found(start, stop)
            except BaseException:
                self._position = -1
                self._kept.clear()
                raise

    def size_of(self, unit: int) -> int:
        """As `Passage`; none of it is read for that.

        Raises:
            OSError, Refused: as `read`.
        """
        if self._passage is None:
            with self._turn(), passing() as tell:
                self._made(tell)
        return self._made(lambda place: None).size_of(unit)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            with away():  # the wait for other threads is not this image's fault
                self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _made(self, tell: TellPlace) -> Passage[_Payload]:
        if self._passage is None:
            tell(Place(0, BEHIND_ALL))
            self._passage = self._make()
            self.may_keep = max(self.may_keep, self._passage.kept_bytes)
        return self._passage

    def _reach(self, start: int, stop: int, tell: TellPlace) -> None:
        passage = self._made(tell)
        first = self._kept[0][0] if self._kept else self._position
        begin = passage.span_of(start).start
        if start < first or self._position < begin:
            self._restart(passage, begin, is_late=0 <= first - start <= self._position - first)
        self._go_on(passage, start, stop, tell)

    def _restart(self, passage: Passage[_Payload], begin: int, *, is_late: bool) -> None:
        if is_late:
            self.may_keep = min(2 * self.may_keep, MAX_KEPT_BYTES)
        self._kept.clear()
        self._kept_bytes = 0
        self._position = begin
        self._coming = passage.begin(begin)

    def _found(self, start: int, stop: int) -> list[tuple[int, Chunk[_Payload]]]:
        found: list[tuple[int, Chunk[_Payload]]] = []
        for at, chunk in reversed(self._kept):  # what is asked for is near the end
            if at + chunk.num_units <= start:
                break
            if at < stop:
                found.append((at, chunk))
        return found[::-1]

    def _go_on(self, passage: Passage[_Payload], start: int, stop: int, tell: TellPlace) -> None:
        while self._position < stop:
            tell(Place(self._position, passage.span_of(self._position).stop))
            chunk = next(self._coming, None)
            if chunk is None:
                return
            self._kept.append((self._position, chunk))
            self._kept_bytes += chunk.num_bytes
            self._position += chunk.num_units
            self._let_go(start)

    def _let_go(self, start: int) -> None:
        """Of the oldest, before a unit that is wanted, what is more than may be kept."""
        while self._kept_bytes > self.may_keep:
            at, chunk = self._kept[0]
            if at + chunk.num_units > start:
                return
            self._kept_bytes -= chunk.num_bytes
            self._kept.popleft()


_cursors: OrderedDict[Hashable, Cursor[object]] = OrderedDict()
_looking = threading.Lock()
atexit.register(_cursors.clear)  # so that they close their files while there is an interpreter


def cursor_at(key: Hashable, make: Callable[[], Passage[_Payload]]) -> Cursor[_Payload]:
    """The cursor of this process in a passage, which `make` makes where there is none."""
    with _looking:
        cursor = _cursors.pop(key, None)
        if cursor is None:
            cursor = Cursor(make, max((one.may_keep for one in _cursors.values()), default=0))
        _cursors[key] = cursor
        while len(_cursors) > MAX_CURSORS:
            _cursors.popitem(last=False)
    return cursor  # type: ignore[return-value]  # the key says of what
