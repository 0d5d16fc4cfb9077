"""The parent's side: watch a worker, and start another in its place when it dies or hangs.

What to do otherwise then, run/recovery.py tells.
"""

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from batchclf.engines.display import Display
from batchclf.engines.local.board import Board, Seen
from batchclf.engines.local.messages import Message, ServeSetup, Setup
from batchclf.engines.local.process import WorkerProcess, Workers
from batchclf.engines.local.signals import STOP_SIGNALS
from batchclf.errors import BatchclfError, DeviceLost, OutOfMemory, ProcessLost, WorkerFailed
from batchclf.images.archives.listing import Archive
from batchclf.results.records import Failure, Stretch
from batchclf.run.recovery import Beginning, Death, Progress, Recovery, recover
from batchclf.spec.job import JobSpec
from batchclf.system.children import how_it_ended
from batchclf.system.interrupt import StopRequest

TICK_S = 0.1
LOOK_S = 0.5
"""How often the worker's progress is looked at."""
DRAIN_S = 5.5
"""Seconds that a worker has to end after a signal; 8 are promised."""
BUSY_SHARE = 0.5
"""Of one core: a worker that uses more of it is busy."""
BUSY_FACTOR = 10
"""How much longer than an idle one a busy worker may go without progress."""
_FIGURES = ("live", "figures")
"""Words that come every second, whether there is progress or not."""
_FORWARDED = {counts_as: number for number, counts_as in STOP_SIGNALS.items()}


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker gave back in the end."""

    value: object


class Watcher:
    """Has one thing done in a worker, and in others after it; what that is, a subclass tells."""

    def __init__(
        self, workers: Workers, display: Display, stop: StopRequest, drain_s: float = DRAIN_S
    ) -> None:
        self._workers = workers
        self._display = display
        self._stop = stop
        self._drain_s = drain_s
        self._board = Board(workers.board_descriptor)
        self._beginning: Beginning | None = None
        self._guilty: dict[bytes | Stretch, Failure] = {}
        self._listing: Archive | None = None
        """What this worker lists."""
        self._unlistable: dict[Archive, Failure] = {}

    # ---- for subclasses --------------------------------------------------------------------------

    def _setup(self, recovery: Recovery) -> Setup | ServeSetup:
        """What the next worker is told to do."""
        raise NotImplementedError

    def _look(self) -> None:
        """Done some times a second while a worker is at work; what it raises ends that."""

    @property
    def _is_classifying(self) -> bool:
        """Whether this worker has images left to classify; before and after it does other work."""
        raise NotImplementedError

    def _run(self, job: JobSpec) -> object:
        """Have it done; what the worker gave back.

        Raises:
            BatchclfError: what a worker said, or going on did not help.
        """
        recovery = Recovery()
        while True:
            self._workers.current.send(self._setup(recovery))
            ended = self._ended(job)
            if isinstance(ended, Result):
                return ended.value
            recovery, what = recover(recovery, ended, self._progress)
            self._display.log(what)
            self._stop.raise_if_requested()
            self._workers.kill()
            self._board.clear()
            self._listing = None
            self._workers.replace()

    def _ended(self, job: JobSpec) -> Result | Death | OutOfMemory:
        try:
            return self._watch(job)
        except OutOfMemory as error:
            return error

    @property
    def _progress(self) -> Progress:
        return Progress(self._board.num_images, self._guilty, self._beginning, self._unlistable)

    # ---- watching --------------------------------------------------------------------------------

    def _watch(self, job: JobSpec) -> Result | Death:
        """Follow the worker to its end.

        Raises:
            BatchclfError: what the worker said, or what `_look` found.
        """
        worker = self._workers.current
        pulse = _Pulse(self._board, worker, job)
        ends_at = None
        while True:
            message = worker.receive(TICK_S)
            if message is not None:
                if message[0] not in _FIGURES:
                    pulse.beat()
                ending = self._heard(message)
                if ending is not None:
                    self._look()
                    worker.end()
                    return ending
            elif worker.has_hung_up:
                return self._after_hanging_up(worker)
            self._look()
            if self._stop.signal_number is not None:
                if ends_at is None:
                    ends_at = time.monotonic() + self._drain_s
                    worker.signal(_FORWARDED[signal.Signals(self._stop.signal_number)])
                elif time.monotonic() > ends_at:
                    self._display.log("what was in flight did not end in time, and is dropped")
                    self._stop.raise_if_requested()
            elif (death := pulse.look(self._is_classifying)) is not None:
                self._display.log(f"the worker {death.cause}; these are its threads' stacks:")
                worker.dump_stacks()
                return replace(death, listing=self._listing)

    def _heard(self, message: Message) -> Result | Death | None:
        """Take a message in; what a worker ends with."""
        word, what = message
        match word:
            case "log":
                self._display.log(cast(str, what))
            case "guilty":
                guilty, failure = cast(tuple[bytes | Stretch, Failure], what)
                self._guilty[guilty] = failure
            case "listing":
                self._listing = cast(Archive | None, what)
            case "unlistable":
                archive, failure = cast(tuple[Archive, Failure], what)
                self._unlistable[archive] = failure
            case "result":
                return Result(what)
            case "bug":
                raise WorkerFailed(f"unexpected failure:\n{what}")
            case "error":
                if isinstance(what, ProcessLost):
                    return self._after_losing(what)
                if isinstance(what, DeviceLost):
                    return Death(f"lost its device ({what})", by_device=True)
                raise cast(BatchclfError, what)
        return None

    def _after_losing(self, lost: ProcessLost) -> Death:
        """The end of the process of a device: for what its threads were at, or for the device."""
        seen = [one for one in self._board.in_flight() if one.thread in lost.threads]
        death = _death(f"lost a process ({lost})", seen)
        return replace(death, by_kernel=lost.is_killed, by_device=not seen)

    def _after_hanging_up(self, worker: "WorkerProcess") -> Death:
        returncode = worker.end()
        self._stop.raise_if_requested()
        if returncode is None:
            return Death("closed its connection and did not end")
        death = _death(f"ended ({how_it_ended(returncode)})", self._board.in_flight())
        by_kernel = returncode == -signal.SIGKILL
        return replace(death, by_kernel=by_kernel, listing=self._listing)


def _death(cause: str, seen: Iterable[Seen]) -> Death:
    """The end of a worker over one of the images that its threads were at."""
    at = {(one.image, one.step > 0) for one in seen}
    readers = tuple(sorted(index for index, is_reading in at if is_reading))
    loaders = {index for index, is_reading in at if not is_reading}
    return Death(cause, tuple(sorted(loaders - set(readers))), readers)


class _Pulse:
    """Tells a worker that hangs from one that works, by what it shows on the board.

    Time counts only while this process is awake: both may be stopped, as with their machine.
    """

    def __init__(self, board: Board, worker: WorkerProcess, job: JobSpec) -> None:
        self._board = board
        self._worker = worker
        self._max_seconds = job.loader.max_seconds
        self._stall_timeout = job.stall_timeout
        self._awake_s = 0.0
        self._looked_at = time.monotonic()
        self._shown: object = None
        self._since: dict[Seen, float] = {}
        """When each thread was first seen at what it is at."""
        self.beat()

    def beat(self) -> None:
        """The worker showed that it works."""
        self._beat_s = self._awake_s
        self._beat_cpu_s = self._worker.cpu_seconds()

    def look(self, is_classifying: bool) -> Death | None:
        """Look whether the worker hangs; None: it does not, or it is not time to look."""
        gap_s = time.monotonic() - self._looked_at
        if gap_s < LOOK_S:
            return None
        self._looked_at += gap_s
        self._awake_s += min(gap_s, 2 * LOOK_S)
        at = set(self._board.in_flight())
        self._since = {one: self._since.get(one, self._awake_s) for one in at}
        late = [
            one for one, since in self._since.items() if self._awake_s - since > self._max_seconds
        ]
        if late:
            return _death(
                f"has been loading for longer than loader.max_seconds ({self._max_seconds:g} s)",
                late,
            )
        # Otherwise a model is loaded or compiled, or an input listed, which shows as CPU time only.
        progress = (self._board.num_images, at) if is_classifying else self._worker.cpu_seconds()
        shown = (self._board.last_beat, progress)
        if shown != self._shown:
            self._shown = shown
            self.beat()
        if self._awake_s - self._beat_s > self._patience_s():
            return _death(
                f"has made no progress for stall_timeout ({self._stall_timeout:g} s; to be raised "
                "if a batch takes so long)",
                at,
            )
        return None

    def _patience_s(self) -> float:
        """How long to wait for progress: a slow batch is more likely than an endless one."""
        cpu_s = self._worker.cpu_seconds() - self._beat_cpu_s
        is_busy = cpu_s > BUSY_SHARE * (self._awake_s - self._beat_s)
        return self._stall_timeout * (BUSY_FACTOR if is_busy else 1)
