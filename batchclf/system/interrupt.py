"""SIGINT, SIGTERM, SIGHUP, SIGUSR1: have the job drain, commit and end; a second ends it at once.

SIGHUP comes when a terminal closes or its connection drops; where it is ignored from the start, as
by `nohup`, it stays so. SIGUSR1 is what Slurm sends before the time is up (sbatch --signal); it
counts as SIGTERM. Who asks once may be heard twice: coreutils' `timeout` signals its child and then
the group that this is in.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from batchclf.errors import Interrupted

SIGNALS: Mapping[int, int] = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,
    signal.SIGUSR1: signal.SIGTERM,
}
"""What ends a job, and which signal it counts as."""
REPEAT_S = 1.0
"""Signals within so many seconds of the first are the same request."""
AGAIN_S = 0.01
"""What was raised where Python lets no exception out is raised again after so many seconds."""


def end_at_once() -> None:
    """Let these signals end the process at once, with their exit code: nothing has begun yet.

    An exception of a handler's could be lost instead, or wrapped, wherever the import of a module
    happens to be (in a weak reference's callback, in `__set_name__`), and prints a traceback. To
    the first process of a container the kernel gives no signal that it has no handler for.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def end_as_usual() -> None:
    """Undo `end_at_once`: from here on, Ctrl-C is a KeyboardInterrupt, so that work is tidied up.

    Only a container's first process keeps its handlers for the other signals.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not _end:
            continue
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif os.getpid() != 1:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + SIGNALS[number])


class _StopNow(BaseException):
    """Leaves this module only as `Interrupted`.

    Not an Exception: an exporter's own handlers would swallow it. Not KeyboardInterrupt either:
    where that passes through `exec` of a string, CPython ends by SIGINT whatever is caught later.
    """


class StopRequest:
    """Whether a signal came; while nothing is in flight, it ends the job right away.

    `advice` is what its message says to do then; `signals`, which signals there are, and which one
    each counts as.
    """

    def __init__(
        self,
        advice: str = "run the same command to resume",
        signals: Mapping[int, int] = SIGNALS,
    ) -> None:
        self._advice = advice
        self._signals = signals
        self.signal_number: int | None = None
        self._heard_at = 0.0
        self._in_flight = False
        self._has_stopped = False
        """Whether what was going on was ended by an exception."""
        self._again: threading.Timer | None = None
        """Raises that exception once more: it came out nowhere."""

    @contextmanager
    def drained_by_caller(self) -> Iterator[None]:
        """Within, a signal is only noted: the caller looks, and finishes what is in flight."""
        self.raise_if_requested()
        self._in_flight = True
        try:
            yield
        finally:
            self._in_flight = False

    def request(self, number: int) -> None:
        """Ask for the same as a signal would, from any thread of a caller who drains."""
        self.signal_number = self._signals[number]

    def raise_if_requested(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, self._advice)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._again is not None:
            self._again = None
            if not self._in_flight:
                raise _StopNow
            return
        if self.signal_number is not None:
            if time.monotonic() - self._heard_at > REPEAT_S:
                os._exit(128 + self._signals[number])  # what is written can be resumed
            return
        self._heard_at = time.monotonic()
        self.signal_number = self._signals[number]
        if not self._in_flight:
            self._has_stopped = True
            raise _StopNow

    @contextmanager
    def _raising_again(self) -> Iterator[None]:
        """Within, `_StopNow` is raised again where it was lost, as in a weak reference's callback.

        There, Python prints an exception and goes on.
        """
        usual, main = sys.unraisablehook, threading.get_ident()

        def hook(unraisable: "sys.UnraisableHookArgs") -> None:
            if unraisable.exc_type is not _StopNow:
                usual(unraisable)
                return
            number = next(iter(self._signals))
            self._again = threading.Timer(AGAIN_S, signal.pthread_kill, (main, number))
            self._again.daemon = True
            self._again.start()

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = usual
            if self._again is not None:
                self._again.cancel()

    @contextmanager
    def installed(self, *, is_last: bool = False) -> Iterator["StopRequest"]:
        """Handle the signals within; only the main thread may do so.

        `is_last`: this process ends after the block, so where a signal came, the handlers stay:
        a repeat of it is not to end the process before it has told of the first.

        Raises:
            Interrupted: a signal ended what was going on.
        """
        previous = {
            number: signal.signal(number, self._handle)
            for number in self._signals
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            with self._raising_again():
                yield self
        except BaseException:
            # Whatever comes out after it was raised is its doing: CPython 3.11 wraps what
            # `__set_name__` raises, and pydantic makes an error of its own of it.
            if self._has_stopped:
                self.raise_if_requested()
            raise
        finally:
            if self.signal_number is None or not is_last:
                for number, handler in previous.items():
                    signal.signal(number, handler)
