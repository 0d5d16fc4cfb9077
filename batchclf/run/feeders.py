"""A process for each GPU that decodes, infers and makes lines; here these are put in order.

One interpreter handles only so many images a second, however many GPUs there are. Each process is
dealt another batch as soon as it gives one back. A thread of its own hears what they say, whatever
this process is at: one that nobody hears comes to stand still, and looks as if it hung.
"""

import selectors
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import islice
from operator import attrgetter

from batchclf.errors import EnvironmentFailed, ProcessLost
from batchclf.images.ahead import Depth
from batchclf.results.lines import Lines
from batchclf.results.records import ImageRef
from batchclf.results.stats import StatsCollector
from batchclf.run.feeder import Share, Spent
from batchclf.run.plan import Plan
from batchclf.run.reporter import Reporter
from batchclf.sessions.open import Opened
from batchclf.sessions.together import together
from batchclf.spec.job import has_processes
from batchclf.system.children import how_it_ended, start_serving
from batchclf.system.interrupt import SIGNALS, StopRequest

AS_MANY_AGAIN = 2
"""Batches that are dealt and not written yet are at most so many times those that the processes
are ahead by: the others wait for one that is slower."""
END_S = 5.0
"""Seconds that a process may take to end."""
TICK_S = 1.0
_HELD = (*SIGNALS, signal.SIGUSR1)
_VALUES = attrgetter(*(one.name for one in fields(ImageRef)))
"""Of an image, as `Dealt` has them."""


