"""A process for each GPU that decodes, infers and ranks; here their records are put in order.

One interpreter handles about 25,000 images a second, however many GPUs there are. Batches are dealt
out in turns, so it is known whose is next, and only that one is waited for. A process that is ahead
of the others waits until it is heard.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

from batchclf.errors import BatchclfError, DeviceLost, EnvironmentFailed
from batchclf.images.ahead import Depth
from batchclf.images.prefetch import HostMemory
from batchclf.results.records import Failure, ImageRef, Prediction, Record
from batchclf.results.stats import StatsCollector
from batchclf.run.blame import explained
from batchclf.run.classify import Work, flowing, num_batches_of
from batchclf.run.plan import Plan
from batchclf.run.reporter import Reporter
from batchclf.sessions.open import Opened, Wanted, open_devices, settle_provider
from batchclf.sessions.sample import Sample
from batchclf.system.children import (
    end_with_parent,
    expendable,
    how_it_ended,
    signals_held,
    start_python,
)
from batchclf.system.interrupt import SIGNALS, StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb

NUM_THREADS = 1024
"""What all processes together may number their threads by."""
EXPENDABLE = 600
"""Where memory runs out, they are to go before this process, and after those that decode."""
END_S = 5.0
"""Seconds that a process may take to end."""
BEAT_S = 1.0
BUSY_SHARE = 0.05
"""Of a core, while it opens its sessions: then it does not hang."""
_HELD = (*SIGNALS, signal.SIGUSR1)
_Packed = tuple[Failure | tuple[tuple[int, float], ...], tuple[str, ...]]
"""An outcome, a prediction as index and score; and warnings."""


class Share(NamedTuple):
    """What a process is to do."""

    plan: Plan
    """Its job has one device."""
    sample: tuple[ImageRef, ...]
    used: str | None
    """As of `Wanted`."""


def shares_of(plan: Plan, sample: Iterable[ImageRef], used: str | None) -> list[Share]:
    """A share for each device of a plan; none where there is one device, which needs no process."""
    job = plan.task.job
    devices = job.provider.devices or ()
    if len(devices) < 2:
        return []
    num_workers = max(1, plan.num_workers // len(devices))
    refs = tuple(sample)
    # An image that ends its decoder is then found there; the end of a share's process is its GPU's.
    backend = "processes" if job.loader.backend == "auto" else plan.backend
    shares = []
    for device in devices:
        provider = job.provider.model_copy(update={"devices": (device,)})
        task = replace(plan.task, job=job.model_copy(update={"provider": provider}))
        own = replace(plan, task=task, num_workers=num_workers, backend=backend)
        shares.append(Share(own, refs, used))
    return shares


class Feeders:
    """The processes, started and opened; they end with `close`, or with this thread."""

    def __init__(self, shares: Sequence[Share], reporter: Reporter) -> None:
        """Start all, and wait until each has opened its sessions.

        Raises:
            EnvironmentFailed: no process is to be had.
            BatchclfError: what opening raised.
        """
        self._labels = shares[0].plan.task.model.labels
        self._batch_size = shares[0].plan.batch_size
        self._feeders: list[_Feeder] = []
        logged: set[str] = set()
        try:
            for number, share in enumerate(shares):
                self._feeders.append(_Feeder(number, len(shares), share, reporter, logged))
            found = [feeder.wait_until_opened() for feeder in self._feeders]
        except BaseException:
            self.close()
            raise
        self.num_streams = sum(num_streams for _, num_streams in found)
        self.opened = opened_by_all([opened for opened, _ in found])

    def results(
        self, refs: Iterator[ImageRef], stats: StatsCollector, tick_s: float
    ) -> Iterator[list[Record] | None]:
        """The records of each batch, in order; None whenever `tick_s` seconds bring none.

        Raises:
            DeviceLost: a process ended; another may do better.
            Exception: what a process raised.
        """
        stats.count_cpu(lambda: sum(feeder.cpu_s for feeder in self._feeders))
        for feeder in self._feeders * max(feeder.num_ahead for feeder in self._feeders):
            feeder.send(list(islice(refs, self._batch_size)))
        while True:
            for feeder in self._feeders:
                if not (sent := feeder.next_sent()):
                    for one in self._feeders:
                        one.hear_out()
                    return
                while (packed := feeder.receive(stats, tick_s)) is None:
                    yield None
                yield self._unpacked(sent, packed)
                feeder.send(list(islice(refs, self._batch_size)))

    def _unpacked(self, refs: Sequence[ImageRef], packed: Sequence[_Packed]) -> list[Record]:
        labels = self._labels
        return [
            Record(
                ref,
                outcome
                if isinstance(outcome, Failure)
                else tuple(Prediction(labels[index], index, score) for index, score in outcome),
                warnings,
            )
            for ref, (outcome, warnings) in zip(refs, packed, strict=True)
        ]

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for feeder in self._feeders:
            feeder.close()


def opened_by_all(found: Sequence[Opened]) -> Opened:
    """What several processes opened, as if it were one's: all devices, the worst comparison."""
    checks = [one.precision_check for one in found if one.precision_check is not None]
    devices = dict.fromkeys(one.provider.device for one in found)
    return replace(
        found[0],
        provider=replace(found[0].provider, device=", ".join(devices)),
        precision_check=min(checks, key=attrgetter("top1_agreement"), default=None),
    )


