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
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np

from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.images.prefetch import Allocate, Decoding, Load, threads, zeroed_pixels
from batchclf.results.records import DecodeBackend, ImageRef, Loaded, Pixels

ROWS_PER_MESSAGE = 8
"""Images per message: a message costs the parent as much as one image would cost it in a thread."""


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
    with processes:
        yield processes.decoding


class DecodeProcesses:
    """Processes that decode into batches they share with this one; use as a context manager.

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
        """
        num_bytes = num_slots * math.prod(batch_shape)
        descriptor = os.memfd_create("batchclf-pixels", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, num_bytes)
            self._pixels_NHWC = _pixels(descriptor, batch_shape[1:])
            self._free = list(self._pixels_NHWC.reshape(num_slots, *batch_shape))
            self._workers = [
                _Worker(self._pixels_NHWC, load, descriptor) for _ in range(num_processes)
            ]
        finally:
            os.close(descriptor)

    @property
    def decoding(self) -> Decoding:
        """The processes and their memory, for a prefetcher."""
        return Decoding(
            self._workers,
            self._allocate,
            num_rows=ROWS_PER_MESSAGE,
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

    def __enter__(self) -> "DecodeProcesses":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()
        for worker in self._workers:
            worker.wait()


class _Worker:
    """One process, asked by one thread."""

    def __init__(self, pixels_NHWC: Pixels, load: Load, descriptor: int) -> None:
        self._pixels_NHWC = pixels_NHWC
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this very module
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), descriptor),
            )
        self._connection = Connection(ours.detach())
        self._connection.send((load, pixels_NHWC.shape[1:]))
        self.cpu_s = 0.0

    def __call__(self, refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        """Have the process decode `refs` into `rows_NHWC`, a part of the shared memory.

        Raises:
            BatchclfError: the process died.
        """
        first = (_address(rows_NHWC) - _address(self._pixels_NHWC)) // rows_NHWC[0].nbytes
        try:
            self._connection.send((first, refs))
            loaded: Sequence[Loaded]
            loaded, self.cpu_s, failed = self._connection.recv()
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


def serve(connection: Connection, descriptor: int) -> None:
    """Decode what the parent asks for, until it hangs up or dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent drains, and hangs up then
    load, image_shape = connection.recv()
    pixels_NHWC = _pixels(descriptor, image_shape)
    os.close(descriptor)
    while True:
        try:
            first, refs = connection.recv()
        except EOFError:
            return
        loaded, failed = [], ""
        try:
            loaded = [load(ref, pixels_NHWC[first + row]) for row, ref in enumerate(refs)]
        except Exception:  # noqa: BLE001 - the parent raises it
            failed = traceback.format_exc()
        try:
            connection.send((loaded, time.process_time(), failed))
        except BrokenPipeError:  # the parent is gone
            return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
