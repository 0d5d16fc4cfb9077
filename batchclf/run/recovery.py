"""After a process of a run died, or before it must: what was to blame."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from itertools import islice

from batchclf.errors import DeviceLost, EnvironmentFailed, OutOfMemory, ProviderError
from batchclf.images.load import loader_of
from batchclf.images.prefetch import Quarantine
from batchclf.images.processes import try_alone
from batchclf.images.source import Source
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import Failure, ImageRef
from batchclf.results.stats import StatsCollector
from batchclf.run.reporter import Reporter
from batchclf.run.request import Recovery
from batchclf.runtime.faults import is_device_lost, is_out_of_memory
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.spec.job import JobSpec

_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError, ProviderError)
"""What a lack of memory or a lost device may come as."""


def try_suspects(
    job: JobSpec,
    source: Source,
    model: ResolvedModel,
    recovery: Recovery,
    refs: Iterable[ImageRef],
    reporter: Reporter,
) -> Recovery:
    """Try alone what was being decoded when a process died or hung; the guilty are quarantined."""
    if not recovery.suspects:
        return recovery
    load = Quarantine(loader_of(job, source, model.preprocess), recovery.quarantined)
    shape_HWC = (*model.preprocess.crop, 3)
    guilty: dict[bytes, Failure] = {}
    for ref in islice(refs, max(recovery.suspects) + 1):
        if ref.index not in recovery.suspects:
            continue
        try:
            failure = try_alone(load, ref, shape_HWC, job.loader.max_seconds, reporter.beat)
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
    return replace(recovery, suspects=(), quarantined={**recovery.quarantined, **guilty})


@contextmanager
def explained(model: ResolvedModel, batch_size: int) -> Iterator[None]:
    """ONNX Runtime's errors for a lack of memory and for a lost device, as what they are.

    Raises:
        OutOfMemory: memory did not suffice for a batch.
        DeviceLost: this process cannot use its device any more.
    """
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            can_be_smaller = batch_size > 1 and model.bundle.meta.fixed_batch is None
            raise OutOfMemory(batch_size, str(error), can_be_smaller=can_be_smaller) from error
        if is_device_lost(error):
            raise DeviceLost(str(error)) from error
        raise


def go_on_counting(stats: StatsCollector, recovery: Recovery) -> None:
    """Let figures be those of the whole run, where it began in another process."""
    if recovery.beginning is not None:
        stats.started(*astuple(recovery.beginning))
