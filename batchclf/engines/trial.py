"""A run of some seconds over a sample of a job's images, kept nowhere: how long will it take?

It is the run itself, in the worker that outlives bad images, with the provider proven and a reduced
precision compared with fp32; only its listing is the sample, and its output a temporary folder.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from batchclf.engines.display import RunDisplay
from batchclf.engines.local.engine import run_in_worker
from batchclf.errors import Interrupted, UsageError
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import Log, ResolvedModel, resolve_model
from batchclf.results.files import RunFiles, read_lines
from batchclf.results.lines import parse_record
from batchclf.results.listing import drafted, place
from batchclf.results.records import (
    ActiveProvider,
    Entry,
    ImageRef,
    PrecisionCheck,
    precision_name,
)
from batchclf.results.run_record import read_run
from batchclf.results.stats import Live
from batchclf.run.identity import identity_of
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ErrorsSpec, JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest

TRIAL_S = 10.0
PATIENCE = 6
"""Times as long it goes on, until there are two batches."""
ENOUGH = 20
"""Answers that being alike is told of."""
ALIKE = 0.95
LOW_AGREEMENT = 0.97
MANY_ERRORS = 0.05


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial showed."""

    model: str
    labels: Sequence[str]
    provider: ActiveProvider
    precision: str
    precision_check: PrecisionCheck | None
    num_images: int
    """Classified in the trial."""
    num_errors: int
    errors_by_code: Mapping[str, int]
    images_per_s: float
    startup_s: float
    """Until the first image was begun; what is built once, such as the model, not included."""
    bytes_per_image: float
    """Of records."""
    top_label: str | None
    """The most frequent answer."""
    top_share: float
    """Of the images with an answer."""

    def duration_s(self, num_images: int) -> float:
        """What a run over so many images will take."""
        return self.startup_s + num_images / self.images_per_s

    def output_bytes(self, num_images: int) -> int:
        """What its records will take."""
        return round(num_images * self.bytes_per_image)

    def warnings(self) -> Iterator[str]:
        """What a user should look at before the night."""
        check, num_ok = self.precision_check, self.num_images - self.num_errors
        name = precision_name(self.precision, check)
        if check is not None and check.top1_agreement < LOW_AGREEMENT:
            yield (
                f"{name} gives another top class than fp32 on "
                f"{1 - check.top1_agreement:.1%} of {check.num_images} images; is that good enough?"
            )
        if check is not None and check.is_slow:
            yield f"{name} is {check.speed} times as fast as fp32: use precision fp32"
        if num_ok >= ENOUGH and self.top_share >= ALIKE and len(self.labels) > 1:
            yield (
                f"{self.top_share:.0%} of {num_ok:,} images got the answer {self.top_label!r}: do "
                "model.preprocess, the weights and the labels go together?"
            )
        if self.num_errors > MANY_ERRORS * self.num_images:
            codes = ", ".join(f"{count:,} {code}" for code, count in self.errors_by_code.items())
            yield f"{self.num_errors:,} of {self.num_images:,} images fail: {codes}"
        if self.provider.fallback is not None:
            yield f"it falls back to the CPU, as the job allows: {self.provider.fallback}"


def require_local(job: JobSpec, option: str) -> None:
    """Refuse a trial of a job whose engine works elsewhere; `option` asked for it.

    Raises:
        UsageError: it does.
    """
    if job.engine.name != "local":
        raise UsageError(
            f"{option}: tries a job on this machine, and engine {job.engine.name} works on others; "
            f"leave {option} out, or add --set engine=local to try it here"
        )


def try_job(
    job: JobSpec, sample: Sequence[ImageRef], log: Log, *, located: bool, seconds: float = TRIAL_S
) -> Trial:
    """Run a job of this machine over a sample of its images for some seconds.

    `located`: whether some of them may lie in archives. The model is built where it is not yet.

    Raises:
        BatchclfError: whatever would end the run.
    """
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    with TemporaryDirectory(prefix="batchclf-trial-") as folder:
        job = job.model_copy(update={"output": Path(folder), "errors": ErrorsSpec()})
        files = RunFiles(Path(folder))
        entries = _Sampled(_in_good_order(job, sample), located)
        with drafted(files, identity_of(job, model, None), entries) as draft:
            place(files, draft)
        clock = _Clock(seconds, job.batch_size, log)
        images_per_s = _run(job, clock)
        return _seen(files, model, images_per_s, clock.startup_s)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What the trial's listing holds."""

    entries: Sequence[Entry]
    located: bool
    num_left_out: int = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        raise NotImplementedError("a trial is never gone on with")


