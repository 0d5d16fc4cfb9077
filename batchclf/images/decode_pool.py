"""Decoding in processes of their own, where one interpreter lock cannot feed the accelerator.

Pixels lie in memory that all of them share (shared.py); decode_process.py has both ends of one.

A process may die of an image, or never come back from it: another takes its place, and the image is
tried once more, alone. If that process ends too, the image is guilty, and becomes a failure.

Array shapes: N rows of all batches together, H rows, W columns, C = 3 (RGB).
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from batchclf.errors import EnvironmentFailed
from batchclf.images.decode_process import Beat, Ended, NeverReady, Process
from batchclf.images.prefetch import Decoding, Load, Memory, threads
from batchclf.images.shared import SharedPixels
from batchclf.results.records import DecodeBackend, Failure, ImageRef, Loaded, Pixels
from batchclf.system.alive import Place
from batchclf.system.children import available_memory

HandOver = Callable[[int, Sequence[ImageRef]], AbstractContextManager[Sequence[ImageRef]]]
MAX_ROWS = 8
"""Images per message: a message costs the parent as much as one image would cost it in a thread."""
MEMORY_SHARE = 0.8
"""Of the memory that is available at the start, what one process may use."""
STARTS = 3
"""Processes that are started in a row before one that is ready; the OOM killer takes them first."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How many decode, and how long one image may take (of threads, none can be ended)."""

    num: int
    max_seconds: float
    """An image that keeps a process for longer than this, or ends it, twice, is a failure."""
    beat: Beat = lambda: None
    """Called by the threads that wait for processes, every second that an image takes."""
    hand_over: HandOver = lambda worker, refs: nullcontext(refs)
    """What becomes of images here while a process has them, by a worker's number."""


@contextmanager
def open_decoding(
    load: Load, backend: DecodeBackend, workers: Workers, memory: Memory
) -> Iterator[Decoding]:
    """Workers of either kind; processes share memory of their own, of the size of `memory`.

    Raises:
        EnvironmentFailed: the processes, or their memory, are not to be had.
    """
    if backend == "threads":
        yield threads(load, workers.num, memory)
        return
    try:
        processes = DecodeProcesses(load, workers, memory)
    except OSError as error:
        raise EnvironmentFailed(
            f"{workers.num} decoding processes with {memory.num_batches} batches of "
            f"{math.prod(memory.batch_shape):,} bytes cannot be started: {error}; choose a smaller "
            "batch_size or loader.workers, or loader.backend: threads"
        ) from error
    with closing(processes), memory.host.lock(processes.memory):
        yield processes.decoding