def shares_of(plan: Plan, sample: Iterable[ImageRef], used: str | None) -> list[Share]:
    """A share for each device of a plan; none where there is one device, which needs no process."""
    job = plan.task.job
    if not has_processes(job.provider):
        return []
    devices = job.provider.devices or ()
    num_workers = max(1, plan.num_workers // len(devices))
    refs = tuple(sample)
    # An image that ends its decoder then costs that alone, and not the sessions of every GPU.
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
            ProcessLost: one ended.
            BatchclfError: what opening raised.
        """
        self._batch_size = shares[0].plan.batch_size
        self._feeders: list[_Feeder] = []
        self._dealt: deque[tuple[_Feeder, int]] = deque()
        """Whose each batch is that is not written yet, in order, and how many images it has."""
        self._is_all_dealt = False
        self._ended: _Feeder | None = None
        """The one that ended before all was dealt: nobody is dealt anything since."""
        self._is_stopped = False
        self._is_closed = False
        self._news = threading.Condition()
        self._hearing = threading.Thread(target=self._hear, name="hear", daemon=True)
        logged: set[str] = set()
        try:
            for number, share in enumerate(shares):
                self._feeders.append(_Feeder(number, share, reporter, logged))
            self._hearing.start()
            self._wait_until_opened()
        except BaseException:
            self.close()
            raise
        self.num_streams = sum(feeder.num_streams for feeder in self._feeders)
        self.opened = opened_by_all(
            [(one.gpu, one.opened) for one in self._feeders if one.opened is not None]
        )
        self._max_dealt = AS_MANY_AGAIN * sum(feeder.num_ahead for feeder in self._feeders)

    def _wait_until_opened(self) -> None:
        with self._news:
            while not all(feeder.opened for feeder in self._feeders):
                for feeder in self._feeders:
                    if feeder.has_ended:
                        raise feeder.problem()
                self._news.wait(TICK_S)

    def results(
        self, refs: Iterator[ImageRef], stats: StatsCollector, stop: StopRequest, tick_s: float
    ) -> Iterator[Lines | None]:
        """The records of each batch, in order; None whenever `tick_s` seconds bring none.

        After a signal, those are the last whose inference had begun.

        Raises:
            ProcessLost: a process ended; others may do better.
            Exception: what a process raised.
        """
        stats.count_cpu(lambda: sum(feeder.cpu_s for feeder in self._feeders))
        while True:
            if stop.signal_number is not None:
                self._stop(stop.signal_number)
            self._deal(refs)
            if not self._dealt:
                if self._ended is not None and not self._is_all_dealt:
                    raise self._ended.problem()
                break
            feeder, num_images = self._dealt[0]
            has_ended = feeder.has_ended  # before it is looked at what came last
            if feeder.come:
                self._dealt.popleft()
                lines, spent = feeder.come.popleft()
                assert lines.num_images == num_images, "each image has a record"
                stats.add_lines_elsewhere(spent.lines_s, len(self._feeders))
                for decode_wait_s, infer_s in spent.batches:
                    stats.add_batch(decode_wait_s, infer_s)
                yield lines
            elif has_ended and self._is_stopped and feeder.error is None:
                return
            elif has_ended:
                raise feeder.problem()
            elif not self._wait_for(feeder, tick_s):
                yield None
        self._hear_out()

    def _wait_for(self, feeder: "_Feeder", seconds: float) -> bool:
        """Wait for a process, or until another one is to be dealt a batch; whether it came to it.

        Meanwhile, the thread that hears goes on.
        """
        with self._news:
            return self._news.wait_for(
                lambda: bool(feeder.come or feeder.has_ended or self._next_dealt()), seconds
            )

    def _deal(self, refs: Iterator[ImageRef]) -> None:
        """Give batches to those who lack some; when there are no more, tell all of them.

        Once one has ended there are none for the others either: they finish what they have.
        """
        while (feeder := self._next_dealt()) is not None:
            if batch := list(islice(refs, self._batch_size)):
                self._dealt.append((feeder, len(batch)))
                feeder.deal(batch)
                continue
            self._is_all_dealt = True
            self._tell_all([])
        if self._ended is None and not self._is_all_dealt:
            self._ended = next((one for one in self._feeders if one.has_ended), None)
            if self._ended is not None:
                self._tell_all([])

    def _tell_all(self, what: object) -> None:
        for feeder in self._feeders:
            feeder.send(what)

    def _next_dealt(self) -> "_Feeder | None":
        """Who lacks batches most, as long as what is not written yet fits into its bound.

        Beyond it, the one that all wait for: with less than it wants it may never finish a batch.
        """
        if self._is_all_dealt or any(feeder.has_ended for feeder in self._feeders):
            return None
        if len(self._dealt) < self._max_dealt:
            feeder = max(self._feeders, key=attrgetter("num_lacking"))
        else:
            feeder, _ = self._dealt[0]
        return feeder if feeder.num_lacking > 0 else None

    def _stop(self, signal_number: int) -> None:
        """Have them finish what they are inferring, and end."""
        if not self._is_stopped:
            self._is_stopped = self._is_all_dealt = True
            self._tell_all(signal_number)

    def _hear_out(self) -> None:
        """Wait for what they say once there is no more to do."""
        with self._news:
            self._news.wait_for(lambda: all(one.has_ended for one in self._feeders), END_S)
        for feeder in self._feeders:
            if feeder.error is not None:
                raise feeder.error

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._is_closed = True
        for feeder in self._feeders:
            feeder.end()
        if self._hearing.is_alive():
            self._hearing.join()
        for feeder in self._feeders:
            feeder.connection.close()

    # ---- in the thread that hears ----------------------------------------------------------------

    def _hear(self) -> None:
        try:
            with selectors.DefaultSelector() as heard:
                for feeder in self._feeders:
                    heard.register(feeder.connection, selectors.EVENT_READ, feeder)
                while heard.get_map() and not self._is_closed:
                    for key, _ in heard.select(TICK_S):
                        self._hear_one(key.data)
                        if key.data.has_ended:
                            heard.unregister(key.fileobj)
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            with self._news:
                for feeder in self._feeders:
                    feeder.error, feeder.has_ended = error, True
                self._news.notify_all()

    def _hear_one(self, feeder: "_Feeder") -> None:
        if feeder.hear():
            with self._news:
                self._news.notify_all()


def opened_by_all(found: Sequence[tuple[str, Opened]]) -> Opened:
    """All that is to be told of what several processes, each with its name, opened.

    One that has the CPU in place of its GPU infers in parts of its own.
    """
    as_asked = [one for _, one in found if one.provider.fallback is None]
    checks = [one.precision_check for _, one in found if one.precision_check is not None]
    return replace(
        as_asked[0] if as_asked else found[0][1],
        provider=together([(name, one.provider) for name, one in found]),
        precision_check=min(checks, key=attrgetter("top1_agreement"), default=None),
    )


class _Feeder:
    """One process, as this one sees it."""

    def __init__(self, number: int, share: Share, reporter: Reporter, logged: set[str]) -> None:
        """Start it; `logged`: what any of them said, of which nothing is said twice.

        Raises:
            EnvironmentFailed: it is not to be had.
        """
        num_threads = share.plan.num_workers + Depth().num_reads
        self._threads = range(number * num_threads, (number + 1) * num_threads)
        self._logged = logged
        self._reporter = reporter
        self.gpu = f"GPU {', '.join(map(str, share.plan.task.job.provider.devices or ()))}"
        self._num_dealt = self._num_come = 0
        self.come: deque[tuple[Lines, Spent]] = deque()
        """Records of batches that are not written yet, in order; and what was spent meanwhile."""
        self.opened: Opened | None = None
        """Without its classifiers."""
        self.num_streams = self.num_ahead = 0
        self.cpu_s = 0.0
        self.error: BaseException | None = None
        """What it said that it failed with."""
        self.has_ended = False
        """Nothing more comes."""
        try:
            self._process, self.connection = start_serving(
                "batchclf.run.feeder", held=_HELD, stdout=2
            )
        except OSError as error:
            raise EnvironmentFailed(
                f"no process for another GPU can be started: {error}; run again to resume"
            ) from error
        self.send(share)

    def deal(self, refs: Sequence[ImageRef]) -> None:
        """Give it a batch."""
        self._num_dealt += 1
        self.send(list(map(_VALUES, refs)))

    @property
    def num_lacking(self) -> int:
        """How many batches it may be given."""
        return self.num_ahead - (self._num_dealt - self._num_come)

    def send(self, what: object) -> None:
        """Tell it something; that it has ended, whoever hears it finds out."""
        with suppress(OSError):
            self.connection.send(what)

    def hear(self) -> bool:
        """Take in what it says next; whether somebody may be waiting for that."""
        try:
            word, what = self.connection.recv()
        except (EOFError, OSError):
            self.has_ended = True
            return True
        match word:
            case "at":
                thread, index, step = what
                self._reporter.loading(self._threads[thread], index, step)
                return False
            case "beat":
                self._reporter.beat()
                return False
            case "log":
                if what not in self._logged:
                    self._logged.add(what)
                    self._reporter.log(what)
                return False
            case "opened":
                self.opened, self.num_streams, self.num_ahead = what
            case "lines":
                lines, spent = what
                self.cpu_s = spent.cpu_s
                self.come.append((lines, spent))
                self._num_come += 1
            case "error":
                self.error = what
            case _:
                self.error = RuntimeError(f"in the process of {self.gpu}:\n{what}")
        return True

    def problem(self) -> BaseException:
        """Why it ended before its time."""
        if self.error is not None:
            return self.error
        returncode = None
        with suppress(subprocess.TimeoutExpired):
            returncode = self._process.wait(END_S)
        how = "it says nothing more" if returncode is None else how_it_ended(returncode)
        is_killed = returncode == -signal.SIGKILL
        return ProcessLost(
            f"the process of {self.gpu} ended: {how}", self._threads, is_killed=is_killed
        )

    def end(self) -> None:
        """End it; one that is stuck in the kernel is left behind."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
