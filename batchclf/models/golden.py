"""The golden check: does a session give the answers that the model gave when it was exported?

A bundle holds a few images with their fp32 scores on the CPU. Each session is compared with them
before the first record, so a damaged model, a wrong cache or a broken library is found in the
time of one batch.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchclf.errors import ModelError, ProviderError
from batchclf.models.bundle import GOLDEN_FILE, Bundle, sha256_of
from batchclf.models.checks import Run, assert_same_scores, tiled
from batchclf.results.records import Pixels, Precision, Scores

LARGEST_ERROR: Mapping[Precision, float] = {"fp16": 0.045, "bf16": 0.55, "int8": 0.55}
"""Length of an image's error over all classes, relative to the length of its scores at fp32, where
the bundle does not say how sensitive its model is: int8, and what was written before it did.
Rounding makes less than this (MobileNetV2 in PyTorch's own bf16: 0.4 on a smooth gradient, 0.06 on
photos); wrong weights, a wrong layout or zeros make 1 or more."""
_LEAST_ERROR: Mapping[Precision, float] = {"fp16": 0.045, "bf16": 0.1}
"""Allowed to the least sensitive model, since sums and what lies between layers may round too."""
_SAFETY = 3
"""Times the error that the model itself makes with layers rounded to bf16. OpenVINO's bf16 on AMX
made 0.7 to 1.1 times it (six models, three images each)."""
_HALF_STEPS = 8
"""float16 and TF32 keep 3 bits more than bfloat16."""
_WRONG = 0.9
"""Never allowed: answers that have nothing to do with the image come to 1 or more."""
MAX_GOLDEN_BYTES = 1_000_000_000
"""Four images of the largest crop, unpacked."""
_FP32_DIFFERENCE = 2e-5
"""Two fp32 computations differ less than this, relative to the largest score; fp16 and bf16,
which keep 11 and 8 bits, differ more."""


def write_golden(
    folder: Path,
    run: Run,
    pixels_NHWC: Pixels,
    fixed_batch: int | None = None,
    rounded: Run | None = None,
) -> str:
    """Write golden.npz from the model's answers to a few images; returns its SHA-256.

    `rounded` is the model with its layers rounded to bf16: how far its answers lie from those of
    the model is what is allowed to a session at a reduced precision.
    """
    scores_NK = _one_by_one(run, pixels_NHWC, fixed_batch)
    arrays: dict[str, Any] = {"pixels_NHWC": pixels_NHWC, "scores_NK": scores_NK}
    if rounded is not None:
        found_NK = _one_by_one(rounded, pixels_NHWC, fixed_batch)
        arrays["bf16_error_N"] = errors_of(found_NK, scores_NK, sees_shift=False)
    path = folder / GOLDEN_FILE
    np.savez_compressed(path, **arrays)
    return sha256_of(path)


def _one_by_one(run: Run, pixels_NHWC: Pixels, fixed_batch: int | None) -> Scores:
    size = fixed_batch or 1
    rows = [run(np.repeat(row[None], size, axis=0))[:1] for row in pixels_NHWC]
    return np.concatenate(rows).astype(np.float32)


def read_golden(bundle: Bundle) -> tuple[Pixels, Scores]:
    """A bundle's reference images, uint8 NHWC, and their scores, float32 NK.

    Raises:
        ModelError: the file does not hold them; its digest is right, so it was written like that.
    """
    pixels_NHWC, scores_NK, _ = _read(bundle)
    return pixels_NHWC, scores_NK


def _read(bundle: Bundle) -> tuple[Pixels, Scores, NDArray[np.float64] | None]:
    """The same, and how far rounding to bf16 moves each image's scores, where that was measured."""
    path = bundle.folder / GOLDEN_FILE
    try:
        with zipfile.ZipFile(path) as members:
            num_bytes = sum(member.file_size for member in members.infolist())
        if num_bytes > MAX_GOLDEN_BYTES:
            raise ValueError(f"it unpacks to {num_bytes:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            pixels_NHWC, scores_NK = arrays["pixels_NHWC"], arrays["scores_NK"]
            own_N = arrays.get("bf16_error_N")
        expected = (len(scores_NK), *bundle.meta.preprocess.crop, 3)
        if pixels_NHWC.shape != expected or pixels_NHWC.dtype != np.uint8 or scores_NK.ndim != 2:
            raise ValueError(f"its images are {pixels_NHWC.dtype} of shape {pixels_NHWC.shape}")
        if own_N is not None and own_N.shape != (len(scores_NK),):
            raise ValueError(f"its bf16_error_N has the shape {own_N.shape}")
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path}: holds no reference answers: {error}; write the bundle again with "
            "`batchclf export`"
        ) from error
    return pixels_NHWC, scores_NK, own_N


