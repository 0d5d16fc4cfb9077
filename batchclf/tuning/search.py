"""Which combinations to try, in which order, and which of them to choose: arithmetic only.

Decoding and inference are measured alone; what the two let the whole reach is a bound, so a
combination whose bound lies below what another has reached need not be tried.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from batchclf.results.records import DecodeMode
from batchclf.tuning.records import (
    DecodeLimit,
    InferLimit,
    Prediction,
    Result,
    Session,
    Settings,
    Trial,
)

SLACK = 1.05
"""A bound may be this much too low, as its two measurements are noisy themselves."""
NOISE = 0.02
"""Throughputs that differ by less are the same: the simpler settings win."""


CLEAR = 0.03
"""A choice is clear when nothing else is likely to be faster by more than this share."""
USUAL_SIZES = (1, 8, 32, 128)
"""Batch sizes that are tried unless others are named, and then half and double the best."""
PARTS = (1, 2, 4, 8, 16, 32)
"""Of a batch, on a CPU."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured alone, and the bound on the whole that follows."""

    num_cores: int
    on_cpu: bool
    decode: Mapping[tuple[DecodeMode, int], DecodeLimit]
    infer: Mapping[Session, InferLimit]

    def predict(self, settings: Settings) -> Prediction | None:
        """The bound on a combination; None: it was not measured, or does not fit.

        An accelerator infers while the cores decode, so the slower of the two is the bound. On the
        CPU both want the cores: it is cores / (CPU seconds of decoding and inferring an image).
        """
        decode = self.decode[settings.decode, settings.workers]
        infer = self.infer.get(settings.session.alone)
        if infer is None or infer.images_per_s is None or infer.cpu_ms_per_image is None:
            return None
        limit = min(decode.images_per_s, infer.images_per_s)
        if self.on_cpu:
            cpu_ms = decode.cpu_ms_per_image + infer.cpu_ms_per_image
            limit = min(limit, 1000 * self.num_cores / cpu_ms)
        return Prediction(settings, decode.images_per_s, infer.images_per_s, limit)

    def of(self, settings: Settings) -> tuple[DecodeLimit, InferLimit]:
        """What was measured alone of a combination."""
        return self.decode[settings.decode, settings.workers], self.infer[settings.session.alone]

    def best_workers(self, mode: DecodeMode, counts: Sequence[int]) -> tuple[DecodeMode, int]:
        """The decode mode with the first number of workers at which it is as fast as at any."""
        rates = {count: self.decode[mode, count].images_per_s for count in counts}
        return mode, next(one for one in counts if SLACK * rates[one] >= max(rates.values()))


