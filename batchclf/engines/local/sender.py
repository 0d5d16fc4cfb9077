"""Sends to a bucket what a job writes, from a thread, while the job runs."""

import math
import threading
import time
from types import TracebackType

from batchclf.engines.display import Display
from batchclf.results.mirror import Mirror
from batchclf.system.interrupt import StopRequest

PART_S = 30.0
"""Seconds between parts: a crash of the machine costs as much work."""
LOOK_S = 0.25
LAST_S = 60.0
LAST_STOPPED_S = 1.0
"""Seconds that the last part may take to be sent after an error, and after a signal."""


class Sender:
    """Keeps a mirror up to date; use as a context manager around the run.

    All that may take long is done in its thread, so that a signal is seen meanwhile.
    """

    def __init__(self, mirror: Mirror, display: Display, stop: StopRequest) -> None:
        self._mirror = mirror
        self._display = display
        self._stop = stop
        self._failure: BaseException | None = None
        self._has_pulled = threading.Event()
        self._ended = threading.Event()
        self._is_complete = False
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        try:
            while not self._has_pulled.wait(LOOK_S):
                self._stop.raise_if_requested()
            self.check()
        except BaseException:
            self._ended.set()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(LAST_S if self._stop.signal_number is None else LAST_STOPPED_S)
        if self._thread.is_alive():
            self._display.log("output: the last records are not sent in time; they are made again")
        elif self._failure is not None and self._failure is not error:
            self._display.log(f"the last records are not sent, and are made again: {self._failure}")

    def check(self) -> None:
        """Make sure that what was sent has arrived.

        Raises:
            BatchclfError: as `Mirror.push`.
        """
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Send all that is left of a complete job, until it is there.

        Raises:
            BatchclfError: as `Mirror.finish`.
            Interrupted: a signal came meanwhile.
        """
        self._is_complete = True
        self._ended.set()
        while self._thread.is_alive():
            self._thread.join(LOOK_S)
            self._stop.raise_if_requested()
        self.check()

    def _work(self) -> None:
        try:
            self._mirror.pull()
            self._has_pulled.set()
            sent_at = -math.inf
            while not self._ended.wait(LOOK_S):
                # Soon after the beginning, so that others see whose the output is.
                if time.monotonic() - sent_at >= PART_S and self._mirror.push():
                    sent_at = time.monotonic()
            if self._is_complete:
                self._mirror.finish()
            else:
                self._mirror.push(is_over=True)
        except BaseException as error:  # noqa: BLE001 - `check` raises it
            self._failure = error
            self._has_pulled.set()