class _Feeder:
    """One process, as this one sees it."""

    def __init__(
        self, number: int, count: int, share: Share, reporter: Reporter, logged: set[str]
    ) -> None:
        """`logged`: what any of them said; nothing is said twice."""
        self._first_thread = number * (NUM_THREADS // count)
        self._logged = logged
        self._reporter = reporter
        devices = share.plan.task.job.provider.devices
        self._name = f"the process of GPU {', '.join(map(str, devices or ()))}"
        self._sent: deque[list[ImageRef]] = deque()
        self.num_ahead = 1
        self.cpu_s = 0.0
        try:
            ours, theirs = socket.socketpair()
            with theirs, signals_held(_HELD):
                self._process = start_python(
                    f"from {__name__} import serve; serve({theirs.fileno()}, {os.getpid()})",
                    pass_fds=(theirs.fileno(),),
                    stdout=2,
                )
        except OSError as error:
            raise EnvironmentFailed(
                f"no process for another GPU can be started: {error}; run again to resume"
            ) from error
        self._connection = Connection(ours.detach())
        self._send(share)

    def wait_until_opened(self) -> tuple[Opened, int]:
        """What it opened, without its classifiers, and how many of these there are."""
        while (said := self._received())[0] != "opened":
            self._heed(*said)
        opened, num_streams, self.num_ahead = said[1]
        return opened, num_streams

    def send(self, refs: list[ImageRef]) -> None:
        """Give it a batch; an empty one is the last, after which it ends."""
        is_over = bool(self._sent) and not self._sent[-1]
        self._sent.append(refs)
        if not is_over:
            self._send(refs)

    def next_sent(self) -> list[ImageRef]:
        """The batch whose records come next."""
        return self._sent.popleft()

    def receive(self, stats: StatsCollector, tick_s: float) -> Sequence[_Packed] | None:
        """The records of a batch; None: there are none yet."""
        ends_at = time.monotonic() + tick_s
        while self._connection.poll(max(0.0, ends_at - time.monotonic())):
            word, what = self._received()
            if word == "records":
                packed: Sequence[_Packed]
                packed, times, self.cpu_s = what
                for decode_wait_s, infer_s in times:
                    stats.add_batch(decode_wait_s, infer_s)
                return packed
            self._heed(word, what)
        return None

    def hear_out(self) -> None:
        """What it says once it has no more to do, until it ends."""
        with suppress(EOFError, OSError):
            while self._connection.poll(END_S):
                self._heed(*self._connection.recv())

    def close(self) -> None:
        """End it; one that is stuck in the kernel is left behind."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._connection.close()

    def _send(self, what: object) -> None:
        try:
            self._connection.send(what)
        except OSError:
            self._raise_end()

    def _received(self) -> tuple[str, Any]:
        try:
            word, what = self._connection.recv()
        except (EOFError, OSError):
            self._raise_end()
        return word, what

    def _heed(self, word: str, what: Any) -> None:
        if word == "at":
            thread, index, step = what
            self._reporter.loading(self._first_thread + thread, index, step)
        elif word == "beat":
            self._reporter.beat()
        elif word == "log":
            if what not in self._logged:
                self._logged.add(what)
                self._reporter.log(what)
        elif word == "error":
            raise what
        else:
            raise RuntimeError(f"in {self._name}:\n{what}")

    def _raise_end(self) -> NoReturn:
        try:
            how = how_it_ended(self._process.wait(END_S))
        except subprocess.TimeoutExpired:
            how = "it says nothing more"
        raise DeviceLost(f"{self._name} ended: {how}") from None


# ---- in the process ------------------------------------------------------------------------------


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
    stats = _Times()
    work = Work(plan, opened, stats, channel, StopRequest())
    with explained(task, opened.part.num_images), flowing(work, _refs(connection)) as flow:
        for records in flow:
            if records is not None:
                channel.say("records", (_packed(records), stats.taken(), stats.cpu_seconds()))


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


def _refs(connection: Connection) -> Iterator[ImageRef]:
    """The images of the batches that come, which a thread of its own takes in."""
    come: queue.SimpleQueue[list[ImageRef]] = queue.SimpleQueue()

    def take_in() -> None:
        while True:
            try:
                refs = connection.recv()
            except (EOFError, OSError):
                refs = []
            come.put(refs)
            if not refs:
                return

    threading.Thread(target=take_in, name="refs", daemon=True).start()
    while refs := come.get():
        yield from refs


def _packed(records: Sequence[Record]) -> list[_Packed]:
    return [
        (
            record.outcome
            if isinstance(record.outcome, Failure)
            else tuple((one.index, one.score) for one in record.outcome),
            record.warnings,
        )
        for record in records
    ]


class _Times(StatsCollector):
    """Seconds of batches, for the parent to count."""

    def __init__(self) -> None:
        super().__init__(cpu_seconds, peak_rss_mb)
        self._times: deque[tuple[float, float]] = deque()

    def add_batch(self, decode_wait_s: float, infer_s: float) -> None:
        self._times.append((decode_wait_s, infer_s))

    def taken(self) -> list[tuple[float, float]]:
        """Those that were not taken yet."""
        return [self._times.popleft() for _ in range(len(self._times))]


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
