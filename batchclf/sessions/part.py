"""How many images of a batch are inferred at once: as the job says, or what is fastest here.

On a CPU a part of one or two images often beats a whole batch, since what a layer leaves then still
lies in the cache; a small model wants more at once, since each call costs something by itself.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchclf.errors import ProviderError, UsageError
from batchclf.results.records import Pixels
from batchclf.runtime.faults import is_out_of_memory
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.runtime.timing import Run, least_costs_ms
from batchclf.spec.job import JobSpec, runs_on_cpu

LARGEST = 32
"""Images in the largest part that is tried."""
GAIN = 0.97
"""Times the cost up to which a larger part is taken: less may be noise, and costs memory."""
MISSES = 2
"""Larger parts in a row without that gain after which no more are tried."""
BUDGET_S = 1.0
"""Seconds after which no other part, and no further round, begins."""

_MAY_LACK_MEMORY: tuple[type[Exception], ...] = (*ORT_ERRORS, ProviderError)

OpenFor = Callable[[int], Sequence[Run]]
"""Classifiers, one per stream, for parts of so many images."""


def largest_part(batch_size: int) -> int:
    """The largest part to try for batches of this size, for which there is memory; a power of 2."""
    return 1 << min(LARGEST, batch_size).bit_length() - 1


def require_part(job: JobSpec) -> None:
    """Refuse a part that the job's batches or provider cannot have.

    Raises:
        UsageError: naming both.
    """
    part = job.runtime.part
    if part == "auto":
        return
    if not runs_on_cpu(job.provider):
        device = job.provider.device_type
        where = f"{job.provider.name}, device_type {device}" if device else job.provider.name
        raise UsageError(
            f"runtime.part: found {part}; provider {where} infers whole batches: leave it out, and "
            "choose batch_size"
        )
    if part > job.batch_size:
        raise UsageError(
            f"runtime.part: found {part}, which is more than a batch has; give at most "
            f"{job.batch_size}, or a larger batch_size"
        )


@dataclass(frozen=True, slots=True)
class Fastest:
    """The part that was fastest, and the milliseconds per image of each that was tried."""

    num_images: int
    tried: Mapping[str, float]


def fastest_part(open_for: OpenFor, pixels_NHWC: Pixels, *, by_cpu: bool) -> Fastest:
    """Double the part as long as that pays, in calls of all streams at once.

    Each is compared with the best so far, in turns. In doubt the smaller one is taken.

    Args:
        pixels_NHWC: uint8; as many images as the largest part may have.
        by_cpu: as of `least_costs_ms`.

    Raises:
        Exception: what opening or a classifier raised, but for a lack of memory for a larger part.
    """
    ends_at = time.perf_counter() + BUDGET_S
    best, size, num_misses = 1, 2, 0
    runs = {best: open_for(best)}
    tried: dict[str, float] = {}
    while size <= len(pixels_NHWC) and num_misses < MISSES and time.perf_counter() < ends_at:
        try:
            pair = {best: runs[best], size: open_for(size)}
            rivals = {part: (several, pixels_NHWC[:part]) for part, several in pair.items()}
            costs_ms = least_costs_ms(rivals, ends_at, by_cpu=by_cpu)
        except _MAY_LACK_MEMORY as error:
            if is_out_of_memory(error):
                break
            raise
        for part, cost_ms in costs_ms.items():
            tried[str(part)] = min(round(cost_ms, 3), tried.get(str(part), math.inf))
        if costs_ms[size] < GAIN * costs_ms[best]:
            best, num_misses, runs = size, 0, pair
        else:
            num_misses += 1
        size *= 2
    return Fastest(best, tried)
