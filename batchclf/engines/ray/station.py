"""What a worker on a node is: a thread that watches a process, as the local engine does.

So an image that crashes its decoder costs that image, here as there.
"""

import os
import signal
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from batchclf.engines.local.messages import Message, ServeSetup
from batchclf.engines.local.process import Workers
from batchclf.engines.local.watcher import Result, Watcher
from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.results.parts import Committed
from batchclf.results.stats import RunStats
from batchclf.run.draft import Draft, num_missing
from batchclf.run.duty import Attempt, Doubt, Duty
from batchclf.run.recovery import Death, Recovery
from batchclf.system.interrupt import StopRequest

if TYPE_CHECKING:
    from batchclf.sessions.open import Opened

DRAIN_S = 3.0
"""Seconds that what is in flight may take after a signal: the driver has 8 for all."""
MAX_LINES = 1000


@dataclass(frozen=True, slots=True)
class Look:
    """How a worker does."""

    num_underway: int
    """Images with a record that is in no part yet."""
    num_errors: int
    """Of these; images that are missing count only once they are in a part."""
    figures: RunStats | None
    lines: tuple[str, ...]
    """Said since the last look."""
    number: int
    """Counts up: answers of several threads may arrive in another order."""


class Journal:
    """A `Display` that keeps what is said until somebody asks."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def log(self, text: str) -> None:
        """One line for people."""
        self._lines.append(text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Nothing: the driver knows."""

    def update(self, num_images: int, num_errors: int) -> None:
        """Nothing: the driver looks."""

    def taken(self) -> tuple[str, ...]:
        """What was not taken yet."""
        return tuple(self._lines.popleft() for _ in range(len(self._lines)))


