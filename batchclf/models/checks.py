"""Does a model give its source's answers? Sample pixels and the tolerance of the comparison.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from batchclf.errors import ModelError
from batchclf.results.records import Pixels

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""A model as a plain function on arrays."""


class OpenReference(Protocol):
    """Opens an ONNX file as a function on arrays, on the CPU, for one of its outputs."""

    def __call__(self, model: Path, output: str | None = None, /) -> Run: ...


RTOL = 1e-3
ATOL = 1e-4
"""Tolerances on logits; `ATOL` is for logits of order 1 and grows with the largest of them."""

HALF_SLACK = 10
"""float16 keeps 11 bits: one step of rounding at a model's input shows in its logits."""


def sample_pixels(height: int, width: int) -> Pixels:
    """Three different images, uint8 of shape (3, height, width, 3): gradient, noise, and both."""
    rng = np.random.default_rng(0)
    noise_HWC = rng.integers(0, 256, (height, width, 3))
    rows_H = np.linspace(0, 255, height)[:, None, None]
    columns_W = np.linspace(0, 255, width)[None, :, None]
    smooth_HWC = (rows_H + columns_W * np.array([0.2, 0.5, 1.0])) / 2
    both_HWC = 0.75 * smooth_HWC[::-1] + 0.25 * noise_HWC
    return np.stack([smooth_HWC, noise_HWC, both_HWC]).clip(0, 255).astype(np.uint8)


def tiled(rows_N: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """A batch of `size` made of the given rows, in an order without a period."""
    order = np.random.default_rng(size).integers(0, len(rows_N), size)
    return np.ascontiguousarray(rows_N[order])


def assert_same_scores(
    found_NK: np.ndarray[Any, Any],
    expected_NK: np.ndarray[Any, Any],
    what: str,
    *,
    is_half: bool = False,
) -> None:
    """Refuse scores that are not the expected ones.

    Raises:
        ModelError: another shape, values that are not finite, or a difference over the tolerance.
    """
    if found_NK.shape != expected_NK.shape:
        raise ModelError(
            f"{what}: gives scores of shape {found_NK.shape}, expected {expected_NK.shape}"
        )
    if not np.isfinite(expected_NK).all():
        raise ModelError(
            f"{what}: the source model itself gives NaN or infinite scores; are its weights whole?"
        )
    scale = max(1.0, float(np.abs(expected_NK).max(initial=0)))
    slack = HALF_SLACK if is_half else 1
    if np.allclose(found_NK, expected_NK, rtol=RTOL * slack, atol=ATOL * scale * slack):
        return
    worst = float(np.abs(found_NK - expected_NK).max())
    raise ModelError(
        f"{what}: gives other answers than its source: largest difference {worst:.3g} on scores "
        f"up to {scale:.3g}; the model is not used"
    )