class DecodeProcesses:
    """Processes that decode into batches they share with this one, until `close`.

    Each serves one worker thread of a `Prefetcher`, which does nothing but wait for it.
    """

    def __init__(self, load: Load, workers: Workers, memory: Memory) -> None:
        """Start them at once; `load` is sent to them, so it must pickle.

        Raises:
            OSError: no memory, or no process, is to be had.
            EnvironmentFailed: a process died before it was ready, and so did those after it.
        """
        batch_size, *image_shape = memory.batch_shape
        num_rows = memory.num_batches * batch_size
        self._shared = SharedPixels(num_rows, tuple(image_shape))
        self._batches = list(self._shared.pixels_NHWC.reshape(-1, *memory.batch_shape))
        self._processes = _Processes(load, self._shared)
        try:
            self._workers = [
                _Worker(self._processes, self._shared, workers, number)
                for number in range(workers.num)
            ]
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        # So many that twice as many messages as processes can be under way.
        self._num_rows = max(1, min(MAX_ROWS, num_rows // (2 * workers.num)))

    @property
    def memory(self) -> Pixels:
        """All that they share."""
        return self._shared.pixels_NHWC

    @property
    def decoding(self) -> Decoding:
        """The processes and their memory, for a prefetcher."""
        return Decoding(
            self._workers,
            self._batches,
            num_rows=self._num_rows,
            cpu_seconds=self._cpu_seconds,
            abandon=self._processes.kill,
        )

    def _cpu_seconds(self) -> float:
        """As of their last messages."""
        return sum(worker.cpu_s for worker in self._workers)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._processes.close()
        self._shared.close()


class _Worker:
    """What one thread decodes with: a process, and when that ends, the next one."""

    def __init__(
        self, processes: "_Processes", shared: SharedPixels, workers: Workers, number: int = 0
    ) -> None:
        self._number = number
        self._processes = processes
        self._shared = shared
        self._workers = workers
        self._process: Process | None = processes.start()
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
        except Ended as ended:
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
        except Ended as ended:
            rows_NHWC[:] = 0
            return Loaded(ended.failure)
        return loaded

    def ask(self, refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        """The same, but for images that end the process.

        Raises:
            Ended: the process died, or took too long for an image; another will take its place.
        """
        process = self.wait_until_ready()
        try:
            first = self._shared.row_of(rows_NHWC)
            with self._workers.hand_over(self._number, refs) as handed:
                loaded, cpu_s = process.ask(
                    first, handed, self._workers.max_seconds, self._workers.beat
                )
        except Ended:
            self._process = None
            self._processes.end(process)
            raise
        self.cpu_s += cpu_s
        return loaded

    def wait_until_ready(self) -> Process:
        """Its process, when that has imported what it needs; others in place of those that die.

        Raises:
            EnvironmentFailed: it died, and so did those after it, or none can be started any more.
        """
        how = ""
        for _ in range(STARTS):
            process = self._process = self._process or self._next()
            try:
                process.wait_until_ready()
            except NeverReady as error:
                how = str(error)
                self._process = None
                self._processes.end(process)
            else:
                return process
        raise EnvironmentFailed(
            f"a decoding process ended before it began, {STARTS} times: {how}; choose fewer "
            "loader.workers, or loader.backend: threads, and run again to resume"
        )

    def _next(self) -> Process:
        try:
            return self._processes.start()
        except OSError as error:
            raise EnvironmentFailed(
                f"no further decoding process can be started: {error}; run again to resume"
            ) from error


class _Processes:
    """The processes that are alive; when they are killed, no other is started."""

    def __init__(self, load: Load, shared: SharedPixels) -> None:
        # The same for those that are started later, while others may be at a large image.
        self._make = partial(Process, load, shared, _memory_limit())
        # The kernel ends processes with the thread that started them: this one outlives them.
        self._starter = ThreadPoolExecutor(1, "decode-starter")
        self._alive: set[Process] = set()
        self._killed = False
        self._changing = threading.Lock()

    def start(self) -> Process:
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

    def end(self, process: Process) -> None:
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


class _Abandoned(Exception):
    """The processes were killed, for nobody wants them any more: ends the thread that still does.

    `Prefetcher` hands out nothing, and raises nothing, once it has had them killed.
    """


class Blame(NamedTuple):
    """What an image that was tried alone is guilty of."""

    failure: Failure
    place: Place | None = None
    """Where in its archive; None: it is no fault of the archive's."""


def try_alone(
    load: Load,
    ref: ImageRef,
    shape_HWC: tuple[int, int, int],
    max_seconds: float,
    beat: Beat = lambda: None,
) -> Blame | None:
    """Load one image in a process of its own, to see whether it would end ours.

    `beat` is called every second that it takes.

    Returns:
        decoder_crash, timeout or oom: it ended that process, kept it longer than `max_seconds`, or
        asked for more memory than there is; None: it does none of that, whatever else is wrong
        with it. With the place in its archive where reading did so, if it was reading.

    Raises:
        OSError: no memory, or no process, is to be had.
        EnvironmentFailed: the process died before it was ready, and so did those after it.
        BatchclfError: what the process met that is not the image's fault.
    """
    with (
        closing(SharedPixels(1, shape_HWC)) as shared,
        closing(_Processes(load, shared)) as processes,
    ):
        worker = _Worker(processes, shared, Workers(1, max_seconds, beat))
        try:
            (loaded,) = worker.ask([ref], shared.pixels_NHWC)
            place = worker.wait_until_ready().place
        except Ended as ended:
            return Blame(ended.failure, ended.place)
        except RuntimeError:  # a bug, which shows itself on the ordinary path too
            return None
    failure = loaded.failure
    return Blame(failure, place) if failure is not None and failure.code == "oom" else None


def _memory_limit() -> int:
    return int(MEMORY_SHARE * available_memory())