def _in_good_order(job: JobSpec, sample: Sequence[ImageRef]) -> list[Entry]:
    """Mixed, so that whatever part of it there is time for is a sample of all; but what can only
    be read in passing through an archive in the order of that.
    """
    store = open_store(source_of(job))
    refs = list(sample)
    if all(store.stretch_of(ref) is None for ref in refs):
        random.Random(0).shuffle(refs)  # noqa: S311 - no secret
    return [Entry(ref.path, ref.location) for ref in refs]


class _Clock:
    """Who is shown the trial: it ends it when it was seen for long enough."""

    def __init__(self, seconds: float, batch_size: int, log: Log) -> None:
        self.stop = StopRequest()
        self.is_over = False
        self.startup_s = 0.0
        self._seconds = seconds
        self._batch_size = batch_size
        self._log = log
        self._created = time.monotonic()
        self._began: float | None = None
        self._first: tuple[float, int] | None = None
        """When the first records were seen, and how many."""
        self._last: tuple[float, int] | None = None

    def log(self, text: str) -> None:
        """As a run's."""
        self._log(text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """The clock starts, once."""
        if self._began is None:
            self._began = time.monotonic()
            self.startup_s = self._began - self._created

    def update(self, num_images: int, num_errors: int) -> None:
        """Look at the clock."""
        if self._began is None or self.is_over:
            return
        now = time.monotonic()
        if num_images:
            self._last = now, num_images
            self._first = self._first or self._last
        elapsed_s = now - self._began
        has_time = elapsed_s < PATIENCE * self._seconds
        has_enough = num_images >= 2 * self._batch_size or (num_images and not has_time)
        if elapsed_s >= self._seconds and has_enough:
            self.is_over = True
            self.stop.request(signal.SIGTERM)

    def live(self, live: Live) -> None:
        """Counts are enough."""

    @property
    def images_per_s(self) -> float:
        """Between the first records and the last that were seen; else since it began."""
        assert self._began is not None, "it ends itself only once there are records"
        assert self._first is not None, "as before"
        assert self._last is not None, "as before"
        (first_at, first), (last_at, last) = self._first, self._last
        return (
            (last - first) / (last_at - first_at)
            if last > first
            else last / (last_at - self._began)
        )


def _run(job: JobSpec, clock: _Clock) -> float:
    """Run it for as long as the clock lets it; images per second."""

    def prepare() -> tuple[JobSpec, RunOptions, RunDisplay]:
        return job, RunOptions(), clock

    try:
        return run_in_worker(prepare, clock.stop, time.perf_counter()).summary.images_per_s
    except Interrupted:
        if not clock.is_over:
            raise
        return clock.images_per_s


def _seen(files: RunFiles, model: ResolvedModel, images_per_s: float, startup_s: float) -> Trial:
    record = read_run(files)
    assert record is not None, "it began"
    tops: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    num_bytes = 0
    for line in read_lines(files.predictions):
        num_bytes += len(line)
        found = parse_record(line) or {}
        if found["status"] == "ok":
            tops[found["predictions"][0]["label"]] += 1
        else:
            codes[found["error"]["code"]] += 1
    num_images = tops.total() + codes.total()
    label, count = tops.most_common(1)[0] if tops else (None, 0)
    return Trial(
        model=model.bundle.meta.name,
        labels=model.labels,
        provider=record.provider,
        precision=record.precision,
        precision_check=record.precision_check,
        num_images=num_images,
        num_errors=codes.total(),
        errors_by_code=dict(codes.most_common()),
        images_per_s=images_per_s,
        startup_s=startup_s,
        bytes_per_image=num_bytes / num_images,
        top_label=label,
        top_share=count / tops.total() if tops else 0.0,
    )
