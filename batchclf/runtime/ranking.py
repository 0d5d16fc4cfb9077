"""Class scores to the records' predictions: softmax or sigmoid, and top k.

Array shapes: N images of a batch, K classes, T of them kept.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchclf.results.records import Activation, Failure, Prediction, Scores

MANY = 100
"""Classes kept of an image above which sorting them all takes less time than finding the best of
those that are left, one after the other (0.1 us each of 1,000)."""


def rank(
    scores_NK: Scores, labels: Sequence[str], top_k: int, *, activation: Activation
) -> list[tuple[Prediction, ...] | Failure]:
    """The `top_k` classes of each row, best first; equal scores in the order of their index.

    `activation` is what `scores_NK` still lack. A row with a NaN or an infinite value is a
    `non_finite_output` failure, never a label.
    """
    kept = min(top_k, scores_NK.shape[1])
    finite_N = np.logical_and.reduce(np.isfinite(scores_NK), axis=1)
    if not finite_N.all():
        scores_NK = np.where(finite_N[:, None], scores_NK, 0)
    best_NT = _best(scores_NK, kept)
    indices = best_NT.tolist()
    scores = _activated_at(best_NT, scores_NK, activation).tolist()
    return [
        tuple(Prediction(labels[index], index, score) for index, score in zip(*row, strict=True))
        if finite
        else Failure("non_finite_output", "the model's scores hold NaN or infinity")
        for finite, *row in zip(finite_N.tolist(), indices, scores, strict=True)
    ]


def _best(scores_NK: Scores, kept: int) -> NDArray[np.intp]:
    """Indices of each row's `kept` highest scores, best first, the lower index first among equals.

    Shape NT, T = `kept`.
    """
    if kept > MANY:
        return np.argsort(-scores_NK, axis=1, kind="stable")[:, :kept]
    left_NK, rows_N = scores_NK.copy(), np.arange(len(scores_NK))
    best_NT = np.empty((len(scores_NK), kept), np.intp)
    for place in range(kept):
        best_N = best_NT[:, place] = left_NK.argmax(axis=1)
        left_NK[rows_N, best_N] = -np.inf
    return best_NT


def _activated_at(
    best_NT: NDArray[np.intp], scores_NK: Scores, activation: Activation
) -> NDArray[np.floating]:
    """What `activated` gives at some places of each row, without computing the others."""
    if activation == "softmax":
        shifted_NK, sums_N1 = _exponentials(scores_NK)
        return np.take_along_axis(shifted_NK, best_NT, axis=1) / sums_N1
    return activated(np.take_along_axis(scores_NK, best_NT, axis=1), activation)


def activated(scores_NK: Scores, activation: Activation) -> NDArray[np.floating]:
    """A model's output with `activation` applied to it."""
    if activation == "softmax":
        return softmax(scores_NK)
    if activation == "sigmoid":
        small_NK = np.exp(-np.abs(scores_NK))  # never above 1, so it does not overflow
        activated_NK: NDArray[np.floating] = np.where(scores_NK >= 0, 1, small_NK) / (1 + small_NK)
        return activated_NK
    return scores_NK


def softmax(logits_NK: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities of the classes, rows adding up to 1; sums are taken in float64."""
    shifted_NK, sums_N1 = _exponentials(logits_NK)
    probability_NK: NDArray[np.floating] = shifted_NK / sums_N1
    return probability_NK


def _exponentials(
    logits_NK: NDArray[np.floating],
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Each class's share of its row, and the sums of the rows, of shape N1."""
    with np.errstate(over="ignore"):  # a difference beyond the type's range: its exponential is 0
        shifted_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    return shifted_NK, shifted_NK.sum(axis=1, keepdims=True, dtype=np.float64)
