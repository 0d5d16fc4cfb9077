"""Class scores to the records' predictions: softmax and top k.

Array shapes: N images of a batch, K classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchclf.results.records import Failure, Prediction, Scores


def rank(
    scores_NK: Scores, labels: Sequence[str], top_k: int, *, is_probability: bool
) -> list[tuple[Prediction, ...] | Failure]:
    """The `top_k` classes of each row, best first; equal scores in the order of their index.

    `scores_NK` are logits unless `is_probability`. A row with a NaN or an infinite value is a
    `non_finite_output` failure, never a label.
    """
    num_classes = scores_NK.shape[1]
    kept = min(top_k, num_classes)
    finite_N = np.logical_and.reduce(np.isfinite(scores_NK), axis=1)
    if not finite_N.all():
        scores_NK = np.where(finite_N[:, None], scores_NK, 0)
    probability_NK = scores_NK if is_probability else softmax(scores_NK)
    # The k-th best value of each row; several classes may share it.
    threshold_N = np.partition(scores_NK, num_classes - kept, axis=1)[:, num_classes - kept]
    ranked: list[tuple[Prediction, ...] | Failure] = []
    for scores_K, probability_K, threshold, finite in zip(
        scores_NK, probability_NK, threshold_N, finite_N, strict=True
    ):
        if not finite:
            ranked.append(Failure("non_finite_output", "the model's scores hold NaN or infinity"))
            continue
        candidates = np.flatnonzero(scores_K >= threshold)
        order = np.argsort(-scores_K[candidates], kind="stable")[:kept]
        ranked.append(
            tuple(
                Prediction(labels[index], index, score)
                for index, score in zip(
                    candidates[order].tolist(),
                    probability_K[candidates[order]].tolist(),
                    strict=True,
                )
            )
        )
    return ranked


def softmax(logits_NK: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities of the classes, rows adding up to 1, in float64."""
    # In float64 the difference of two float32 cannot overflow.
    logits_NK = logits_NK.astype(np.float64)
    shifted_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    probability_NK: NDArray[np.float64] = shifted_NK / shifted_NK.sum(axis=1, keepdims=True)
    return probability_NK
