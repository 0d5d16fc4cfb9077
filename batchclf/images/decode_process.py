"""One process that decodes, from both of its ends.

Through a socket go the paths of a few images and what became of them; a bookmark, in memory of its
own, says which one the process is at. Pixels lie in memory that is shared with it (shared.py).

Array shapes: H rows, W columns, C = 3 (RGB).
"""

import mmap
import select
import signal
import subprocess
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from batchclf.errors import BatchclfError
from batchclf.images.failures import OUT_OF_MEMORY
from batchclf.images.memory import ask_elsewhere, the_room
from batchclf.images.prefetch import Load
from batchclf.images.shared import SharedPixels, mapped_pixels, shared_memory
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels
from batchclf.system.alive import Place, watched
from batchclf.system.children import (
    end_with_parent,
    expendable,
    how_it_ended,
    limit_memory,
    start_serving,
)

BEAT_S = 1.0
END_S = 5.0
"""Seconds a killed process may take to end; one that is stuck in the kernel is left behind."""
Beat = Callable[[], None]
"""Told that there is progress, though no image is finished: a process was ended over one."""
_NOWHERE = Place(-1, -1)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The parent drains, and ends the processes."""


class Ended(Exception):
    """A process ended over its images, or had to be; `decode_pool.py` makes a `Failure` of it.

    `at` is the number of the image, among those that it had been given, that it was at; `place`,
    where it was reading in passing through its archive, if it was.
    """

    def __init__(self, failure: Failure, at: int, place: Place | None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.at = at
        self.place = place


_Answer = tuple[Sequence[Loaded], float, str | BatchclfError]
"""What became of the images, the CPU seconds, and what failed that is no image's fault."""


class _Turn(NamedTuple):
    """What a process sends before a large image, and behind it, with the number below zero."""

    num_bytes: int
    limit: int


