"""The worker's side: run the job, tell the parent what there is to tell."""

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import batchclf
from batchclf.engines.local.board import Board
from batchclf.engines.local.messages import Message, ServeSetup, Setup
from batchclf.engines.local.signals import DUMP_SIGNAL, STOP_SIGNALS
from batchclf.errors import BatchclfError, DeviceLost, ProviderError
from batchclf.images.archives.listing import Archive
from batchclf.results.lock import LEASE_S
from batchclf.results.parts import Committed
from batchclf.results.records import Failure, Stretch
from batchclf.results.stats import Live, RunStats
from batchclf.run.duty import Attempt, Doubt, Inbox, ServeReporter
from batchclf.runtime.providers import compiled_in
from batchclf.system.alive import watched
from batchclf.system.children import end_with_parent, expendable
from batchclf.system.interrupt import StopRequest

if TYPE_CHECKING:
    from batchclf.sessions.open import Opened

EXPENDABLE = 500
"""Where memory runs out, this process is to go before its parent, and after those that decode."""
FENCE_S = LEASE_S / 2
"""Nothing is written when the output was last known to be this job's so long ago."""


def serve(socket_descriptor: int, board_descriptor: int, parent_pid: int) -> None:
    """Do the one job that the parent sends, and end."""
    end_with_parent(parent_pid)
    expendable(EXPENDABLE)
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    with Connection(socket_descriptor) as connection:
        problem = _import_pipeline()
        try:
            setup: Setup | ServeSetup = connection.recv()
        except EOFError:
            return
        channel = _Channel(connection, Board(board_descriptor))
        connection.send(problem or _run(setup, channel))
    # Native libraries have crashed while being taken down, and there is nothing left to do.
    sys.stderr.flush()
    os._exit(0)


def _import_pipeline() -> Message | None:
    """Import what takes long while the parent does so too; what to tell where that fails.

    Nothing is printed: the parent may find the reason by itself, and can say it better.
    """
    try:
        compiled_in()
        import batchclf.run.job  # noqa: F401
    except ProviderError as error:
        return "error", error
    except Exception:  # noqa: BLE001 - the parent tells of it
        return "bug", traceback.format_exc()
    finally:
        gc.enable()  # it is off from the very first import on (process.py)
    return None


def _run(setup: Setup | ServeSetup, channel: "_Channel") -> Message:
    try:
        with (
            watched(channel.beat),
            StopRequest(signals=STOP_SIGNALS).installed() as stop,
        ):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            done = _do(setup, channel, stop)
    except BatchclfError as error:
        if error.exit_code == BatchclfError.exit_code and not isinstance(error, DeviceLost):
            channel.log(traceback.format_exc())
        return "error", error
    except Exception:  # noqa: BLE001 - the parent tells of it
        return "bug", traceback.format_exc()
    return "result", done


def _do(setup: Setup | ServeSetup, channel: "_Channel", stop: StopRequest) -> object:
    if isinstance(setup, ServeSetup):
        from batchclf.run.serve import serve

        inbox = channel.inbox(setup.attempts)
        serve(setup.duty, inbox, channel, stop, setup.recovery)
        return None
    from batchclf.run.job import run_job
    from batchclf.run.request import Run

    batchclf.STARTED = setup.started
    run = Run(setup.job, setup.options, channel, stop, setup.recovery)
    if setup.job.engine.name == "ray":
        from batchclf.engines.ray.engine import hire

        run = replace(run, hire=hire)
    return run_job(run)


class _Channel(ServeReporter):
    """A `Reporter` to the parent: what it should see at once through the board, words as messages.

    Several threads may report at once.
    """

    def __init__(self, connection: Connection, board: Board) -> None:
        self._connection = connection
        self._board = board
        self._lock = threading.Lock()

    def log(self, text: str) -> None:
        self._send("log", text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        self._board.count(num_done, num_errors)
        self._send("begin", (num_images, num_done, num_errors))

    def update(self, num_images: int, num_errors: int) -> None:
        self._board.count(num_images, num_errors)

    def live(self, live: Live) -> None:
        self._send("live", live)

    def loading(self, thread: int, index: int | None, step: int) -> None:
        self._board.at(thread, index, step)

    def beat(self) -> None:
        self._board.beat()

    def found_guilty(self, guilty: bytes | Stretch, failure: Failure) -> None:
        self._send("guilty", (guilty, failure))

    def listing(self, archive: Archive | None) -> None:
        self._send("listing", archive)

    def found_unlistable(self, archive: Archive, failure: Failure) -> None:
        self._send("unlistable", (archive, failure))

    def opened(self, opened: "Opened", num_streams: int) -> None:
        self._send("opened", (opened, num_streams))

    def committed(self, attempt: Attempt, part: Committed) -> None:
        self._send("committed", (attempt, part))

    def doubts(self, doubt: Doubt) -> None:
        self._send("doubtful", doubt)

    def figures(self, figures: RunStats) -> None:
        self._send("figures", figures)

    def inbox(self, attempts: Sequence[Attempt]) -> Inbox:
        """What the parent sends from now on, behind these."""
        inbox = Inbox(attempts)

        def take_in() -> None:
            attempt: Attempt | None
            while not inbox.has_ended:
                try:
                    attempt = self._connection.recv()
                except (EOFError, OSError):
                    attempt = None
                inbox.put(attempt)
                if attempt is None:
                    return

        threading.Thread(target=take_in, name="inbox", daemon=True).start()
        return inbox

    def before_write(self) -> None:
        while self._board.seconds_since_renewed > FENCE_S:
            time.sleep(0.1)  # until the parent has looked, or ends this process

    def _send(self, word: str, what: object) -> None:
        with self._lock:
            self._connection.send((word, what))
