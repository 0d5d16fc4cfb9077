"""How often predictions are right, class by class, and how far their scores can be believed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from batchclf.results.lines import SCORE_STEPS

NUM_BINS = 15
"""Of equal width; a score on the border of two is in the lower one."""
DEPTH = 5
_Z = 1.959963984540054
"""Of the normal distribution: 95% lie within so many standard deviations."""


@dataclass(frozen=True, slots=True)
class Share:
    """How many of how many, and between which shares Wilson's interval (95%) has it."""

    num: int
    of: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class; what is undefined, such as the precision where nothing was predicted, is 0."""

    index: int
    label: str
    support: int
    """Images of this class, with those that failed."""
    num_predicted: int
    num_failed: int
    precision: Share
    recall: Share
    f1: float


@dataclass(frozen=True, slots=True)
class Mean:
    """Over the classes that have images, each counted alike."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class Bin:
    """The images whose top score lies in a range."""

    low: float
    high: float
    num_images: int
    mean_score: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error of the top scores, over images that did not fail."""

    ece: float
    bins: Sequence[Bin]


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted of images with a true label."""

    num_images: int
    num_errors: int
    errors_by_code: Mapping[str, int]
    top1: Share
    """Of all images: those that failed are wrong."""
    top1_of_ok: Share
    """Of those that did not fail."""
    top5: Share
    depth: int
    """Classes that the records hold, at most 5: `top5` looks at no more."""
    mean: Mean
    classes: Sequence[ClassScore]
    """Those that have images or were predicted."""
    confusion: Sequence[tuple[int, int | None, int]]
    """True class, predicted one (None: failed) and how often, where that is not 0."""
    calibration: Calibration | None
    """None: a score lies outside of 0 to 1, so it is no probability; or there is none."""


@dataclass(slots=True)
class Tally:
    """Counts of classes and scores: its size does not depend on the number of images."""

    depth: int
    """As of `Figures`."""
    cells: Counter[tuple[int, int | None]] = field(default_factory=Counter)
    errors_by_code: Counter[str] = field(default_factory=Counter)
    num_in_depth: int = 0
    bins: list[list[int]] = field(default_factory=lambda: [[0, 0, 0] for _ in range(NUM_BINS)])
    """Of each: images, images that are right, and their scores in steps."""
    has_probabilities: bool = True

    def add(self, truth: int, line: Mapping[str, Any]) -> None:
        """Count the record of an image whose class is known."""
        if line["status"] != "ok":
            self.cells[truth, None] += 1
            self.errors_by_code[line["error"]["code"]] += 1
            return
        predictions = line["predictions"]
        top = predictions[0]
        index, steps = top["index"], round(top["score"] * SCORE_STEPS)
        self.cells[truth, index] += 1
        if index == truth or any(one["index"] == truth for one in predictions[1 : self.depth]):
            self.num_in_depth += 1
        if 0 <= steps <= SCORE_STEPS:
            # Whole numbers: 0.6 * 15 need not be 9.
            one_bin = self.bins[max(0, (steps * NUM_BINS - 1) // SCORE_STEPS)]
            one_bin[0] += 1
            one_bin[1] += index == truth
            one_bin[2] += steps
        else:
            self.has_probabilities = False

    def figures(self, labels: Mapping[int, str]) -> Figures:
        """All that follows from the counts."""
        num_images, num_errors = self.cells.total(), self.errors_by_code.total()
        num_right = sum(self.cells[one] for one in self.cells if one[0] == one[1])
        classes = tuple(self._classes(labels))
        return Figures(
            num_images=num_images,
            num_errors=num_errors,
            errors_by_code=dict(self.errors_by_code.most_common()),
            top1=share(num_right, num_images),
            top1_of_ok=share(num_right, num_images - num_errors),
            top5=share(self.num_in_depth, num_images),
            depth=self.depth,
            mean=_mean([one for one in classes if one.support]),
            classes=classes,
            confusion=[(*cell, count) for cell, count in sorted(self.cells.items(), key=_order)],
            calibration=self._calibration() if num_images > num_errors else None,
        )

    def _classes(self, labels: Mapping[int, str]) -> Iterator[ClassScore]:
        support: Counter[int] = Counter()
        predicted: Counter[int] = Counter()
        for (truth, index), count in self.cells.items():
            support[truth] += count
            if index is not None:
                predicted[index] += count
        for index in sorted({*support, *predicted}):
            num_right = self.cells[index, index]
            yield ClassScore(
                index=index,
                label=labels[index],
                support=support[index],
                num_predicted=predicted[index],
                num_failed=self.cells[index, None],
                precision=share(num_right, predicted[index]),
                recall=share(num_right, support[index]),
                f1=2 * num_right / (support[index] + predicted[index]),
            )

    def _calibration(self) -> Calibration | None:
        if not self.has_probabilities:
            return None
        num_images = sum(one[0] for one in self.bins)
        apart = sum(abs(right * SCORE_STEPS - steps) for _, right, steps in self.bins)
        return Calibration(
            ece=apart / (num_images * SCORE_STEPS),
            bins=[
                Bin(
                    low=number / NUM_BINS,
                    high=(number + 1) / NUM_BINS,
                    num_images=count,
                    mean_score=steps / count / SCORE_STEPS if count else None,
                    accuracy=right / count if count else None,
                )
                for number, (count, right, steps) in enumerate(self.bins)
            ],
        )


def share(num: int, of: int) -> Share:
    """A share with Wilson's interval; of nothing, it is 0, and may be anything."""
    if of == 0:
        return Share(num, of, 0.0, 0.0, 1.0)
    value, z2 = num / of, _Z * _Z
    middle = (value + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * sqrt(value * (1 - value) / of + z2 / (4 * of * of))
    return Share(num, of, value, max(0.0, middle - half), min(1.0, middle + half))


def _mean(classes: Sequence[ClassScore]) -> Mean:
    count = max(1, len(classes))
    return Mean(
        precision=sum(one.precision.value for one in classes) / count,
        recall=sum(one.recall.value for one in classes) / count,
        f1=sum(one.f1 for one in classes) / count,
    )


def _order(cell: tuple[tuple[int, int | None], int]) -> tuple[int, int]:
    (truth, predicted), _ = cell
    return truth, -1 if predicted is None else predicted
