"""A process for what may never end, as a call to a file system that hangs.

The kernel ends no process, nor lets its parent see its end, while a thread of its waits in such a
call. So it is made elsewhere, in a process that can be left behind.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EPIPE
from multiprocessing.connection import Connection
from subprocess import Popen, TimeoutExpired
from typing import ParamSpec, TypeVar

from batchclf.system.children import how_it_ended, start_serving
from batchclf.system.interrupt import SIGNALS

TICK_S = 0.05
END_S = 1.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LeftBehind(OSError):
    """What was asked for is not done in time, and the process that was to do it is left behind."""


class NotStarted(OSError):
    """No process is to be had."""


class Ended(OSError):
    """The process has ended over what it was asked for."""


class Apart:
    """One such process, started when it is needed, which does one thing at a time.

    Use as a context manager.
    """

    def __init__(self, end_s: float = END_S) -> None:
        """`end_s`: seconds that it may take to end, with nothing to do; then it is killed."""
        self._end_s = end_s
        self._turn = threading.Lock()
        self._is_left = False
        self._process: Popen[bytes] | None = None
        self._connection: Connection

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._connection.close()
            try:
                self._process.wait(TICK_S if self._is_left else self._end_s)
            except TimeoutExpired:
                self._process.kill()

    def do(
        self, seconds: float, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """What a function of a module's returns there, or raises.

        Raises:
            LeftBehind: it takes longer, or something did before.
            NotStarted: no process is to be had.
            Ended: it died; the next call starts another.
        """
        ends_at = time.monotonic() + seconds
        while not self._turn.acquire(timeout=TICK_S):
            self._require_time(ends_at)
        try:
            self._require_time(ends_at)
            process = self._running()
            try:
                self._connection.send((function, args, kwargs))
                while not self._connection.poll(TICK_S):
                    self._require_time(ends_at)
                has_failed, answer = self._connection.recv()
            except LeftBehind:
                raise
            except (EOFError, OSError) as error:  # before its answer, or in the middle of it
                raise _ended(process) from error
        finally:
            self._turn.release()
        if has_failed:
            raise answer
        result: _T = answer
        return result

    def _running(self) -> Popen[bytes]:
        if self._process is not None:
            if self._process.poll() is None:
                return self._process
            self._connection.close()
        try:
            self._process, self._connection = start_serving(__name__, held=SIGNALS)
        except OSError as error:
            raise NotStarted(error.errno, f"no process is to be had: {error.strerror}") from error
        return self._process

    def _require_time(self, ends_at: float) -> None:
        if self._is_left or time.monotonic() > ends_at:
            self._is_left = True
            if self._process is not None:
                self._process.kill()  # it does no more than the call that it is stuck in
            raise LeftBehind("the file system does not answer")


def _ended(process: Popen[bytes]) -> Ended:
    process.kill()
    how = ""
    with suppress(TimeoutExpired):
        how = f": {how_it_ended(process.wait(END_S))}"
    return Ended(EPIPE, f"the process that was to do it has ended{how}")


def serve(descriptor: int, parent_pid: int) -> None:
    """Do what the parent asks for, until it is gone."""
    with suppress(EOFError, OSError), Connection(descriptor) as connection:
        while True:
            function, args, kwargs = connection.recv()
            try:
                answer = False, function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - raised by who asked
                answer = True, error
            connection.send(answer)
    os._exit(0)