class Station:
    """The worker, from the threads of whoever asks it to do things."""

    def __init__(self, duty: Duty) -> None:
        """Start it; `opened` tells when it can be given ranges."""
        self._journal = Journal()
        self._stop = StopRequest()
        self._duty = duty
        self._watching: _Watching | None = None
        self._num_looks = 0
        self._look_lock = threading.Lock()
        self._lock = threading.Lock()
        self._done: dict[Path, Future[Committed | Doubt | None]] = {}
        self._new: deque[Attempt] = deque()
        self._opened: Future[tuple[Opened, int]] = Future()
        self._end: BaseException | None = None
        self._has_ended = False
        # The worker ends with the thread that started it.
        threading.Thread(target=self._work, name="station", daemon=True).start()

    def opened(self) -> "tuple[Opened, int]":
        """Wait until the sessions are open and proven: what they are, and how many streams.

        Raises:
            BatchclfError: they are not to be had.
        """
        return self._opened.result()

    def do(self, attempt: Attempt) -> Committed | Doubt | None:
        """Have a range classified, and wait until it is committed; None: it was given up.

        A doubt is to be answered by the same attempt, confirmed, or by none.

        Raises:
            BatchclfError: what ended the worker.
        """
        future: Future[Committed | Doubt | None] = Future()
        with self._lock:
            if not self._has_ended:
                self._done[attempt.draft] = future
                self._new.append(attempt)
            elif self._end is not None:
                future.set_exception(self._end)
            else:
                future.set_result(None)
        return future.result()

    def look(self) -> Look:
        """How it does now."""
        with self._look_lock:
            self._num_looks += 1
            watching, lines = self._watching, self._journal.taken()
            if watching is None:
                return Look(0, 0, None, lines, self._num_looks)
            return watching.seen(lines, self._num_looks)

    def stop(self) -> None:
        """Have what is in flight committed, and all else given up."""
        self._stop.request(signal.SIGTERM)

    # ---- in its thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with Workers() as workers, self._stop.drained_by_caller():
                self._watching = _Watching(workers, self._journal, self._stop, self._duty, self)
                self._watching.run()
        except BaseException as found:  # noqa: BLE001 - raised by who waits for it
            error = found
        if self._stop.signal_number is not None:
            error = None
            if self._watching is not None:
                self._watching.commit_what_is_left()
        with self._lock:
            self._has_ended, self._end = True, error
            waiting = list(self._done.values())
            self._done.clear()
        if error is None:
            error = BatchclfError("the worker was stopped")
            for future in waiting:
                future.set_result(None)
        else:
            for future in waiting:
                future.set_exception(error)
        if not self._opened.done():
            self._opened.set_exception(error)

    def has_opened(self, found: "tuple[Opened, int]") -> None:
        """The worker, or one after it, is ready."""
        if not self._opened.done():
            self._opened.set_result(found)

    @property
    def has_been_open(self) -> bool:
        """Whether a process of this worker was ready once."""
        return self._opened.done()

    def new(self) -> list[Attempt]:
        """Ranges that came since."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def has_done(self, attempt: Attempt, found: Committed | Doubt) -> None:
        """A range is committed, or is to be confirmed first."""
        with self._lock:
            future = self._done.pop(attempt.draft, None)
        if future is not None:
            future.set_result(found)


class _Watching(Watcher):
    """Has ranges classified, as they come, in a process and in others after it."""

    def __init__(
        self, workers: Workers, journal: Journal, stop: StopRequest, duty: Duty, station: Station
    ) -> None:
        super().__init__(workers, journal, stop, DRAIN_S)
        self._duty = duty
        self._station = station
        self._attempts: dict[Path, Attempt] = {}
        """Those that are not committed."""
        self._is_open = False
        self._num_committed = self._num_errors = 0
        self._figures: RunStats | None = None

    def run(self) -> None:
        """Until the driver has no more, or asks for an end.

        Raises:
            BatchclfError: as `Watcher._run`.
        """
        self._run(self._duty.job)

    def seen(self, lines: tuple[str, ...], number: int) -> Look:
        """What can be seen of it now."""
        return Look(
            max(0, self._board.num_images - self._num_committed),
            max(0, self._board.num_errors - self._num_errors),
            self._figures,
            lines,
            number,
        )

    def commit_what_is_left(self) -> None:
        """After a signal: commit what the process, which has ended, wrote and had no time to."""
        if self._workers.current.is_left_behind:  # it may write once more
            return
        for attempt in list(self._attempts.values()):
            with suppress(EnvironmentFailed):  # these images are done again after the next start
                if os.path.exists(attempt.draft):
                    draft = Draft(attempt, self._duty.listing)
                    if draft.num_images and not draft.is_doubtful:
                        self._has_committed(attempt, draft.commit())
                    else:
                        draft.give_up()

    def _setup(self, recovery: Recovery) -> ServeSetup:
        self._is_open = False
        duty = self._duty
        if self._station.has_been_open:
            # The input was the driver's; what was removed since is told image by image.
            duty = replace(duty, landmarks=())
        return ServeSetup(duty, recovery, tuple(self._attempts.values()))

    def _look(self) -> None:
        self._board.renewed()
        for attempt in self._station.new():
            self._attempts[attempt.draft] = attempt
            self._workers.current.send(attempt)

    @property
    def _is_classifying(self) -> bool:
        return self._is_open and bool(self._attempts)

    def _heard(self, message: Message) -> Result | Death | None:
        word, what = message
        match word:
            case "opened":
                self._is_open = True
                self._station.has_opened(cast("tuple[Opened, int]", what))
            case "committed":
                self._has_committed(*cast(tuple[Attempt, Committed], what))
            case "doubtful":
                doubt = cast(Doubt, what)
                self._attempts.pop(doubt.attempt.draft, None)
                self._station.has_done(doubt.attempt, doubt)
            case "figures":
                self._figures = cast(RunStats, what)
            case _:
                return super()._heard(message)
        return None

    def _has_committed(self, attempt: Attempt, part: Committed) -> None:
        self._attempts.pop(attempt.draft, None)
        self._num_committed += part.num_images
        self._num_errors += part.errors_by_code.total() - num_missing(part.errors_by_code)
        self._station.has_done(attempt, part)