def stream_counts(automatic: int, current: int, num_cores: int, *, on_cpu: bool) -> list[int]:
    """Numbers of streams worth trying, the job's own first."""
    if on_cpu:
        others = [automatic, automatic // 2, 1, min(2 * automatic, num_cores)]
    else:
        others = [automatic, 1, automatic + 1]
    return list(dict.fromkeys(max(1, count) for count in (current, *others)))


def worker_counts(current: int, num_cores: int) -> list[int]:
    """Numbers of decode workers worth trying, the job's own first.

    More than cores help where the disk is waited for, fewer where inference wants the cores.
    """
    return list(dict.fromkeys((current, num_cores, max(1, num_cores // 2), 2 * num_cores)))


def in_measuring_order(sizes: Iterable[int], current: int) -> list[int]:
    """The smallest first, which tells how long the others will take; then the job's own."""
    smallest, *rest = sorted({*sizes, current})
    return list(dict.fromkeys((smallest, *(size for size in rest if size == current), *rest)))


def ranked(candidates: Iterable[Settings], limits: Limits, current: Settings) -> list[Prediction]:
    """The candidates that were measured, highest bound first; among equals the simpler first."""
    found = [one for one in map(limits.predict, candidates) if one is not None]
    return sorted(
        found, key=lambda one: (-_step(one.limit_images_per_s), _effort(one.settings, current))
    )


def _step(rate: float) -> int:
    """Rates a few percent apart are the same step, since they were measured so well only."""
    return round(math.log(rate) / math.log(SLACK))


def can_win(predicted: Prediction, results: Sequence[Result]) -> bool:
    """Whether a combination could beat the best so far, were it as efficient as any so far."""
    if not results:
        return True
    efficiency = max(one.efficiency for one in results)
    best = max(one.images_per_s for one in results)
    return predicted.limit_images_per_s * efficiency * SLACK > best


def summarise(trials: Iterable[Trial]) -> list[Result]:
    """The trials of each combination as one result, fastest first; those too large left out."""
    by_settings: dict[Settings, list[Trial]] = defaultdict(list)
    for trial in trials:
        if not trial.too_large:
            by_settings[trial.settings].append(trial)
    results = [
        Result(
            predicted=group[0].predicted,
            num_trials=len(group),
            # Of an even number the higher: whatever else the machine does only slows it.
            images_per_s=round(statistics.median_high(one.images_per_s for one in group), 4),
            efficiency=round(statistics.median_high(one.efficiency for one in group), 4),
            cpu_ms_per_image=_median(one.cpu_ms_per_image for one in group),
            batch_ms={
                key: _median((one.batch_ms or {})[key] for one in group) for key in ("p50", "p95")
            },
            bottleneck=statistics.mode(one.bottleneck for one in group),
        )
        for group in by_settings.values()
    ]
    return sorted(results, key=lambda one: -one.images_per_s)


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


def finalists(results: Sequence[Result], current: Settings, count: int) -> list[Result]:
    """Those to measure again: the fastest, and the job's own settings to compare with."""
    own = [one for one in results if one.settings == current]
    others = [one for one in results if one.settings != current]
    return own + others[: count - len(own)]


def choose(results: Sequence[Result], current: Settings) -> Result:
    """The simplest of the combinations that are as fast as the fastest, within the noise.

    Only those measured most often are compared: a single measurement wins by luck.
    """
    most = max(one.num_trials for one in results)
    compared = [one for one in results if 2 * one.num_trials > most]
    enough = (1 - NOISE) * max(one.images_per_s for one in compared)
    good = [one for one in compared if one.images_per_s >= enough]
    return min(good, key=lambda one: _effort(one.settings, current))


def possible_gains(trials: Iterable[Trial], chosen: Settings) -> dict[Settings, float]:
    """By which share each other combination may be faster than the chosen one, for all we know.

    The mean of its trials over that of the chosen one's, and two standard errors of their
    difference; of combinations that were measured more than half as often as the chosen one, and
    twice: of fewer trials, the error says nothing.
    """
    rates: dict[Settings, list[float]] = defaultdict(list)
    for trial in trials:
        if not trial.too_large:
            rates[trial.settings].append(trial.images_per_s)
    own = rates.pop(chosen)
    mean, num = statistics.mean(own), len(own)
    if num < 2:
        return dict.fromkeys(rates, math.inf)
    return {
        one: (statistics.mean(found) - mean + 2 * _error(own, found)) / mean
        for one, found in rates.items()
        if len(found) >= 2 and 2 * len(found) > num
    }


def _error(*several: Sequence[float]) -> float:
    return math.sqrt(sum(statistics.variance(found) / len(found) for found in several))


def _effort(settings: Settings, current: Settings) -> tuple[int, int, int, int, int]:
    """What settings ask of the user: other answers, a larger batch, more keys changed."""
    changed = (
        settings.workers != current.workers,
        settings.session.streams != current.session.streams,
        settings.session.threads != current.session.threads,
    )
    return (
        int(settings.session.precision != current.session.precision),
        int(settings.decode != current.decode),
        int(settings != current),
        settings.session.batch_size,
        sum(changed),
    )
