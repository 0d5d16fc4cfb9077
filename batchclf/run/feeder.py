"""The process of one of several GPUs: what feeders.py deals to it, it makes lines of."""

import os
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import starmap
from multiprocessing.connection import Connection
from typing import NamedTuple

from batchclf.errors import BatchclfError
from batchclf.images.ahead import Depth
from batchclf.images.prefetch import HostMemory
from batchclf.results.records import ImageRef
from batchclf.results.stats import StatsCollector
from batchclf.run.blame import explained
from batchclf.run.classify import Work, encoded, flowing, num_batches_of
from batchclf.run.plan import Plan
from batchclf.run.reporter import Reporter
from batchclf.sessions.open import Wanted, open_devices, settle_provider
from batchclf.sessions.sample import Sample
from batchclf.system.children import end_with_parent, expendable
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb

EXPENDABLE = 600
"""Where memory runs out, it is to go before its parent, and after those that decode."""
BEAT_S = 1.0
BUSY_SHARE = 0.05
"""Of a core, while it opens its sessions: then it does not hang."""
Dealt = list[tuple[int, bytes, bytes]]
"""The images of a batch, each as the values of an `ImageRef`: these are pickled much faster."""


class Share(NamedTuple):
    """What a process is to do."""

    plan: Plan
    """Its job has one device."""
    sample: tuple[ImageRef, ...]
    used: str | None
    """As of `Wanted`."""


def serve(socket_descriptor: int, parent_pid: int) -> None:
    """Do one share, batch after batch, until there are no more."""
    end_with_parent(parent_pid)
    expendable(EXPENDABLE)
    with Connection(socket_descriptor) as connection:
        channel = _Channel(connection)
        try:
            _serve(connection.recv(), connection, channel)
        except BatchclfError as error:
            channel.say("error", error)
        except Exception:  # noqa: BLE001 - the parent raises it
            channel.say("bug", traceback.format_exc())
    sys.stderr.flush()
    os._exit(0)  # native libraries have crashed while being taken down


def _serve(share: Share, connection: Connection, channel: "_Channel") -> None:
    plan, task = share.plan, share.plan.task
    sample = Sample(task.job, plan.loader, share.sample, channel.watch)
    wanted = Wanted(task.job, task.model, plan.batch_size, sample, channel.log, share.used)
    with explained(task, plan.batch_size), _beating(channel):
        opened = open_devices(wanted, settle_provider(task.job, channel.log))
    num_streams = len(opened.classifiers)
    # More than there is memory for, and than are read ahead: so nobody waits here for refs, and
    # holds others up, while a batch is unfinished.
    num_read_ahead = -(-Depth().num_reads // plan.batch_size)
    num_ahead = num_batches_of(task.job, num_streams) + num_read_ahead + 1
    told = replace(opened, classifiers=(), memory=HostMemory())
    channel.say("opened", (told, num_streams, num_ahead))
    stats, stop = _Times(), StopRequest()
    work = Work(plan, opened, stats, channel, stop)
    refs = _refs(connection, stop)
    with explained(task, opened.part.num_images), flowing(work, refs) as flow:
        for records in flow:
            if records is not None:
                channel.say("lines", (encoded(records, stats), stats.taken()))


@contextmanager
def _beating(channel: "_Channel") -> Iterator[None]:
    """Within, tell that all is well as long as this process computes: the parent does not."""
    is_over = threading.Event()

    def beat() -> None:
        before_s = cpu_seconds()
        while not is_over.wait(BEAT_S):
            now_s = cpu_seconds()
            if now_s - before_s > BUSY_SHARE * BEAT_S:
                channel.beat()
            before_s = now_s

    beating = threading.Thread(target=beat, name="beat")
    beating.start()
    try:
        yield
    finally:
        is_over.set()
        beating.join()


def _refs(connection: Connection, stop: StopRequest) -> Iterator[ImageRef]:
    """The images of the batches that come, which a thread of its own takes in.

    An empty batch is the last; where a signal's number comes, there is none any more, and what was
    not begun is left.
    """
    come: queue.SimpleQueue[Dealt] = queue.SimpleQueue()

    def take_in() -> None:
        with suppress(EOFError, OSError):
            while True:
                told = connection.recv()
                if isinstance(told, int):
                    stop.signal_number = told
                come.put(told if isinstance(told, list) else [])
        come.put([])

    threading.Thread(target=take_in, name="refs", daemon=True).start()
    while dealt := come.get():
        yield from starmap(ImageRef, dealt)


class Spent(NamedTuple):
    """What a process spent since it last told of it."""

    batches: Sequence[tuple[float, float]]
    """Of each that was inferred, as of `StatsCollector.add_batch`."""
    lines_s: float
    """Seconds of making lines."""
    cpu_s: float
    """CPU seconds, of all the time so far."""


class _Times(StatsCollector):
    """Seconds of batches and lines, for the parent to count."""

    def __init__(self) -> None:
        super().__init__(cpu_seconds, peak_rss_mb)
        self._times: deque[tuple[float, float]] = deque()

    def add_batch(self, decode_wait_s: float, infer_s: float) -> None:
        self._times.append((decode_wait_s, infer_s))

    def taken(self) -> Spent:
        """Those that were not taken yet."""
        batches = [self._times.popleft() for _ in range(len(self._times))]
        lines_s, self._write_s = self._write_s, 0.0
        return Spent(batches, lines_s, self.cpu_seconds())


class _Channel(Reporter):
    """A `Reporter` to the parent; several threads may report at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def log(self, text: str) -> None:
        self.say("log", text)

    def loading(self, thread: int, index: int | None, step: int) -> None:
        self.say("at", (thread, index, step))

    def beat(self) -> None:
        self.say("beat", None)

    def say(self, word: str, what: object) -> None:
        """Send a word, and what goes with it."""
        with self._lock:
            self._connection.send((word, what))
