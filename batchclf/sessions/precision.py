"""A reduced precision beside fp32, on the job's own images: checked, not trusted.

Array shapes: N images, H rows, W columns, C = 3 (RGB), K classes.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from batchclf.errors import PrecisionRefused
from batchclf.results.records import Activation, Pixels, PrecisionCheck, Scores
from batchclf.runtime.ranking import activated
from batchclf.spec.job import JobSpec

_NUM_TURNS = 3


def require_agreement(check: PrecisionCheck, job: JobSpec) -> None:
    """Refuse a precision whose answers are not those of fp32 often enough.

    Raises:
        PrecisionRefused: below `min_agreement`.
    """
    if check.top1_agreement < job.min_agreement:
        raise PrecisionRefused(
            f"precision: at {job.precision} the top class is that of fp32 on only "
            f"{check.top1_agreement:.1%} of {check.num_images} of the job's images, and "
            f"min_agreement is {job.min_agreement:.1%} (largest difference of a score: "
            f"{check.max_score_difference:.2f}); use precision fp32, or lower min_agreement"
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


def measure_speed(
    reduced: Callable[[Pixels], Scores], full: Callable[[Pixels], Scores], batch_NHWC: Pixels
) -> float:
    """How many times as fast as `full` `reduced` is on a batch: the best of a few turns each."""
    turns: list[list[float]] = [[], []]
    for turn in range(1 + _NUM_TURNS):
        for classify, seconds in zip((reduced, full), turns, strict=True):
            started = time.perf_counter()
            classify(batch_NHWC)
            if turn:  # the first plans and allocates
                seconds.append(time.perf_counter() - started)
    reduced_s, full_s = (min(seconds) for seconds in turns)
    return round(full_s / reduced_s, 2)


def _padded_batches(pixels_NHWC: Pixels, size: int) -> Iterator[Pixels]:
    for start in range(0, len(pixels_NHWC), size):
        batch_NHWC = np.zeros((size, *pixels_NHWC.shape[1:]), np.uint8)
        rows = pixels_NHWC[start : start + size]
        batch_NHWC[: len(rows)] = rows
        yield batch_NHWC
