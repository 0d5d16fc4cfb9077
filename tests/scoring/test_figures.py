"""The figures are scikit-learn's and SciPy's on the same data."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from batchclf.scoring.figures import NUM_BINS, Figures, Tally, share

NUM_CLASSES = 7
LABELS = {index: f"class {index}" for index in range(NUM_CLASSES)}
FAILED = NUM_CLASSES
"""To scikit-learn, a class that is never the true one."""


class Image(NamedTuple):
    """One image: its class, the classes as ranked, the first one's score; or its failure."""

    truth: int
    ranked: list[int]
    steps: int
    has_failed: bool = False

    @property
    def score(self) -> float:
        return self.steps / 10**6

    @property
    def line(self) -> dict[str, Any]:
        if self.has_failed:
            return {"status": "error", "error": {"code": "truncated", "message": ""}}
        scores = [self.score] + [0.0] * (NUM_CLASSES - 1)
        ranked = zip(self.ranked, scores, strict=True)
        return {
            "status": "ok",
            "predictions": [{"label": "", "index": one, "score": score} for one, score in ranked],
        }


STEPS = st.one_of(
    st.integers(0, 10**6), st.integers(0, NUM_BINS).map(lambda n: n * 10**6 // NUM_BINS)
)
IMAGES = st.lists(
    st.builds(
        Image,
        st.integers(0, NUM_CLASSES - 2),  # the last one has no images
        st.permutations(range(NUM_CLASSES)),
        STEPS,
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=40,
)


def figures_of(images: list[Image], depth: int = 5) -> Figures:
    tally = Tally(depth)
    for image in images:
        tally.add(image.truth, image.line)
    return tally.figures(LABELS)


@settings(max_examples=60)
@given(IMAGES)
def test_accuracy_precision_recall_and_f1_are_scikit_learns(images: list[Image]) -> None:
    truth = [image.truth for image in images]
    predicted = [FAILED if image.has_failed else image.ranked[0] for image in images]
    found = figures_of(images)
    assert found.top1.value == pytest.approx(accuracy_score(truth, predicted))
    classes = [one.index for one in found.classes]
    assert classes == sorted({*truth, *predicted} - {FAILED})
    own = [(one.precision.value, one.recall.value, one.f1, one.support) for one in found.classes]
    expected = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    np.testing.assert_allclose(own, np.transpose(expected), atol=1e-12)
    of_images = sorted(set(truth))
    expected = precision_recall_fscore_support(
        truth, predicted, labels=of_images, average="macro", zero_division=0
    )
    mean = found.mean
    assert (mean.precision, mean.recall, mean.f1) == pytest.approx(expected[:3])


@settings(max_examples=40)
@given(IMAGES)
def test_the_confusion_matrix_is_scikit_learns(images: list[Image]) -> None:
    found = figures_of(images)
    matrix = np.zeros((NUM_CLASSES + 1, NUM_CLASSES + 1), int)
    for truth, predicted, count in found.confusion:
        matrix[truth, FAILED if predicted is None else predicted] = count
    expected = confusion_matrix(
        [image.truth for image in images],
        [FAILED if image.has_failed else image.ranked[0] for image in images],
        labels=range(NUM_CLASSES + 1),
    )
    np.testing.assert_array_equal(matrix, expected)


@settings(max_examples=40)
@given(IMAGES, st.integers(1, 5))
def test_top_5_is_scikit_learns_as_far_as_records_reach(images: list[Image], depth: int) -> None:
    found = figures_of(images, depth)
    worked = [image for image in images if not image.has_failed]
    num_right = 0.0
    if worked:
        ranks = -np.array([np.argsort(image.ranked) for image in worked])
        num_right = top_k_accuracy_score(
            [image.truth for image in worked],
            ranks,
            k=depth,
            labels=range(NUM_CLASSES),
            normalize=False,
        )
    assert (found.top5.num, found.top5.of, found.depth) == (num_right, len(images), depth)


@settings(max_examples=60)
@given(IMAGES)
def test_the_calibration_error_is_that_of_its_definition(images: list[Image]) -> None:
    worked = [image for image in images if not image.has_failed]
    found = figures_of(images)
    if not worked:
        assert found.calibration is None
        return
    right = np.array([image.truth == image.ranked[0] for image in worked], float)
    scores = np.array([image.score for image in worked])
    # The n-th bin ends with n / 15; 15 divides 3,000,000.
    bins = np.array([max(1, -(-image.steps * 3 // (3_000_000 // NUM_BINS))) for image in worked])
    expected = sum(
        abs(right[bins == one].mean() - scores[bins == one].mean()) * (bins == one).mean()
        for one in set(bins)
    )
    assert found.calibration is not None
    assert found.calibration.ece == pytest.approx(expected, abs=1e-9)
    assert [one.num_images for one in found.calibration.bins] == [
        int((bins == one).sum()) for one in range(1, NUM_BINS + 1)
    ]


def test_what_is_no_probability_has_no_calibration_error() -> None:
    image = Image(0, [*range(NUM_CLASSES)], 1_000_001)
    assert figures_of([image, Image(0, image.ranked, 10**6)]).calibration is None


@given(st.integers(1, 10**6).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_intervals_are_wilsons(counts: tuple[int, int]) -> None:
    found = share(*counts)
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_share_of_nothing_may_be_anything() -> None:
    assert share(0, 0) == share(0, 0).__class__(0, 0, 0.0, 0.0, 1.0)
