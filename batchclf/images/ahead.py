"""Reading ahead: images that lie far away are on their way before a worker wants them.

Reads begin in the order of the listing, so many at once, while what has come and is not yet taken
fits into a bound; workers take contents, of whatever kind they are (`Decoding`), with their images.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import tee

from batchclf.images.prefetch import Decoding, LoadRows
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels

WAIT_S = 1.0
RECENT = 64
"""Reads, the largest of which tells what those on their way are taken for."""
FIRST_SIZE = 1 << 20
"""What a read is taken for before one has come."""
Beat = Callable[[], None]
Read = Callable[[ImageRef], bytes | Failure]


@dataclass(frozen=True, slots=True)
class Depth:
    """How far to read ahead."""

    num_reads: int = 64
    """On their way, or come and not yet taken."""
    num_bytes: int = 64 << 20
    """The same in bytes; those on their way are taken to be as large as the largest of late, and
    one at least is always on its way."""


@dataclass(frozen=True, slots=True)
class Fetched(ImageRef):
    """An image whose content has come, or why it cannot."""

    content: bytes | Failure = b""


class Abandoned(Exception):
    """Nobody wants what was being waited for any more; ends the thread that still does."""


class ReadAhead:
    """The images of a listing, in their order, read before they are taken; an iterator.

    Several threads may iterate over it and take. Use as a context manager.
    """

    def __init__(
        self,
        read: Read,
        refs: Iterator[ImageRef],
        depth: Depth = Depth(),
        beat: Beat = lambda: None,
    ) -> None:
        self._read = read
        self._depth = depth
        self._beat = beat
        self._to_read, self._to_hand_out = tee(refs)
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._has_come = threading.Condition(self._lock)
        self._come: dict[int, bytes | Failure | BaseException] = {}
        self._num_reading = 0
        self._num_bytes = 0
        self._recent: deque[int] = deque([FIRST_SIZE], RECENT)
        self._error: BaseException | None = None
        self._is_closed = False

    def __enter__(self) -> "ReadAhead":
        for number in range(self._depth.num_reads):
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Let nobody wait any longer; reads under way end when their servers let them."""
        with self._lock:
            self._is_closed = True
            self._come.clear()
            self._has_room.notify_all()
            self._has_come.notify_all()

    def __iter__(self) -> Iterator[ImageRef]:
        return self

    def __next__(self) -> ImageRef:
        with self._lock:
            try:
                return next(self._to_hand_out)
            except StopIteration:
                if self._error is not None:  # met by a reader, which was first to ask
                    raise self._error from None
                raise

    def take(self, ref: ImageRef) -> Fetched:
        """The image with its content, waiting for it; once for each.

        Raises:
            Abandoned: closed meanwhile.
            BatchclfError: what reading it raised.
        """
        with self._lock:
            while ref.index not in self._come:
                if self._is_closed:
                    raise Abandoned
                self._has_come.wait(WAIT_S)
                self._beat()
            content = self._come.pop(ref.index)
            if isinstance(content, bytes):
                self._num_bytes -= len(content)
            self._has_room.notify()
        if isinstance(content, BaseException):
            raise content
        return Fetched(ref.index, ref.path, ref.location, content)

    # ---- the readers -----------------------------------------------------------------------------

    def _work(self) -> None:
        while (ref := self._next()) is not None:
            content: bytes | Failure | BaseException
            try:
                content = self._read(ref)
            except BaseException as error:  # noqa: BLE001 - raised by who takes it
                content = error
            self._put(ref, content)

    def _next(self) -> ImageRef | None:
        """The next image to be read, when there is room for it; None: there is none."""
        with self._lock:
            while not self._may_read():
                if self._is_closed:
                    return None
                self._has_room.wait()
            if self._is_closed or self._error is not None:
                return None
            try:
                ref = next(self._to_read)
            except StopIteration:
                return None
            except BaseException as error:  # noqa: BLE001 - raised by who iterates
                self._error = error
                return None
            self._num_reading += 1
            if self._may_read():
                self._has_room.notify()
            return ref

    def _may_read(self) -> bool:
        num_ahead = self._num_reading + len(self._come)
        on_the_way = (self._num_reading + 1) * max(self._recent)
        fits = self._num_bytes + on_the_way <= self._depth.num_bytes
        return num_ahead == 0 or (num_ahead < self._depth.num_reads and fits)

    def _put(self, ref: ImageRef, content: bytes | Failure | BaseException) -> None:
        with self._lock:
            self._num_reading -= 1
            if self._is_closed:
                return
            self._come[ref.index] = content
            if isinstance(content, bytes):
                self._num_bytes += len(content)
                self._recent.append(len(content))
            self._has_come.notify_all()
            if self._may_read():
                self._has_room.notify()


@contextmanager
def reading_ahead(
    read: Read | None,
    refs: Iterator[ImageRef],
    decoding: Decoding,
    beat: Beat = lambda: None,
) -> Iterator[tuple[Iterator[ImageRef], Decoding]]:
    """The same images and workers, which are given the images' contents; None: they are near.

    What workers that are processes are sent is read here, once: their sockets carry it.
    """
    if read is None:
        yield refs, decoding
        return

    def with_contents(load_rows: LoadRows) -> LoadRows:
        def take_and_load(refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
            return load_rows([ahead.take(ref) for ref in refs], rows_NHWC)

        return take_and_load

    def abandon() -> None:
        ahead.close()
        decoding.abandon()

    with ReadAhead(read, refs, beat=beat) as ahead:
        workers = list(map(with_contents, decoding.workers))
        yield ahead, replace(decoding, workers=workers, abandon=abandon)
