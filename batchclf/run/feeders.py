"""A process for each GPU that decodes, infers and ranks; here their records are put in order.

One interpreter handles about 25,000 images a second, however many GPUs there are. Batches are dealt
out in turns, so it is known whose is next, and only that one is waited for. A process that is ahead
of the others waits until it is heard.
"""

import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from typing import Any, NoReturn

from batchclf.errors import DeviceLost, EnvironmentFailed
from batchclf.results.records import Failure, ImageRef, Prediction, Record
from batchclf.results.stats import StatsCollector
from batchclf.run.feeder import Packed, Share
from batchclf.run.plan import Plan
from batchclf.run.reporter import Reporter
from batchclf.sessions.open import Opened
from batchclf.system.children import (
    how_it_ended,
    start_serving,
)
from batchclf.system.interrupt import SIGNALS

NUM_THREADS = 1024
"""What all processes together may number their threads by."""
END_S = 5.0
"""Seconds that a process may take to end."""
_HELD = (*SIGNALS, signal.SIGUSR1)


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
        self.opened = _together([opened for opened, _ in found])

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

    def _unpacked(self, refs: Sequence[ImageRef], packed: Sequence[Packed]) -> list[Record]:
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


def _together(found: Sequence[Opened]) -> Opened:
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
            self._process, self._connection = start_serving(
                "batchclf.run.feeder", held=_HELD, stdout=2
            )
        except OSError as error:
            raise EnvironmentFailed(
                f"no process for another GPU can be started: {error}; run again to resume"
            ) from error
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

    def receive(self, stats: StatsCollector, tick_s: float) -> Sequence[Packed] | None:
        """The records of a batch; None: there are none yet."""
        ends_at = time.monotonic() + tick_s
        while self._connection.poll(max(0.0, ends_at - time.monotonic())):
            word, what = self._received()
            if word == "records":
                packed: Sequence[Packed]
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
