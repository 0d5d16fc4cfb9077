"""Reading ahead: images that lie far away are on their way before a worker wants them.

Reads begin in the order of the listing, so many at once, while what has come and is not yet taken
fits into a bound; workers take contents, of whatever kind they are (`Decoding`), with their images.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee

from batchclf.images.prefetch import Decoding, LoadRows
from batchclf.images.room import NoRoom, claiming
from batchclf.images.watch import UNWATCHED, Watch
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels

WAIT_S = 1.0
Read = Callable[[ImageRef], bytes | Failure | None]
"""None: the image lies near, and who loads it reads it."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How far to read ahead."""

    num_reads: int = 64
    """On their way, or come and not yet taken."""
    num_bytes: int = 64 << 20
    """Of the same; only the first of them, which is wanted next, may go beyond."""


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
        watch: Watch = UNWATCHED,
        first_thread: int = 0,
    ) -> None:
        """`first_thread`: what `watch` knows the first reading thread by; the others follow."""
        self._read = read
        self._depth = depth
        self._watch = watch
        self._first_thread = first_thread
        self._to_read, self._to_hand_out = tee(refs)
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._has_bytes = threading.Condition(self._lock)
        self._has_come = threading.Condition(self._lock)
        self._come: dict[int, bytes | Failure | BaseException | None] = {}
        self._held: dict[int, int] = {}
        """The bytes of each that is on its way, as far as it claimed them, or has come; in order.
        """
        self._num_bytes = 0
        self._waiting: set[int] = set()
        """Those on their way for which there was no room."""
        self._error: BaseException | None = None
        self._is_closed = False

    def __enter__(self) -> "ReadAhead":
        for number in range(self._depth.num_reads):
            own = self._first_thread + number
            name = f"read-{number}"
            threading.Thread(target=self._work, args=(own,), name=name, daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Let nobody wait any longer; reads under way end when their servers let them."""
        with self._lock:
            self._is_closed = True
            self._come.clear()
            for waited_for in (self._has_room, self._has_bytes, self._has_come):
                waited_for.notify_all()

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

    def take(self, ref: ImageRef) -> ImageRef:
        """The image with its content, waiting for it; as it is, where it lies near. Once for each.

        Raises:
            Abandoned: closed meanwhile.
            BatchclfError: what reading it raised.
        """
        with self._lock:
            while ref.index not in self._come:
                if self._is_closed:
                    raise Abandoned
                self._has_come.wait(WAIT_S)
                self._watch.beat()
            content = self._come.pop(ref.index)
            self._num_bytes -= self._held.pop(ref.index)
            self._wake()
        if isinstance(content, BaseException):
            raise content
        return ref if content is None else Fetched(ref.index, ref.path, ref.location, content)

    # ---- the readers -----------------------------------------------------------------------------

    def _work(self, own: int) -> None:
        while (ref := self._next()) is not None:
            claim = partial(self._claim, ref.index)
            with claiming(claim), self._watch.reading(own, ref.index):
                content = self._content(ref)
            self._put(ref, content)

    def _content(self, ref: ImageRef) -> bytes | Failure | BaseException | None:
        num_bytes = 0
        while True:
            try:
                if num_bytes:
                    self._wait_for_room(ref.index, num_bytes)
                return self._read(ref)
            except NoRoom as no_room:
                num_bytes = no_room.num_bytes
            except BaseException as error:  # noqa: BLE001 - raised by who takes it
                return error

    def _claim(self, index: int, num_bytes: int) -> None:
        """Hold so many bytes for a read that is under way.

        Raises:
            NoRoom: it must begin again when there is room.
        """
        with self._lock:
            if num_bytes <= self._held[index]:
                return
            if not self._has_room_for(index, num_bytes):
                raise NoRoom(num_bytes)
            self._hold(index, num_bytes)

    def _wait_for_room(self, index: int, num_bytes: int) -> None:
        """Hold so many bytes as soon as there is room; those that are wanted first come first.

        Raises:
            Abandoned: closed meanwhile.
        """
        with self._lock:
            self._hold(index, 0)
            self._waiting.add(index)
            self._wake()
            while not self._is_closed and (
                index > min(self._waiting) or not self._has_room_for(index, num_bytes)
            ):
                self._has_bytes.wait()
            self._waiting.remove(index)
            if self._is_closed:
                raise Abandoned
            self._hold(index, num_bytes)
            self._wake()

    def _has_room_for(self, index: int, num_bytes: int) -> bool:
        """Whether a read may take so much: always the one that is wanted next, lest all wait."""
        is_first = next(iter(self._held)) == index
        others = self._num_bytes - self._held[index]
        return is_first or others + num_bytes <= self._depth.num_bytes

    def _hold(self, index: int, num_bytes: int) -> None:
        self._num_bytes += num_bytes - self._held[index]
        self._held[index] = num_bytes

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
            self._held[ref.index] = 0
            self._wake()
            return ref

    def _may_read(self) -> bool:
        is_full = (
            len(self._held) >= self._depth.num_reads or self._num_bytes >= self._depth.num_bytes
        )
        return not self._held or not (is_full or self._waiting)

    def _wake(self) -> None:
        """Let those go on for whom there may be room now."""
        if self._waiting:
            self._has_bytes.notify_all()
        elif self._may_read():
            self._has_room.notify()

    def _put(self, ref: ImageRef, content: bytes | Failure | BaseException | None) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._come[ref.index] = content
            self._hold(ref.index, len(content) if isinstance(content, bytes) else 0)
            self._has_come.notify_all()
            self._wake()


@contextmanager
def reading_ahead(
    read: Read | None,
    refs: Iterator[ImageRef],
    decoding: Decoding,
    watch: Watch = UNWATCHED,
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

    first_thread = len(decoding.workers)
    with ReadAhead(read, refs, watch=watch, first_thread=first_thread) as ahead:
        workers = list(map(with_contents, decoding.workers))
        yield ahead, replace(decoding, workers=workers, abandon=abandon)
