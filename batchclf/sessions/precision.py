"""A reduced precision beside fp32, on the job's own images: checked, not trusted.

Array shapes: N images, H rows, W columns, C = 3 (RGB), K classes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from batchclf.errors import PrecisionRefused
from batchclf.results.records import (
    Activation,
    Pixels,
    PrecisionCheck,
    Scores,
    precision_name,
)
from batchclf.runtime.ranking import activated
from batchclf.runtime.timing import least_costs_ms
from batchclf.spec.job import JobSpec

BUDGET_S = 0.5
"""Seconds after which speeds are compared in no further round."""


def require_agreement(check: PrecisionCheck, job: JobSpec) -> None:
    """Refuse a precision whose answers are not those of fp32 often enough.

    Raises:
        PrecisionRefused: below `min_agreement`.
    """
    if check.top1_agreement < job.min_agreement:
        name = precision_name(job.precision, check)
        instead = "leave options: {use_tf32: 1} out" if name == "TF32" else "use precision fp32"
        raise PrecisionRefused(
            f"precision: at {name} the top class is that of fp32 on only "
            f"{check.top1_agreement:.1%} of {check.num_images} of the job's images, and "
            f"min_agreement is {job.min_agreement:.1%} (largest difference of a score: "
            f"{check.max_score_difference:.2f}); {instead}, or lower min_agreement"
        )


def compare_precisions(
    reduced: Callable[[Pixels], Scores],
    full: Callable[[Pixels], Scores],
    pixels_NHWC: Pixels,
    batch_size: int,
    *,
    activation: Activation,
) -> PrecisionCheck:
    """Run both classifiers over the sample and compare them; images with NaN scores disagree."""
    num_images = len(pixels_NHWC)
    num_agreeing = 0
    largest = 0.0
    for batch_NHWC in _padded_batches(pixels_NHWC, batch_size):
        count = min(batch_size, num_images)
        num_images -= count
        reduced_NK, full_NK = (classify(batch_NHWC)[:count] for classify in (reduced, full))
        finite_N = np.isfinite(reduced_NK).all(axis=1) & np.isfinite(full_NK).all(axis=1)
        same_N = reduced_NK.argmax(axis=1) == full_NK.argmax(axis=1)
        num_agreeing += int((finite_N & same_N).sum())
        reduced_NK, full_NK = (
            activated(rows_NK[finite_N], activation) for rows_NK in (reduced_NK, full_NK)
        )
        largest = max(largest, float(np.abs(reduced_NK - full_NK).max(initial=0)))
    return PrecisionCheck(
        len(pixels_NHWC), round(num_agreeing / len(pixels_NHWC), 4), round(largest, 6)
    )


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times as fast as fp32 a precision is."""

    times: float


def measure_speed(
    reduced: Callable[[Pixels], Scores],
    full: Callable[[Pixels], Scores],
    batch_NHWC: Pixels,
    *,
    by_cpu: bool,
) -> Speed:
    """Compare both on one batch, within BUDGET_S or in one round.

    `by_cpu`: as of `least_costs_ms`.
    """
    ends_at = time.perf_counter() + BUDGET_S
    rivals = {"reduced": ([reduced], batch_NHWC), "full": ([full], batch_NHWC)}
    costs_ms = least_costs_ms(rivals, ends_at, by_cpu=by_cpu)
    return Speed(round(costs_ms["full"] / costs_ms["reduced"], 2))


def _padded_batches(pixels_NHWC: Pixels, size: int) -> Iterator[Pixels]:
    for start in range(0, len(pixels_NHWC), size):
        batch_NHWC = np.zeros((size, *pixels_NHWC.shape[1:]), np.uint8)
        rows = pixels_NHWC[start : start + size]
        batch_NHWC[: len(rows)] = rows
        yield batch_NHWC