class _ParentsRoom:
    """Where a process that decodes takes its turns: the parent counts them for all."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def take(self, num_bytes: int, limit: int) -> None:
        """Wait until the parent has so much."""
        self._ask(_Turn(num_bytes, limit))

    def give(self, num_bytes: int) -> None:
        """Give it back."""
        self._ask(_Turn(-num_bytes, 0))

    def _ask(self, turn: _Turn) -> None:
        self._connection.send(turn)
        self._connection.recv()


class NeverReady(Exception):
    """A process died before it was ready; the message says how."""


class Bookmark:
    """Which image a process is at, and where in its archive, in memory shared with its parent."""

    def __init__(self, descriptor: int) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("q")

    def begin(self, number: int) -> None:
        """Note that an image begins, by its number among those that were asked for."""
        self._numbers[0] = number
        self.pass_by(None)

    def alive(self) -> None:
        """Note that all is well, as where a far place of an archive is waited for."""
        self._numbers[1] += 1

    def pass_by(self, place: Place | None) -> None:
        """Note where the archive is being read in passing; None: it is not."""
        self.alive()
        self._numbers[2:4] = memoryview(array("q", place or _NOWHERE))

    @property
    def number(self) -> int:
        return self._numbers[0]

    @property
    def progress(self) -> tuple[int, int]:
        """Another one where it got any further."""
        return self._numbers[0], self._numbers[1]

    @property
    def place(self) -> Place | None:
        found = Place(*self._numbers[2:4])
        return None if found == _NOWHERE else found


class Process:
    """One process that decodes, asked by one thread at a time."""

    def __init__(self, load: Load, shared: SharedPixels, max_bytes: int) -> None:
        """Start it; this thread must live as long as it.

        Raises:
            OSError: it is not to be had.
        """
        self._setup = (load, shared.image_shape, max_bytes)
        self._is_ready = False
        with shared_memory("bookmark", mmap.PAGESIZE) as bookmark:
            self._bookmark = Bookmark(bookmark.fileno())
            self._process, self._connection = start_serving(
                __name__,
                *(shared.descriptor, bookmark.fileno()),
                held=_SIGNALS,
                # Nothing here computes with BLAS, which starts a thread per core with NumPy.
                env={"OPENBLAS_NUM_THREADS": "1"},
            )
        self._answer = select.poll()  # Connection.poll makes one for each message
        self._answer.register(self._connection.fileno(), select.POLLIN)

    def wait_until_ready(self) -> None:
        """Wait for the process to have imported what it needs.

        Raises:
            NeverReady: it died.
        """
        if self._is_ready:
            return
        try:
            self._connection.send(self._setup)
            self._is_ready = self._connection.recv()
        except (EOFError, OSError):
            raise NeverReady(how_it_ended(self._process.wait())) from None

    def ask(
        self, first: int, refs: Sequence[ImageRef], max_seconds: float, beat: Beat
    ) -> tuple[Sequence[Loaded], float]:
        """What became of `refs`, in the shared rows from `first` on; and the CPU seconds used.

        Raises:
            Ended: the process died, or took longer than `max_seconds` for an image.
            BatchclfError: what the process met that is no image's fault.
            RuntimeError: the traceback of a bug.
        """
        self._bookmark.begin(0)
        loaded: Sequence[Loaded]
        try:
            self._connection.send((first, refs))
            loaded, cpu_s, failed = self._answer_to_turns(max_seconds, beat)
        except (EOFError, OSError):
            raise self._ended(_crash(self._process.wait(), self._bookmark.place)) from None
        if isinstance(failed, BatchclfError):
            raise failed
        if failed:
            raise RuntimeError(f"in a decoding process:\n{failed}")
        return loaded, cpu_s

    @property
    def place(self) -> Place | None:
        """Where memory ran out while it read the last image in passing, if it did."""
        return self._bookmark.place

    def _answer_to_turns(self, max_seconds: float, beat: Beat) -> _Answer:
        """The answer; until then, this thread takes the turns of the images in its own room.

        However the process ends, they end with this call. Waiting for one is no image's time.
        """
        taken = 0
        try:
            while True:
                self._wait_for_answer(max_seconds, beat)
                message = self._connection.recv()
                if not isinstance(message, _Turn):
                    answer: _Answer = message
                    return answer
                if message.num_bytes > 0:
                    the_room().take(message.num_bytes, message.limit)
                else:
                    the_room().give(-message.num_bytes)
                taken += message.num_bytes
                self._connection.send(True)
        finally:
            if taken:
                the_room().give(taken)

    def _wait_for_answer(self, max_seconds: float, beat: Beat) -> None:
        """Wait, looking every step at which image the process is.

        A step counts for what it was to last, however long it was: when all were stopped meanwhile
        (by SIGSTOP, a freezer, a paused machine), the image had no more time than that.

        Raises:
            Ended: the process took longer than `max_seconds` for an image.
        """
        longest_s = min(BEAT_S, max_seconds / 4)  # so that no stop costs an image all its time
        progress, waited_s = self._bookmark.progress, 0.0
        while not self._answer.poll(1000 * (step_s := min(longest_s, max_seconds - waited_s))):
            waited_s += step_s
            if (now_at := self._bookmark.progress) != progress:
                progress, waited_s = now_at, 0.0
            elif waited_s >= max_seconds:
                raise self._ended(_timeout(max_seconds, self._bookmark.place))
            beat()

    def _ended(self, failure: Failure) -> Ended:
        return Ended(failure, self._bookmark.number, self._bookmark.place)

    def kill(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._connection.close()


def _timeout(max_seconds: float, place: Place | None) -> Failure:
    what = "decoded" if place is None else "read from its archive"
    return Failure(
        "timeout", f"not {what} after {max_seconds:g} s, which is what loader.max_seconds allows"
    )


def _crash(returncode: int, place: Place | None) -> Failure:
    how = how_it_ended(returncode)
    process = f"the process {'decoding it' if place is None else 'reading it from its archive'}"
    if returncode == -signal.SIGKILL:  # not by us
        return Failure("oom", f"{process} was {how}, most likely for want of memory")
    return Failure("decoder_crash", f"{process} ended: {how}")


# ---- in the process ------------------------------------------------------------------------------


def serve(
    socket_descriptor: int, memory_descriptor: int, bookmark_descriptor: int, parent_pid: int
) -> None:
    """Decode what the parent asks for, until it hangs up or dies."""
    end_with_parent(parent_pid)
    expendable(1000)
    with Connection(socket_descriptor) as connection, suppress(EOFError, ConnectionError):
        load, image_shape, max_bytes = connection.recv()
        limit_memory(max_bytes)
        ask_elsewhere(_ParentsRoom(connection))
        pixels_NHWC = mapped_pixels(memory_descriptor, image_shape)
        bookmark = Bookmark(bookmark_descriptor)
        connection.send(True)
        cpu_s = time.process_time()
        while True:
            first, refs = connection.recv()
            with watched(bookmark.alive, tell_place=bookmark.pass_by):
                loaded, failed = _load(load, refs, pixels_NHWC[first : first + len(refs)], bookmark)
            before_s, cpu_s = cpu_s, time.process_time()
            connection.send((loaded, cpu_s - before_s, failed))


def _load(
    load: Load, refs: Sequence[ImageRef], rows_NHWC: Pixels, bookmark: Bookmark
) -> tuple[Sequence[Loaded], str | BatchclfError]:
    """What became of the images, and what is no image's fault: the traceback of a bug, too."""
    loaded: list[Loaded] = []
    try:
        for ref, slot_HWC in zip(refs, rows_NHWC, strict=True):
            bookmark.begin(len(loaded))
            loaded.append(_load_one(load, ref, slot_HWC))
    except BatchclfError as error:
        return (), error
    except Exception:  # noqa: BLE001 - the parent raises it
        return (), traceback.format_exc()
    return loaded, ""


def _load_one(load: Load, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
    try:
        return load(ref, slot_HWC)
    except MemoryError:
        slot_HWC[:] = 0
        return Loaded(Failure("oom", OUT_OF_MEMORY))
