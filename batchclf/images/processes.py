"""Decoding in processes of their own, where one interpreter lock cannot feed the accelerator.

Pixels lie in memory that all processes share: a memfd, which the size of /dev/shm does not bound.
Through a socket go only the paths of a few images and what became of them.

Array shapes: N rows of all batches together, H rows, W columns, C = 3 (RGB).
"""

import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection

import numpy as np

from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.images.prefetch import Allocate, Decoding, Load, threads, zeroed_pixels
from batchclf.results.records import DecodeBackend, ImageRef, Loaded, Pixels

MAX_ROWS = 8
"""Images per message: a message costs the parent as much as one image would cost it in a thread."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def open_decoding(
    load: Load,
    backend: DecodeBackend,
    num_workers: int,
    *,
    num_slots: int,
    batch_shape: tuple[int, int, int, int],
    allocate: Allocate = zeroed_pixels,
) -> Iterator[Decoding]:
    """Workers of either kind, for `num_slots` batches of `batch_shape` (NHWC).

    `allocate` makes the batches of threads; processes have memory of their own to share.

    Raises:
        EnvironmentFailed: the processes, or their memory, are not to be had.
    """
    if backend == "threads":
        yield threads(load, num_workers, allocate)
        return
    try:
        processes = DecodeProcesses(load, num_workers, num_slots=num_slots, batch_shape=batch_shape)
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
    ) -> None:
        """Share `num_slots` batches of `batch_shape` (NHWC); the processes start at once.

        `load` is sent to them, so it must pickle.

        Raises:
            OSError: no memory, or no process, is to be had.
            BatchclfError: a process died before it was ready.
        """
        num_bytes = num_slots * math.prod(batch_shape)
        descriptor = os.memfd_create("batchclf-pixels", os.MFD_CLOEXEC)
        self._workers: list[_Worker] = []
        try:
            os.ftruncate(descriptor, num_bytes)
            self._pixels_NHWC = _pixels(descriptor, batch_shape[1:])
            self._free = list(self._pixels_NHWC.reshape(num_slots, *batch_shape))
            with _signals_held():
                for _ in range(num_processes):
                    self._workers.append(_Worker(self._pixels_NHWC, load, descriptor))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)
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
            abandon=self._kill,
        )

    def _allocate(self, shape: Sequence[int]) -> Pixels:
        batch_NHWC: Pixels = self._free.pop()
        assert batch_NHWC.shape == tuple(shape), "the shape that was shared"
        return batch_NHWC

    def _cpu_seconds(self) -> float:
        """As of their last messages."""
        return sum(worker.cpu_s for worker in self._workers)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._kill()
        for worker in self._workers:
            worker.wait()


class _Worker:
    """One process, asked by one thread."""

    def __init__(self, pixels_NHWC: Pixels, load: Load, descriptor: int) -> None:
        self._pixels_NHWC = pixels_NHWC
        ours, theirs = socket.socketpair()
        with theirs:
            program = (
                f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
                f"serve({theirs.fileno()}, {descriptor})"
            )
            self._process = subprocess.Popen(  # noqa: S603 - this very module
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), descriptor),
                # Nothing here computes with BLAS, which starts a thread per core with NumPy.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._setup = (load, pixels_NHWC.shape[1:])
        self._idle_cpu_s = self._last_cpu_s = 0.0

    @property
    def cpu_s(self) -> float:
        """CPU seconds used since the process was ready, as of its last message."""
        return self._last_cpu_s - self._idle_cpu_s

    def wait_until_ready(self) -> None:
        """Wait for the process to have imported what it needs.

        Raises:
            BatchclfError: it died.
        """
        try:
            self._connection.send(self._setup)
            self._idle_cpu_s = self._last_cpu_s = self._connection.recv()
        except (EOFError, OSError):
            raise BatchclfError(
                f"a decoding process ended with exit code {self._process.wait()} before it began"
            ) from None

    def __call__(self, refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        """Have the process decode `refs` into `rows_NHWC`, a part of the shared memory.

        Raises:
            BatchclfError: the process died.
        """
        first = (_address(rows_NHWC) - _address(self._pixels_NHWC)) // rows_NHWC[0].nbytes
        try:
            self._connection.send((first, refs))
            loaded: Sequence[Loaded]
            loaded, self._last_cpu_s, failed = self._connection.recv()
        except (EOFError, OSError):
            names = ", ".join(os.fsdecode(ref.path) for ref in refs)
            raise BatchclfError(
                f"a decoding process ended with exit code {self._process.wait()}; it had been "
                f"given {names}. Run again to resume; loader.workers sets how many there are"
            ) from None
        if failed:
            raise RuntimeError(f"in a decoding process:\n{failed}")
        return loaded

    def kill(self) -> None:
        """End the process, whatever it is at: it keeps nothing that anybody needs."""
        self._process.kill()

    def wait(self) -> None:
        """Wait for the end of a killed process."""
        self._process.wait()
        self._connection.close()


def _pixels(descriptor: int, image_shape: Sequence[int]) -> Pixels:
    """The shared memory as images; it stays mapped as long as the array lives."""
    memory = mmap.mmap(descriptor, 0)
    return np.frombuffer(memory, np.uint8).reshape(-1, *image_shape)


def _address(pixels: Pixels) -> int:
    return int(pixels.__array_interface__["data"][0])


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started here never see these signals: the parent drains, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(socket_descriptor: int, memory_descriptor: int) -> None:
    """Decode what the parent asks for, until it hangs up or dies."""
    with Connection(socket_descriptor) as connection, suppress(EOFError, ConnectionError):
        load, image_shape = connection.recv()
        pixels_NHWC = _pixels(memory_descriptor, image_shape)
        connection.send(time.process_time())
        while True:
            first, refs = connection.recv()
            connection.send(_answer(load, refs, pixels_NHWC[first : first + len(refs)]))


def _answer(
    load: Load, refs: Sequence[ImageRef], rows_NHWC: Pixels
) -> tuple[Sequence[Loaded], float, str]:
    """What became of the images, CPU seconds used so far, and the traceback of a bug."""
    loaded: Sequence[Loaded] = ()
    failed = ""
    try:
        loaded = [load(ref, slot_HWC) for ref, slot_HWC in zip(refs, rows_NHWC, strict=True)]
    except Exception:  # noqa: BLE001 - the parent raises it
        failed = traceback.format_exc()
    return loaded, time.process_time(), failed
