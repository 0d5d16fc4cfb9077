"""What a run is going to do: the model resolved, the listing frozen, the work divided up."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from batchclf.images.load import loader_of
from batchclf.images.prefetch import Load, Quarantine
from batchclf.images.source import Source
from batchclf.images.store import list_paths
from batchclf.models.resolve import Log, ResolvedModel
from batchclf.results.files import RunFiles
from batchclf.results.listing import (
    discard_abandoned_listing,
    extend_listing,
    freeze_listing,
)
from batchclf.results.records import DecodeBackend, Failure
from batchclf.run.request import Recovery
from batchclf.spec.job import JobSpec, auto, runs_on_cpu
from batchclf.system.machine import usable_cores

MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, with what, and in which portions."""

    job: JobSpec
    source: Source
    files: RunFiles
    first: int
    last: int
    num_listed: int
    """Images in the whole listing, of which a shard has `first` to `last`."""
    model: ResolvedModel
    batch_size: int
    num_workers: int
    backend: DecodeBackend
    quarantined: Mapping[bytes, Failure] = field(default_factory=dict)
    """Images, by their paths in the listing, that crash or hang whoever decodes them."""
    num_left_out: int = 0
    """Of the input, where it was listed now."""

    @property
    def num_images(self) -> int:
        return self.last - self.first

    @property
    def load(self) -> Load:
        """What loads the job's images."""
        loader = loader_of(self.job, self.source, self.model.preprocess)
        return Quarantine(loader, self.quarantined) if self.quarantined else loader


def make_plan(
    job: JobSpec,
    source: Source,
    files: RunFiles,
    num_listed: int,
    model: ResolvedModel,
    recovery: Recovery,
    log: Log,
) -> Plan:
    """Divide a listing of so many images up, as far as what went wrong before allows."""
    first, last = files.shard.bounds(num_listed)
    fixed = model.bundle.meta.fixed_batch
    if fixed is not None and fixed != job.batch_size:
        log(f"batch_size: the model takes only batches of {fixed}, not {job.batch_size}")
    num_workers = auto(job.loader.workers, usable_cores())
    return Plan(
        job=job,
        source=source,
        files=files,
        first=first,
        last=last,
        num_listed=num_listed,
        model=model,
        batch_size=min(fitting_batch_size(job, model, last - first), recovery.max_batch_size),
        num_workers=num_workers,
        backend="processes" if recovery.isolate else backend_of(job, num_workers),
        quarantined=recovery.quarantined,
    )


def fitting_batch_size(job: JobSpec, model: ResolvedModel, num_images: int) -> int:
    """The model's own batch size, or the job's; a short job saves inferring its padding."""
    return model.bundle.meta.fixed_batch or max(1, min(job.batch_size, num_images))


def freeze(
    source: Source, files: RunFiles, limit: int | None, log: Log, *, extend: bool = False
) -> tuple[float, int]:
    """List the input once per job, or `extend` its listing.

    Returns:
        The seconds it took, and how many entries were left out of a new listing.
    """
    started = time.perf_counter()
    discard_abandoned_listing(files)
    if files.listing.exists():
        if extend:
            num_new = extend_listing(files, list_paths(source))
            log(f"--extend: {num_new:,} new images in the listing")
        return (time.perf_counter() - started if extend else 0.0), 0
    paths = list_paths(source)
    freeze_listing(files, limited(paths, limit))
    if paths.num_left_out:
        log(f"input: left out {paths.num_left_out:,} hidden or repeated entries")
    return time.perf_counter() - started, paths.num_left_out


def limited(paths: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    """The first `limit` paths; None: all."""
    for number, path in enumerate(paths):
        if limit is not None and number >= limit:
            return
        yield path


def backend_of(job: JobSpec, num_workers: int) -> DecodeBackend:
    """What the job's decode workers are.

    auto: processes where more than MAX_THREADS workers feed an accelerator. Threads share one
    interpreter, which handles about 3,000 images a second however many there are, and up to 4 of
    them do as well as processes (tests/benchmarks/overhead.py). On a CPU, inference takes most of
    the cores' time, and threads are enough.
    """
    if job.loader.backend != "auto":
        return job.loader.backend
    return "processes" if num_workers > MAX_THREADS and not runs_on_cpu(job.provider) else "threads"
