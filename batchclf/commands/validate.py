"""Check a job without running it: precision, provider, output, images, model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from batchclf.commands.survey import Survey, survey
from batchclf.images.glance import Glance, glance
from batchclf.images.resize import require_pillow
from batchclf.images.source import source_of
from batchclf.models.resolve import Log, check_model
from batchclf.results.records import ImageRef
from batchclf.run.output import require_separate_output
from batchclf.runtime.providers import PROVIDERS, installed_flavours
from batchclf.sessions.open import settle_job
from batchclf.sessions.sample import evenly_spread
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.apart import Apart
from batchclf.system.paths import Usage, disk_of

NUM_GLANCED = 200
GLANCE_S = 5.0
"""Seconds for reading them."""
HUNG_S = 60.0
"""Seconds after which the process is left behind that reads them, or asks the output's disk."""
HUGE_PIXELS = 50_000_000
RECORD_BYTES, RANK_BYTES = 60, 60
"""Of a record about, and of each class in it; a trial tells it better."""
LEAST_FREE = 0.02
"""Of the output's file system."""
DISK = "output: the disk of"
"""How warnings of `disk_warning` begin."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a valid job would do."""

    num_images: int
    num_left_out: int
    left_out: str
    """The same in words: how much of which kind."""
    provider: str
    model: str
    glance: Glance | None
    """At a sample of the images; None: what reads them ended, or there was no time for one."""
    warnings: Sequence[str]
    sample: Sequence[ImageRef] = field(repr=False)
    """Some of the images."""
    located: bool
    """Whether some of them may lie in archives."""

    @property
    def num_bytes(self) -> int | None:
        """Of all images, about; None: nothing is known of them."""
        if self.glance is None or not self.glance.num_images:
            return None
        return round(self.glance.mean_bytes * self.num_images)


def check_job(job: JobSpec, options: RunOptions, log: Log) -> Checked:
    """Everything that can be told before a run with these options.

    Raises:
        BatchclfError: the first problem, with the exit code that `run` would end with.
    """
    require_separate_output(job)
    provider = _provider(job, log)
    found = _part(survey(job, log), options)
    model = check_model(job.model)
    seen, why = _glance_apart(job, found)
    warnings = [] if why is None else [why]
    warnings += _warnings(job, found, seen)
    return Checked(
        num_images=found.num_images,
        num_left_out=found.num_left_out,
        left_out=found.left_out,
        provider=provider,
        model=model,
        glance=seen,
        warnings=warnings,
        sample=found.sample,
        located=found.located,
    )


def _part(found: Survey, options: RunOptions) -> Survey:
    """What of the input a run is about: the first images, or one shard of them."""
    limited = min(found.num_images, options.limit or found.num_images)
    first, last = options.shard.bounds(limited)
    own = [ref for ref in found.sample if first <= ref.index < last]
    return replace(found, num_images=last - first, sample=own or found.sample)


def disk_warning(job: JobSpec, num_bytes: int) -> str | None:
    """What to say where the output's disk has no room for so much; None: it has, or is far."""
    if isinstance(job.output, str):
        return None
    try:
        place, usage = _disk_of(job.output)
    except OSError as error:
        return f"{DISK} {job.output} does not tell how much of it is free: {error}"
    if usage.free > num_bytes and usage.free > LEAST_FREE * usage.total:
        return None
    return (
        f"{DISK} {place} is nearly full: {usage.free:,} of {usage.total:,} bytes are "
        f"free, and the records will take about {num_bytes:,}; make room, or give another output"
    )


def _disk_of(path: Path) -> tuple[Path, Usage]:
    """As `disk_of`, in a process that may be left behind: the disk may be a share that hangs.

    Raises:
        OSError: as `disk_of`, or it does not answer.
    """
    with Apart() as apart:
        return apart.do(HUNG_S, disk_of, path)


def _provider(job: JobSpec, log: Log) -> str:
    """What the job runs on, in words; with engine ray, that is not this machine."""
    if job.engine.name == "ray":
        return f"{job.provider.name}, which each worker proves on its node before the job begins"
    require_pillow(job.loader.decode)
    fallback = settle_job(job, log)
    provider = PROVIDERS["cpu" if fallback is not None else job.provider.name]
    flavours = ", ".join(f"{name} {version}" for name, version in installed_flavours().items())
    return f"{provider.execution_provider} of {flavours}"


def _glance_apart(job: JobSpec, found: Survey) -> tuple[Glance | None, str | None]:
    """A look at some images, in a process that a bad one may end; and why there is none."""
    count = len(found.sample)
    refs = list(evenly_spread(found.sample, count, min(count, NUM_GLANCED)))
    try:
        with Apart() as apart:
            return apart.do(HUNG_S, glance, job, source_of(job), refs, GLANCE_S), None
    except OSError as error:
        return None, f"input: a sample of the images could not be read: {error}"


def _warnings(job: JobSpec, found: Survey, seen: Glance | None) -> Iterator[str]:
    if job.batch_size > found.num_images:
        yield (
            f"batch_size: {job.batch_size} is more than the {found.num_images:,} images there are; "
            "a smaller one takes less memory"
        )
    about = found.num_images * (RECORD_BYTES + RANK_BYTES * job.top_k)
    if (warning := disk_warning(job, about)) is not None:
        yield warning
    if seen is None:
        return
    if seen.num_too_large:
        yield (
            f"input: {seen.num_too_large} of {seen.num_images} images sampled have more than "
            f"loader.max_pixels ({job.loader.max_pixels:,}) and will be recorded as too_large"
        )
    elif seen.largest_pixels > HUGE_PIXELS:
        yield (
            f"input: there are huge images, up to {seen.largest_pixels:,} pixels: each takes "
            "seconds and hundreds of megabytes; loader.decode: fast makes JPEGs cheaper"
        )
    if seen.num_unreadable:
        total = seen.num_images + seen.num_unreadable
        yield f"input: {seen.num_unreadable} of {total} images sampled cannot be read"
