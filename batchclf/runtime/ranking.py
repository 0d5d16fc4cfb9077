"""Class scores to the records' predictions: softmax or sigmoid, and top k.

Array shapes: N images of a batch, K classes, T of them kept.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchclf.results.records import Activation, Failure, Prediction, Scores


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
    activated_NK = activated(scores_NK, activation)
    best_NT = _best(scores_NK, kept)
    indices = best_NT.tolist()
    scores = np.take_along_axis(activated_NK, best_NT, axis=1).tolist()
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
    threshold_N = np.partition(scores_NK, -kept, axis=1)[:, -kept]
    is_best_NK = scores_NK >= threshold_N[:, None]
    num_best_N = np.count_nonzero(is_best_NK, axis=1)
    for row in np.flatnonzero(num_best_N > kept):  # several classes share the last place
        last_places = np.flatnonzero(scores_NK[row] == threshold_N[row])
        is_best_NK[row, last_places[kept - num_best_N[row] :]] = False
    candidates_NT = np.nonzero(is_best_NK)[1].reshape(-1, kept)
    order_NT = np.argsort(-np.take_along_axis(scores_NK, candidates_NT, axis=1), kind="stable")
    return np.take_along_axis(candidates_NT, order_NT, axis=1)


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
    with np.errstate(over="ignore"):  # a difference beyond the type's range: its exponential is 0
        shifted_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probability_NK: NDArray[np.floating] = shifted_NK / shifted_NK.sum(
        axis=1, keepdims=True, dtype=np.float64
    )
    return probability_NK
