"""The run record of a run: what it is, and which runs before it made the records that are kept."""

import platform
from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import version

from batchclf import __version__
from batchclf.images.extras import installed_readers
from batchclf.images.jpeg import decoder_name
from batchclf.images.resampler import resampler_name
from batchclf.models.variants import facts
from batchclf.results.identity import Fingerprint
from batchclf.results.lines import Done
from batchclf.results.listing import Listing
from batchclf.results.run_record import (
    FORMAT_VERSION,
    NOTHING_DURABLE,
    Durable,
    Retry,
    RunRecord,
    Segment,
    now,
)
from batchclf.run.classify import Work
from batchclf.runtime.providers import installed_flavours
from batchclf.system.machine import boot_id

_LIMITS = {"max_pixels", "max_bytes", "max_seconds", "strict", "allow_outside_links"}


def record_of(work: Work, fingerprint: Fingerprint, listing: Listing) -> RunRecord:
    """A run that begins with nothing done."""
    plan, task, opened = work.plan, work.plan.task, work.opened
    bundle = task.model.bundle
    return RunRecord(
        job=task.job.model_dump(mode="json"),
        fingerprint=fingerprint,
        started_at=now(),
        num_images=task.num_images,
        num_left_out=listing.num_left_out,
        model={"name": bundle.meta.name, **bundle.meta.source},
        converted_model=None if opened.bundle.digest == bundle.digest else facts(opened.bundle),
        num_streams=work.num_streams,
        num_workers=plan.num_workers,
        backend=plan.backend,
        jpeg_decoder=decoder_name(),
        resampler=resampler_name(),
        batch_size=plan.batch_size,
        part=opened.part,
        provider=opened.provider,
        precision=task.job.precision,
        precision_check=opened.precision_check,
        decode=task.job.loader.decode,
        versions={
            "batchclf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow")},
            **installed_readers(),
            **installed_flavours(),
        },
        durable=NOTHING_DURABLE,
        segments=(_segment(work, 0),),
        format_version=FORMAT_VERSION,
        status="running",
        ended_at=None,
        error=None,
        retry=None,
        retries=(),
    )


def gone_on(record: RunRecord, previous: RunRecord, done: Done) -> RunRecord:
    """A run that goes on after what an earlier one has `done`."""
    (own,) = record.segments
    part = replace(own, first=done.num_images)
    return replace(
        record,
        retries=previous.retries,
        num_merged=previous.num_merged,
        durable=_still_durable(previous, done),
        segments=(*_written_segments(previous, done), part),
    )


def finished(previous: RunRecord, done: Done) -> RunRecord:
    """A run that has all records already, and only says so."""
    return replace(
        previous,
        status="running",
        durable=_still_durable(previous, done),
        segments=_written_segments(previous, done),
        retry=None,
        error=None,
        ended_at=None,
    )


def retried(
    record: RunRecord, previous: RunRecord, done: Done, codes: Collection[str]
) -> RunRecord:
    """A run that tries errors with some codes again; it begins with all records synced."""
    (own,) = record.segments
    attempt = vars(own) | {"first": done.num_images, "codes": tuple(sorted(codes))}
    return replace(
        record,
        durable=Durable(done.num_bytes, done.num_images, boot_id()),
        segments=_written_segments(previous, done),
        retry=Retry(**attempt),
        retries=previous.retries,
        num_merged=previous.num_merged,
    )


def is_same_retry(previous: RunRecord, record: RunRecord) -> bool:
    """Whether an earlier run was stopped in the very attempt that this one is to make."""
    before, after = previous.retry, record.retry
    return (
        before is not None
        and after is not None
        and previous.status != "complete"
        and previous.durable.is_of_this_boot
        and (before.codes, dict(before.limits)) == (after.codes, dict(after.limits))
    )


def _segment(work: Work, first: int) -> Segment:
    """How this run's part of the records, from number `first` of the shard on, is made."""
    plan, opened = work.plan, work.opened
    return Segment(
        first=first,
        started_at=now(),
        batchclf=__version__,
        provider=opened.provider.active,
        device=opened.provider.device,
        batch_size=plan.batch_size,
        num_streams=work.num_streams,
        num_workers=plan.num_workers,
        backend=plan.backend,
        limits=plan.task.job.loader.model_dump(include=_LIMITS, mode="json"),
    )


def _still_durable(previous: RunRecord, done: Done) -> Durable:
    """What was durable, as far as it is kept."""
    if previous.status == "complete":
        return Durable(done.num_bytes, done.num_images, boot_id())
    before = previous.durable
    return replace(
        before,
        num_bytes=min(before.num_bytes, done.num_bytes),
        num_images=min(before.num_images, done.num_images),
    )


def _written_segments(previous: RunRecord, done: Done) -> tuple[Segment, ...]:
    """The earlier runs that wrote records which are kept."""
    starts = [*(one.first for one in previous.segments[1:]), done.num_images]
    return tuple(
        one
        for one, following in zip(previous.segments, starts, strict=False)  # of no segment, no end
        if one.first < min(following, done.num_images)
    )
