"""What was to blame for the end of a process: an image, the memory, the device."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice

from batchclf.errors import DeviceLost, OutOfMemory, ProviderError
from batchclf.images.archives.alone import list_alone, no_process_for
from batchclf.images.decode_pool import Blame, try_alone
from batchclf.images.load import Loader, loader_of
from batchclf.results.records import ImageRef, Stretch
from batchclf.run.plan import Task
from batchclf.run.request import Run
from batchclf.runtime.faults import fault_of
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.spec.job import gpus_of

_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError, ProviderError)
"""What a lack of memory or a lost device may come as."""


def try_suspects(run: Run, task: Task, refs: Iterable[ImageRef]) -> Run:
    """Try alone what was being loaded when a process died or hung; the guilty are quarantined.

    Raises:
        EnvironmentFailed: no process is to be had.
    """
    recovery, reporter = run.recovery, run.reporter
    wanted = {*recovery.suspects, *recovery.readers}
    if not wanted:
        return run
    listed = (ref for ref in islice(refs, max(wanted) + 1) if ref.index in wanted)
    # Readers first: then nothing is read for the others that would end this process.
    suspects = sorted(listed, key=lambda ref: ref.index not in recovery.readers)
    loader = loader_of(run.job, task.source, task.model.preprocess)
    quarantined = dict(recovery.quarantined)
    for ref in suspects:
        load = replace(loader, quarantined=quarantined, pace="tried")
        blame = _tried(run, load, ref, is_reader=ref.index in recovery.readers)
        if blame is None:
            reporter.log(f"{os.fsdecode(ref.path)}: tried alone, does no harm")
            continue
        failure = blame.failure
        guilty, what = _guilty(load, ref, blame)
        reporter.log(f"{what}: recorded as {failure.code}: {failure.message}")
        reporter.found_guilty(guilty, failure)
        quarantined[guilty] = failure
    return replace(
        run, recovery=replace(recovery, suspects=(), readers=(), quarantined=quarantined)
    )


def try_listing(run: Run) -> Run:
    """List alone the archive at which a process died or hung; a guilty one is not listed again.

    Raises:
        EnvironmentFailed: no process is to be had.
    """
    archive, reporter = run.recovery.listing, run.reporter
    if archive is None:
        return run
    path = archive.file.path
    failure = list_alone(archive, run.job.loader.max_seconds, reporter.beat)
    unlistable = dict(run.recovery.unlistable)
    if failure is None:
        reporter.log(f"{os.fsdecode(path)}: listed alone, does no harm")
    else:
        reporter.log(f"{os.fsdecode(path)}: recorded as {failure.code}: {failure.message}")
        reporter.found_unlistable(archive, failure)
        unlistable[archive] = failure
    return replace(run, recovery=replace(run.recovery, listing=None, unlistable=unlistable))


def _tried(run: Run, load: Loader, ref: ImageRef, *, is_reader: bool) -> Blame | None:
    """What an image is guilty of; one that is no reader is read here, in passing with others."""
    reporter, crop = run.reporter, load.decoder.preprocess.crop
    reading = partial(reporter.watch.reading, 0)
    handed = nullcontext([ref]) if is_reader else load.fetched([ref], reading)
    with handed as (one,):
        try:
            return try_alone(load, one, (*crop, 3), run.job.loader.max_seconds, reporter.beat)
        except OSError as error:
            raise no_process_for(ref, error) from error


def _guilty(load: Loader, ref: ImageRef, blame: Blame) -> tuple[bytes | Stretch, str]:
    """The image, or all that can only be read at and behind a place of its archive; in words."""
    shown = os.fsdecode(ref.path)
    own = load.store.stretch_of(ref)
    if blame.place is None or own is None:
        return ref.path, shown
    guilty = Stretch(own.archive, *blame.place)
    return guilty, f"{shown}, and what else is read behind the same place of its archive"


@contextmanager
def explained(task: Task, batch_size: int, *, has_sessions: bool = True) -> Iterator[None]:
    """ONNX Runtime's errors for a lack of memory and for a lost device, as what they are.

    GPUs are asked, unless this process is none of those that have its sessions.

    Raises:
        OutOfMemory: memory did not suffice for a batch.
        DeviceLost: this process cannot use its device any more.
    """
    try:
        yield
    except _FAILURES as error:
        fault = fault_of(error, gpus_of(task.job.provider) if has_sessions else ())
        if fault.kind == "memory":
            can_be_smaller = batch_size > 1 and task.model.bundle.meta.fixed_batch is None
            raise OutOfMemory(batch_size, fault.message, can_be_smaller=can_be_smaller) from error
        if fault.kind == "device":
            raise DeviceLost(fault.message) from error
        raise
