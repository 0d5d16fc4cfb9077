"""What was to blame for the end of a process: an image, the memory, the device."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

from batchclf.errors import DeviceLost, EnvironmentFailed, OutOfMemory, ProviderError
from batchclf.images.decode_pool import try_alone
from batchclf.images.load import loader_of
from batchclf.images.prefetch import Quarantine
from batchclf.results.records import Failure, ImageRef
from batchclf.run.plan import Task
from batchclf.run.request import Run
from batchclf.runtime.faults import is_device_lost, is_out_of_memory
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.system.alive import watched

_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError, ProviderError)
"""What a lack of memory or a lost device may come as."""


def try_suspects(run: Run, task: Task, refs: Iterable[ImageRef]) -> Run:
    """Try alone what was being decoded when a process died or hung; the guilty are quarantined.

    Raises:
        EnvironmentFailed: no process is to be had.
    """
    job, recovery, reporter = run.job, run.recovery, run.reporter
    if not recovery.suspects:
        return run
    loader = loader_of(job, task.source, task.model.preprocess)
    load = Quarantine(loader, recovery.quarantined)
    shape_HWC = (*task.model.preprocess.crop, 3)
    guilty: dict[bytes, Failure] = {}
    for ref in islice(refs, max(recovery.suspects) + 1):
        if ref.index not in recovery.suspects:
            continue
        try:
            with watched(reporter.beat):
                handed = loader.fetched(ref)
            failure = try_alone(load, handed, shape_HWC, job.loader.max_seconds, reporter.beat)
        except OSError as error:
            raise EnvironmentFailed(
                f"no process in which to try an image alone: {error}; run again to resume"
            ) from error
        if failure is None:
            reporter.log(f"{os.fsdecode(ref.path)}: tried alone, does no harm")
            continue
        reporter.log(f"{os.fsdecode(ref.path)}: recorded as {failure.code}: {failure.message}")
        reporter.found_guilty(ref.path, failure)
        guilty[ref.path] = failure
    found = replace(recovery, suspects=(), quarantined={**recovery.quarantined, **guilty})
    return replace(run, recovery=found)


@contextmanager
def explained(task: Task, batch_size: int) -> Iterator[None]:
    """ONNX Runtime's errors for a lack of memory and for a lost device, as what they are.

    Raises:
        OutOfMemory: memory did not suffice for a batch.
        DeviceLost: this process cannot use its device any more.
    """
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            can_be_smaller = batch_size > 1 and task.model.bundle.meta.fixed_batch is None
            raise OutOfMemory(batch_size, str(error), can_be_smaller=can_be_smaller) from error
        if is_device_lost(error):
            raise DeviceLost(str(error)) from error
        raise
