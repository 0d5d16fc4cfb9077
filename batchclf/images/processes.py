"""Decoding in processes of their own, where one interpreter lock cannot feed the accelerator.

Pixels lie in memory that all processes share: a memfd, which the size of /dev/shm does not bound.
Through a socket go only the paths of a few images and what became of them.

A process may die of an image, or never come back from it: another takes its place, and the image is
tried once more, alone. If that process ends too, the image is guilty, and becomes a failure.

Array shapes: N rows of all batches together, H rows, W columns, C = 3 (RGB).
"""

import math
import mmap
import os
import select
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import BinaryIO

import numpy as np

from batchclf.children import (
    available_memory,
    end_with_parent,
    expendable,
    how_it_ended,
    limit_memory,
    signals_held,
    start_python,
)
from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.images.decode import OUT_OF_MEMORY
from batchclf.images.prefetch import Allocate, Decoding, Load, threads, zeroed_pixels
from batchclf.results.records import DecodeBackend, Failure, ImageRef, Loaded, Pixels

MAX_ROWS = 8
"""Images per message: a message costs the parent as much as one image would cost it in a thread."""
MEMORY_SHARE = 0.8
"""Of the memory that is available at the start, what one process may use."""
BEAT_S = 1.0
STARTS = 3
"""Processes that are started in a row before one that is ready; the OOM killer takes them first."""
END_S = 5.0
"""Seconds a killed process may take to end; one that is stuck in the kernel is left behind."""
Beat = Callable[[], None]
"""Told that there is progress, though no image is finished: a process was ended over one."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The parent drains, and ends the processes."""


@contextmanager
def open_decoding(
    load: Load,
    backend: DecodeBackend,
    num_workers: int,
    *,
    num_slots: int,
    batch_shape: tuple[int, int, int, int],
    max_seconds: float,
    allocate: Allocate = zeroed_pixels,
    beat: Beat = lambda: None,
) -> Iterator[Decoding]:
    """Workers of either kind, for `num_slots` batches of `batch_shape` (NHWC).

    `allocate` makes the batches of threads; processes have memory of their own to share. An image
    that keeps a process for longer than `max_seconds`, or ends it, twice, is a failure; threads
    cannot be ended. `beat` is called by worker threads, every second that an image takes.

    Raises:
        EnvironmentFailed: the processes, or their memory, are not to be had.
    """
    if backend == "threads":
        yield threads(load, num_workers, allocate)
        return
    try:
        processes = DecodeProcesses(
            load,
            num_workers,
            num_slots=num_slots,
            batch_shape=batch_shape,
            max_seconds=max_seconds,
            beat=beat,
        )
    except OSError as error:
        raise EnvironmentFailed(
            f"{num_workers} decoding processes with {num_slots} batches of "
            f"{math.prod(batch_shape):,} bytes cannot be started: {error}; choose a smaller "
            "batch_size or loader.workers, or loader.backend: threads"
        ) from error
    with closing(processes):
        yield processes.decoding


class DecodeProcesses:
    """Processes that decode into batches they share with this one, until `close`.

    Each serves one worker thread of a `Prefetcher`, which does nothing but wait for it.
    """

    def __init__(
        self,
        load: Load,
        num_processes: int,
        *,
        num_slots: int,
        batch_shape: tuple[int, int, int, int],
        max_seconds: float,
        beat: Beat = lambda: None,
    ) -> None:
        """Share `num_slots` batches of `batch_shape` (NHWC); the processes start at once.

        `load` is sent to them, so it must pickle. For the rest, see `open_decoding`.

        Raises:
            OSError: no memory, or no process, is to be had.
            EnvironmentFailed: a process died before it was ready, and so did those after it.
        """
        self._shared = _Shared(num_slots * batch_shape[0], batch_shape[1:])
        self._free = list(self._shared.pixels_NHWC.reshape(num_slots, *batch_shape))
        self._processes = _Processes(load, self._shared)
        try:
            self._workers = [
                _Worker(self._processes, self._shared, max_seconds, beat)
                for _ in range(num_processes)
            ]
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        # So many that twice as many messages as processes can be under way.
        num_rows = num_slots * batch_shape[0] // (2 * num_processes)
        self._num_rows = max(1, min(MAX_ROWS, num_rows))

    @property
    def decoding(self) -> Decoding:
        """The processes and their memory, for a prefetcher."""
        return Decoding(
            self._workers,
            self._allocate,
            num_rows=self._num_rows,
            cpu_seconds=self._cpu_seconds,
            abandon=self._processes.kill,
        )

    def _allocate(self, shape: Sequence[int]) -> Pixels:
        batch_NHWC: Pixels = self._free.pop()
        assert batch_NHWC.shape == tuple(shape), "the shape that was shared"
        return batch_NHWC

    def _cpu_seconds(self) -> float:
        """As of their last messages."""
        return sum(worker.cpu_s for worker in self._workers)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._processes.close()
        self._shared.close()