def check_golden(
    bundle: Bundle,
    classify: Callable[[Pixels], Scores],
    *,
    where: str,
    precision: Precision = "fp32",
    rounding: Precision | None = None,
    batch_size: int | None = None,
) -> None:
    """Refuse a session that does not give the bundle's own answers.

    Args:
        classify: the session, as a function.
        where: what it runs on, for the message.
        precision: what it is to compute in.
        rounding: as which precision it may round; None: as that one.
        batch_size: the one batch size it takes; None: as many images as there are.

    Raises:
        ProviderError: other answers, or those of another precision than the one asked for.
    """
    pixels_NHWC, expected_NK, own_N = _read(bundle)
    rounding = rounding or precision
    if rounding == "fp32":
        rounding = bundle.meta.arithmetic
    largest_N = _largest_errors(own_N, rounding, len(expected_NK))
    size = batch_size or len(pixels_NHWC)
    if size > len(pixels_NHWC):
        pixels_NHWC, expected_NK, largest_N = (
            tiled(rows, size) for rows in (pixels_NHWC, expected_NK, largest_N)
        )
    parts = [
        classify(np.resize(pixels_NHWC[first : first + size], (size, *pixels_NHWC.shape[1:])))
        for first in range(0, len(pixels_NHWC), size)
    ]
    found_NK = np.concatenate(parts)[: len(expected_NK)]
    what = f"{bundle.meta.name} on {where}"
    try:
        if rounding == "fp32":
            assert_same_scores(found_NK, expected_NK, what)
        else:
            _assert_alike(
                found_NK,
                expected_NK,
                largest_N,
                what,
                sees_shift=bundle.meta.activation != "softmax",
            )
    except ModelError as error:
        raise ProviderError(
            f"{error}. The model's file is whole (its SHA-256 was compared), so suspect the "
            "provider's libraries, driver, compile cache or device"
        ) from error
    # Probabilities near 0 and 1 are the same at any precision, and tell nothing.
    is_fp32 = bundle.meta.arithmetic == "fp32" and bundle.meta.activation != "none"
    if is_fp32 and precision in ("fp16", "bf16"):
        _require_in_effect(found_NK, expected_NK, precision, where)


def _assert_alike(
    found_NK: Scores,
    expected_NK: Scores,
    largest_N: NDArray[np.float64],
    what: str,
    *,
    sees_shift: bool,
) -> None:
    """`sees_shift`: whether scores differ that lie higher by the same for all classes."""
    if found_NK.shape != expected_NK.shape:
        raise ModelError(
            f"{what}: gives scores of shape {found_NK.shape}, expected {expected_NK.shape}"
        )
    if not np.isfinite(found_NK).all():
        raise ModelError(f"{what}: gives NaN or infinite scores")
    error_N = errors_of(found_NK, expected_NK, sees_shift=sees_shift)
    if not (error_N <= largest_N).all():
        worst = (error_N / largest_N).argmax()
        raise ModelError(
            f"{what}: gives other answers than its source: the error of an image's scores is "
            f"{error_N[worst]:.2g} of their length at fp32, at most {largest_N[worst]:.2g} is "
            "rounding"
        )


def _largest_errors(
    own_N: NDArray[np.float64] | None, rounding: Precision, num_images: int
) -> NDArray[np.float64]:
    """What rounding may come to for each image, in the unit of `errors_of`."""
    if rounding == "fp32":
        return np.zeros(num_images)
    if own_N is None or rounding == "int8":
        return np.full(num_images, LARGEST_ERROR[rounding])
    likely_N = own_N / (_HALF_STEPS if rounding == "fp16" else 1)
    largest_N: NDArray[np.float64] = np.clip(_SAFETY * likely_N, _LEAST_ERROR[rounding], _WRONG)
    return largest_N


def errors_of(found_NK: Scores, expected_NK: Scores, *, sees_shift: bool) -> NDArray[np.float64]:
    """Length of each image's error over all classes, relative to that of its expected scores."""
    length_N = np.linalg.norm(_centred(expected_NK), axis=1)
    # An image that the model hardly decides on is measured by those that it is sure of.
    length_N = np.maximum(length_N, np.sqrt((length_N**2).mean()))
    # An untrained head gives every class the same score: then nothing but noise may be added.
    error_NK = found_NK - expected_NK if sees_shift else _centred(found_NK) - _centred(expected_NK)
    error_N: NDArray[np.float64] = np.linalg.norm(error_NK, axis=1).astype(np.float64)
    return error_N / np.where(length_N, length_N, 1)


def _centred(scores_NK: Scores) -> NDArray[np.float64]:
    """Scores less their mean over the classes, which softmax does not see either."""
    mean_N = scores_NK.mean(axis=1, keepdims=True, dtype=np.float64)
    return scores_NK - mean_N if scores_NK.shape[1] > 1 else scores_NK.astype(np.float64)


def _require_in_effect(
    found_NK: Scores, expected_NK: Scores, precision: Precision, where: str
) -> None:
    """A provider that cannot compute in a precision may go on in fp32 and say nothing."""
    largest = float(np.abs(expected_NK).max())
    difference = float(np.abs(found_NK - expected_NK).max()) / largest if largest else 1.0
    if difference < _FP32_DIFFERENCE:
        raise ProviderError(
            f"precision: {precision} was asked for, but {where} computed in fp32: the scores "
            f"differ by {difference:.1g} of the largest only. Use precision fp32"
        )
