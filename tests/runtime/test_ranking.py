"""Scores to predictions: softmax, the k best, ties, rows that are not finite."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from batchclf.results.records import Activation, Failure, Prediction, Scores
from batchclf.runtime.ranking import MANY, rank

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)
LOGITS = arrays(np.float32, SHAPES, elements=st.floats(-80, 80, width=32))
TIED = arrays(np.float32, SHAPES, elements=st.sampled_from([-1.0, 0.0, 0.5]))
ACTIVATIONS: list[Activation] = ["softmax", "sigmoid", "none"]
ANY = arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


def labels_for(scores_NK: Scores) -> list[str]:
    return [f"class {index}" for index in range(scores_NK.shape[1])]


def predictions(outcome: tuple[Prediction, ...] | Failure) -> tuple[Prediction, ...]:
    assert not isinstance(outcome, Failure)
    return outcome


@given(scores_NK=LOGITS | TIED, top_k=st.integers(1, 50), activation=st.sampled_from(ACTIVATIONS))
def test_ranking_equals_a_full_stable_sort(
    scores_NK: Scores, top_k: int, activation: Activation
) -> None:
    ranked = rank(scores_NK, labels_for(scores_NK), top_k, activation=activation)
    assert len(ranked) == len(scores_NK)
    for row, outcome in zip(scores_NK, ranked, strict=True):
        order = np.argsort(-row, kind="stable")[:top_k].tolist()
        assert [one.index for one in predictions(outcome)] == order
        assert [one.label for one in predictions(outcome)] == [f"class {i}" for i in order]


@given(scores_NK=LOGITS | TIED)
def test_the_probabilities_of_all_classes_sum_to_one_and_fall(scores_NK: Scores) -> None:
    for outcome in rank(scores_NK, labels_for(scores_NK), 1000, activation="softmax"):
        scores = [one.score for one in predictions(outcome)]
        assert sum(scores) == pytest.approx(1, abs=1e-4)
        assert scores == sorted(scores, reverse=True)


@given(scores_NK=LOGITS)
def test_softmax_agrees_with_a_float64_reference(scores_NK: Scores) -> None:
    wide = np.exp(scores_NK.astype(np.float64) - scores_NK.max(axis=1, keepdims=True))
    expected_NK = wide / wide.sum(axis=1, keepdims=True)
    ranked = rank(scores_NK, labels_for(scores_NK), 1000, activation="softmax")
    for row, outcome in zip(expected_NK, ranked, strict=True):
        for one in predictions(outcome):
            assert one.score == pytest.approx(row[one.index], rel=1e-4, abs=1e-6)


@given(scores_NK=ANY)
def test_rows_that_are_not_finite_fail_and_leave_the_others_alone(scores_NK: Scores) -> None:
    names = labels_for(scores_NK)
    ranked = rank(scores_NK, names, 3, activation="softmax")
    for row, outcome in zip(scores_NK, ranked, strict=True):
        if np.isfinite(row).all():
            assert outcome == rank(row[None], names, 3, activation="softmax")[0]
        else:
            assert isinstance(outcome, Failure)
            assert outcome.code == "non_finite_output"


def test_the_few_best_classes_are_the_first_of_many() -> None:
    scores_NK = np.random.default_rng(0).integers(0, 40, (8, 3 * MANY)).astype(np.float32)
    names = labels_for(scores_NK)
    few, many = (rank(scores_NK, names, kept, activation="softmax") for kept in (9, MANY + 1))
    assert [predictions(outcome)[:9] for outcome in many] == few


def test_equal_scores_are_ranked_by_index() -> None:
    scores_NK = np.array([[1, 2, 2, 0, 2]], np.float32)
    (outcome,) = rank(scores_NK, "abcde", 2, activation="softmax")
    assert [one.label for one in predictions(outcome)] == ["b", "c"]


def test_probabilities_are_taken_as_they_are() -> None:
    scores_NK = np.array([[0.25, 0.75]], np.float32)
    (outcome,) = rank(scores_NK, ["cat", "dog"], 5, activation="none")
    assert outcome == (Prediction("dog", 1, 0.75), Prediction("cat", 0, 0.25))


def test_a_sigmoid_scores_each_class_by_itself() -> None:
    scores_NK = np.array([[-200.0, -3.0, 0.0, 3.0, 200.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        (outcome,) = rank(scores_NK, "abcde", 5, activation="sigmoid")
    found = [one.score for one in predictions(outcome)]
    expected = [1 / (1 + math.exp(-x)) for x in (200, 3, 0, -3, -200)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_huge_logits_do_not_overflow() -> None:
    scores_NK = np.array([[3e38, -3e38, 0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        try:
            (outcome,) = rank(scores_NK, "abc", 3, activation="softmax")
        except FloatingPointError as error:
            pytest.fail(f"{error} in the softmax of finite logits")
    assert [one.score for one in predictions(outcome)] == [1.0, 0.0, 0.0]


def test_a_batch_of_no_rows_gives_no_outcomes() -> None:
    assert rank(np.zeros((0, 4), np.float32), "abcd", 2, activation="softmax") == []