class _Shared:
    """Memory for images (uint8, NHWC) that other processes can map."""

    def __init__(self, num_images: int, image_shape: tuple[int, ...]) -> None:
        self.image_shape = image_shape
        self._file = _memory("pixels", num_images * math.prod(image_shape))
        self.descriptor = self._file.fileno()
        try:
            self.pixels_NHWC = _pixels(self.descriptor, image_shape)
        except OSError:
            self._file.close()
            raise

    def row_of(self, rows_NHWC: Pixels) -> int:
        """Which row of all a part of them begins with."""
        num_bytes = _address(rows_NHWC) - _address(self.pixels_NHWC)
        return num_bytes // math.prod(self.image_shape)

    def close(self) -> None:
        """Let no further process map it; the array lives on."""
        self._file.close()


class _Worker:
    """What one thread decodes with: a process, and when that ends, the next one."""

    def __init__(
        self, processes: "_Processes", shared: _Shared, max_seconds: float, beat: Beat
    ) -> None:
        self._processes = processes
        self._shared = shared
        self._max_seconds = max_seconds
        self._beat = beat
        self._process: _Process | None = processes.start()
        self.cpu_s = 0.0
        """CPU seconds that decoding took, as of the last message."""

    def __call__(self, refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        """Have `refs` decoded into `rows_NHWC`, a part of the shared memory.

        Raises:
            EnvironmentFailed: no process can be started any more, or none gets ready.
            BatchclfError: what the process met that is no image's fault.
            RuntimeError: the traceback of a bug.
        """
        if not refs:
            return ()
        try:
            return self.ask(refs, rows_NHWC)
        except _Ended as ended:
            at = ended.at
        return [
            *self(refs[:at], rows_NHWC[:at]),
            self._once_more(refs[at : at + 1], rows_NHWC[at : at + 1]),
            *self(refs[at + 1 :], rows_NHWC[at + 1 :]),
        ]

    def _once_more(self, suspects: Sequence[ImageRef], rows_NHWC: Pixels) -> Loaded:
        """Try one image alone: perhaps it was others, or somebody, who ended its process."""
        try:
            (loaded,) = self.ask(suspects, rows_NHWC)
        except _Ended as ended:
            rows_NHWC[:] = 0
            return Loaded(ended.failure)
        return loaded

    def ask(self, refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        """The same, but for images that end the process.

        Raises:
            _Ended: the process died, or took too long for an image; another will take its place.
        """
        process = self.wait_until_ready()
        try:
            first = self._shared.row_of(rows_NHWC)
            loaded, cpu_s = process.ask(first, refs, self._max_seconds, self._beat)
        except _Ended:
            self._process = None
            self._processes.end(process)
            raise
        self.cpu_s += cpu_s
        return loaded

    def wait_until_ready(self) -> "_Process":
        """Its process, when that has imported what it needs; others in place of those that die.

        Raises:
            EnvironmentFailed: it died, and so did those after it, or none can be started any more.
        """
        how = ""
        for _ in range(STARTS):
            process = self._process = self._process or self._next()
            try:
                process.wait_until_ready()
            except _NeverReady as error:
                how = str(error)
                self._process = None
                self._processes.end(process)
            else:
                return process
        raise EnvironmentFailed(
            f"a decoding process ended before it began, {STARTS} times: {how}; choose fewer "
            "loader.workers, or loader.backend: threads, and run again to resume"
        )

    def _next(self) -> "_Process":
        try:
            return self._processes.start()
        except OSError as error:
            raise EnvironmentFailed(
                f"no further decoding process can be started: {error}; run again to resume"
            ) from error


class _Processes:
    """The processes that are alive; when they are killed, no other is started."""

    def __init__(self, load: Load, shared: _Shared) -> None:
        # The same for those that are started later, while others may be at a large image.
        self._make = partial(_Process, load, shared, _memory_limit())
        # The kernel ends processes with the thread that started them: this one outlives them.
        self._starter = ThreadPoolExecutor(1, "decode-starter")
        self._alive: set[_Process] = set()
        self._killed = False
        self._changing = threading.Lock()

    def start(self) -> "_Process":
        """One more, which is not ready yet.

        Raises:
            OSError: it is not to be had.
            _Abandoned: they have been killed.
        """
        with self._changing:
            if self._killed:
                raise _Abandoned
            process = self._starter.submit(self._make).result()
            self._alive.add(process)
        return process

    def end(self, process: "_Process") -> None:
        """End one of them."""
        with self._changing:
            self._alive.remove(process)
        process.end()

    def kill(self) -> None:
        """Kill them all, whatever they are at: they keep nothing that anybody needs."""
        with self._changing:
            self._killed = True
            for process in self._alive:
                process.kill()

    def close(self) -> None:
        """Kill them all and wait for their end; nobody may be waiting for them any more."""
        self.kill()
        for process in self._alive:
            process.end()
        self._starter.shutdown()


class _Ended(Exception):
    """A process ended over its images, or had to be; leaves this module only as a `Failure`.

    `at` is the number of the image, among those that it had been given, that it was at.
    """

    def __init__(self, failure: Failure, at: int) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.at = at


class _Abandoned(Exception):
    """The processes were killed, for nobody wants them any more: ends the thread that still does.

    `Prefetcher` hands out nothing, and raises nothing, once it has had them killed.
    """


class _NeverReady(Exception):
    """A process died before it was ready; the message says how."""


class _Bookmark:
    """Which image a process is at, in memory that it shares with its parent."""

    def __init__(self, descriptor: int) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("q")

    def begin(self, number: int) -> None:
        """Note that an image begins, by its number among those that were asked for."""
        self._numbers[0] = number

    @property
    def number(self) -> int:
        return self._numbers[0]


class _Process:
    """One process that decodes, asked by one thread at a time."""

    def __init__(self, load: Load, shared: _Shared, max_bytes: int) -> None:
        """Start it; this thread must live as long as it.

        Raises:
            OSError: it is not to be had.
        """
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._answer = select.poll()  # Connection.poll makes one for each message
        self._answer.register(self._connection.fileno(), select.POLLIN)
        self._setup = (load, shared.image_shape, max_bytes)
        self._is_ready = False
        with theirs, _memory("bookmark", mmap.PAGESIZE) as bookmark, signals_held(_SIGNALS):
            descriptors = (theirs.fileno(), shared.descriptor, bookmark.fileno())
            self._bookmark = _Bookmark(bookmark.fileno())
            self._process = start_python(
                f"from {__name__} import serve; serve{(*descriptors, os.getpid())}",
                pass_fds=descriptors,
                # Nothing here computes with BLAS, which starts a thread per core with NumPy.
                env={"OPENBLAS_NUM_THREADS": "1"},
            )

    def wait_until_ready(self) -> None:
        """Wait for the process to have imported what it needs.

        Raises:
            _NeverReady: it died.
        """
        if self._is_ready:
            return
        try:
            self._connection.send(self._setup)
            self._is_ready = self._connection.recv()
        except (EOFError, OSError):
            raise _NeverReady(how_it_ended(self._process.wait())) from None

    def ask(
        self, first: int, refs: Sequence[ImageRef], max_seconds: float, beat: Beat
    ) -> tuple[Sequence[Loaded], float]:
        """What became of `refs`, in the shared rows from `first` on; and the CPU seconds used.

        Raises:
            _Ended: the process died, or took longer than `max_seconds` for an image.
            BatchclfError: what the process met that is no image's fault.
            RuntimeError: the traceback of a bug.
        """
        self._bookmark.begin(0)
        try:
            self._connection.send((first, refs))
            self._wait_for_answer(max_seconds, beat)
            loaded: Sequence[Loaded]
            loaded, cpu_s, failed = self._connection.recv()
        except (EOFError, OSError):
            raise _Ended(_crash(self._process.wait()), self._bookmark.number) from None
        if isinstance(failed, BatchclfError):
            raise failed
        if failed:
            raise RuntimeError(f"in a decoding process:\n{failed}")
        return loaded, cpu_s

    def _wait_for_answer(self, max_seconds: float, beat: Beat) -> None:
        """Wait, looking every step at which image the process is.

        A step counts for what it was to last, however long it was: when all were stopped meanwhile
        (by SIGSTOP, a freezer, a paused machine), the image had no more time than that.

        Raises:
            _Ended: the process took longer than `max_seconds` for an image.
        """
        longest_s = min(BEAT_S, max_seconds / 4)  # so that no stop costs an image all its time
        number, waited_s = 0, 0.0
        while not self._answer.poll(1000 * (step_s := min(longest_s, max_seconds - waited_s))):
            waited_s += step_s
            if (now_at := self._bookmark.number) != number:
                number, waited_s = now_at, 0.0
            elif waited_s >= max_seconds:
                raise _Ended(_timeout(max_seconds), number)
            beat()

    def kill(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._connection.close()


def _timeout(max_seconds: float) -> Failure:
    return Failure(
        "timeout", f"not decoded after {max_seconds:g} s, which is what loader.max_seconds allows"
    )


def _crash(returncode: int) -> Failure:
    how = how_it_ended(returncode)
    if returncode == -signal.SIGKILL:  # not by us
        return Failure("oom", f"the process decoding it was {how}, most likely for want of memory")
    return Failure("decoder_crash", f"the process decoding it ended: {how}")


def try_alone(
    load: Load,
    ref: ImageRef,
    shape_HWC: tuple[int, int, int],
    max_seconds: float,
    beat: Beat = lambda: None,
) -> Failure | None:
    """Load one image in a process of its own, to see whether it would end ours.

    `beat` is called every second that it takes.

    Returns:
        decoder_crash, timeout or oom: it ended that process, kept it longer than `max_seconds`, or
        asked for more memory than there is; None: it does none of that, whatever else is wrong
        with it.

    Raises:
        OSError: no memory, or no process, is to be had.
        EnvironmentFailed: the process died before it was ready, and so did those after it.
        BatchclfError: what the process met that is not the image's fault.
    """
    with closing(_Shared(1, shape_HWC)) as shared, closing(_Processes(load, shared)) as processes:
        worker = _Worker(processes, shared, max_seconds, beat)
        try:
            (loaded,) = worker.ask([ref], shared.pixels_NHWC)
        except _Ended as ended:
            return ended.failure
        except RuntimeError:  # a bug, which shows itself on the ordinary path too
            return None
    failure = loaded.failure
    return failure if failure is not None and failure.code == "oom" else None


def _memory_limit() -> int:
    return int(MEMORY_SHARE * available_memory())


def _memory(name: str, num_bytes: int) -> BinaryIO:
    """Memory to share with other processes, as a file: whoever maps it keeps it when it closes."""
    file = os.fdopen(os.memfd_create(f"batchclf-{name}", os.MFD_CLOEXEC), "r+b", buffering=0)
    try:
        file.truncate(num_bytes)
    except OSError:
        file.close()
        raise
    return file


def _pixels(descriptor: int, image_shape: Sequence[int]) -> Pixels:
    """Shared memory as images."""
    memory = mmap.mmap(descriptor, 0)
    return np.frombuffer(memory, np.uint8).reshape(-1, *image_shape)


def _address(pixels: Pixels) -> int:
    return int(pixels.__array_interface__["data"][0])


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
        pixels_NHWC = _pixels(memory_descriptor, image_shape)
        bookmark = _Bookmark(bookmark_descriptor)
        connection.send(True)
        cpu_s = time.process_time()
        while True:
            first, refs = connection.recv()
            loaded, failed = _load(load, refs, pixels_NHWC[first : first + len(refs)], bookmark)
            before_s, cpu_s = cpu_s, time.process_time()
            connection.send((loaded, cpu_s - before_s, failed))


def _load(
    load: Load, refs: Sequence[ImageRef], rows_NHWC: Pixels, bookmark: _Bookmark
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
