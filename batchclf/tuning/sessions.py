"""Sessions for one combination after the other, opened and proven as a run opens them."""

from collections.abc import Sequence
from dataclasses import replace

from batchclf.images.prefetch import Allocate
from batchclf.results.records import Pixels, Precision
from batchclf.runtime.providers import PROVIDERS
from batchclf.runtime.sessions import Target
from batchclf.sessions.open import Opened, Wanted, open_devices, open_in_parts, targets
from batchclf.sessions.sample import Sample
from batchclf.spec.job import JobSpec, ProviderSpec, RuntimeSpec, runs_on_cpu
from batchclf.tuning.measure import Bench, job_with
from batchclf.tuning.records import Session, Settings


class Sessions:
    """Holds the sessions of one combination at a time, so that memory need not hold two."""

    def __init__(self, bench: Bench, sample: Sample, fallback: str | None) -> None:
        """`sample`: images of the job to convert and to compare precisions on."""
        self._bench = bench
        self._sample = sample
        self._fallback = fallback
        self._spec = bench.job.provider if fallback is None else ProviderSpec(name="cpu")
        self._proven: dict[Precision, Opened] = {}
        """The first of each precision, without its classifiers."""
        self._session: Session | None = None
        self._opened: Opened | None = None
        self._batches: _Reused | None = None

    def target(self, runtime: RuntimeSpec) -> Target:
        """Where sessions open, and how many streams and threads these settings come to."""
        job = self._bench.job.model_copy(update={"runtime": runtime})
        return targets(self._spec, job)[0]

    @property
    def on_cpu(self) -> bool:
        """Whether inference runs on the cores that decode."""
        return runs_on_cpu(self._spec)

    @property
    def first(self) -> Opened:
        """What was opened first, without its classifiers."""
        return next(iter(self._proven.values()))

    def holds(self, session: Session) -> bool:
        """Whether it is the one that is open, so that opening it takes no time."""
        return self._opened is not None and session.alone == self._session

    def open(self, session: Session) -> Opened:
        """Sessions whose answers were checked, as in a run; those opened before are closed.

        Raises:
            BatchclfError: as in a run.
        """
        if self._batches is not None:
            self._batches.take_back()
        if self._opened is None or not self.holds(session):
            self.close()
            self._opened = self._open(self._job(session), session)
            self._session = session.alone
        return self._opened

    def own_part(self, session: Session) -> int:
        """What the job's own `runtime.part` comes to, at these streams and threads.

        Raises:
            BatchclfError: as in a run.
        """
        self.close()
        job = self._job(session)
        runtime = job.runtime.model_copy(update={"part": self._bench.job.runtime.part})
        opened = self._open(job.model_copy(update={"runtime": runtime}), session)
        return opened.part.num_images

    def _job(self, session: Session) -> JobSpec:
        return job_with(self._bench.job, Settings(session, self._bench.job.loader.decode, 1))

    def close(self) -> None:
        """Free the memory."""
        self._session = self._opened = None

    def _open(self, job: JobSpec, session: Session) -> Opened:
        wanted = Wanted(job, self._bench.model, session.batch_size, self._sample, self._bench.log)
        proven = self._proven.get(session.precision)
        if proven is not None:  # the precision is compared with fp32 once, the answers each time
            several = [
                open_in_parts(wanted, proven.bundle, target) for target in targets(self._spec, job)
            ]
            classifiers = [classify for of_target, _ in several for classify in of_target]
            return replace(proven, classifiers=classifiers, part=several[0][1])
        opened = open_devices(wanted, self._fallback)
        if opened.provider.active != PROVIDERS[self._spec.name].execution_provider:
            self._spec = ProviderSpec(name="cpu")
        if opened.provider.active == PROVIDERS["cuda"].execution_provider:
            self._batches = self._batches or _Reused(opened.memory.allocate)
            opened = replace(opened, memory=replace(opened.memory, allocate=self._batches))
        self._proven[session.precision] = replace(opened, classifiers=())
        return opened


class _Reused:
    """An `Allocate` that hands the same batches out again, a measurement at a time.

    Page-locked memory is freed with the process only, so measurements must not each take their own.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._batches: dict[tuple[int, ...], list[Pixels]] = {}
        self._num_lent = 0

    def __call__(self, shape: Sequence[int]) -> Pixels:
        batches = self._batches.setdefault(tuple(shape), [])
        if self._num_lent == len(batches):
            batches.append(self._allocate(shape))
        self._num_lent += 1
        return batches[self._num_lent - 1]

    def take_back(self) -> None:
        """Nobody uses the batches any more."""
        self._num_lent = 0
