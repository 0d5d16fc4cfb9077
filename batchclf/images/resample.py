"""Resizing arithmetic of torchvision and Pillow: sizes, the crop window, and resizing it alone.

Array shapes: H rows, W columns, C channels; a `size` is (width, height), as in Pillow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batchclf.results.records import CropRounding, Interpolation, Pixels

PRECISION_BITS = 22
"""Fixed-point bits of Pillow's 8-bit coefficients: 32 - 8 - 2 (src/libImaging/Resample.c)."""


_NUM_CACHED = 4096
"""Many images are of few sizes, and this arithmetic would hold the interpreter for each."""


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the resized image that the crop keeps, and where it lies in the crop."""

    left: int
    top: int
    width: int
    height: int
    pad_left: int
    pad_top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge in the resized image, as Pillow crops."""
        return self.left, self.top, self.left + self.width, self.top + self.height


@lru_cache(_NUM_CACHED)
def resized_size(width: int, height: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Size after resizing: shorter edge to `resize`, or exactly (height, width).

    Source: torchvision.transforms.functional._compute_resized_output_size.
    """
    if not isinstance(resize, int):
        return resize[1], resize[0]
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


@lru_cache(_NUM_CACHED)
def crop_window(
    size: tuple[int, int], crop: tuple[int, int], rounding: CropRounding = "even"
) -> Window:
    """Centre crop of `crop` (width, height) from `size`; smaller images are centred and padded.

    Source: torchvision.transforms.functional.center_crop; transformers.image_transforms.center_crop
    where it is rounded down.
    """
    (left, width, pad_left), (top, height, pad_top) = (
        _crop_axis(length, kept, rounding) for length, kept in zip(size, crop, strict=True)
    )
    return Window(left, top, width, height, pad_left, pad_top)


def _crop_axis(length: int, kept: int, rounding: CropRounding) -> tuple[int, int, int]:
    if rounding == "down":
        start = (length - kept) // 2  # below zero: padded, by half rounded up
        return max(start, 0), min(length, kept), max(-start, 0)
    if kept > length:
        return 0, length, (kept - length) // 2
    return round((length - kept) / 2.0), kept, 0


def resize_window(
    pixels_HWC: Pixels,
    size: tuple[int, int],
    window: Window,
    interpolation: Interpolation,
    resampling: Image.Resampling,
) -> Pixels:
    """The window of `pixels_HWC` resized to `size`, with the very bytes a full resize would give.

    For images so long and thin that enlarging them whole would need gigabytes, where Pillow has to
    do it (_resize.c computes the window only, whatever its size). The short axis is left to Pillow;
    of the long one only the window is computed, in Pillow's own fixed-point arithmetic. Enlarging,
    Pillow goes horizontally first, and so do the two cases here (reducing, it may start vertically,
    but then the result is no larger than the source).
    """
    source_h, source_w = pixels_HWC.shape[:2]
    if size[1] >= size[0]:
        rows = _Axis.of(source_h, size[1], window.top, window.height, interpolation)
        strip = Image.fromarray(pixels_HWC[rows.first : rows.last])
        wide = strip.resize((size[0], strip.height), resampling)
        kept = np.asarray(wide)[:, window.left : window.left + window.width]
        return rows.apply(kept)
    columns = _Axis.of(source_w, size[0], window.left, window.width, interpolation)
    strip_WHC = pixels_HWC[:, columns.first : columns.last].transpose(1, 0, 2)
    narrow = Image.fromarray(np.ascontiguousarray(columns.apply(strip_WHC).transpose(1, 0, 2)))
    tall = narrow.resize((narrow.width, size[1]), resampling)
    return np.asarray(tall)[window.top : window.top + window.height]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Fixed-point weights of one axis for the outputs of a window.

    `weights_OT` (int64) holds T taps for each of O outputs, over the inputs `indices_OT`, which
    count from `first`.
    """

    first: int
    last: int
    indices_OT: NDArray[np.int64]
    weights_OT: NDArray[np.int64]

    @classmethod
    def of(
        cls, length: int, resized: int, start: int, count: int, interpolation: Interpolation
    ) -> "_Axis":
        scale = length / resized
        outputs_O = np.arange(start, start + count, dtype=np.float64)
        if interpolation == "nearest":
            nearest_OT = _nearest(scale, start, count)[:, None]
            first, last = int(nearest_OT.min()), int(nearest_OT.max()) + 1
            ones = np.full_like(nearest_OT, 1 << PRECISION_BITS)
            return cls(first, last, nearest_OT - first, ones)
        kernel, radius = _KERNELS[interpolation]
        filter_scale = max(scale, 1.0)
        support = radius * filter_scale
        centers_O = (outputs_O + 0.5) * scale
        lows_O = np.maximum((centers_O - support + 0.5).astype(np.int64), 0)
        highs_O = np.minimum((centers_O + support + 0.5).astype(np.int64), length)
        taps_T = np.arange(math.ceil(support) * 2 + 1)
        indices_OT = lows_O[:, None] + taps_T
        inside_OT = indices_OT < highs_O[:, None]
        offsets_OT = (indices_OT - centers_O[:, None] + 0.5) / filter_scale
        real_OT = np.where(inside_OT, kernel(offsets_OT), 0.0)
        real_OT /= real_OT.sum(axis=1, keepdims=True)
        fixed_OT = np.trunc(real_OT * (1 << PRECISION_BITS) + np.copysign(0.5, real_OT))
        first, last = int(lows_O.min()), int(highs_O.max())
        clipped_OT = np.minimum(indices_OT, highs_O[:, None] - 1) - first
        return cls(first, last, clipped_OT, fixed_OT.astype(np.int64))

    def apply(self, pixels_LXC: Pixels) -> Pixels:
        """Resample the leading axis (L inputs from `first`) into the window's outputs."""
        total_OXC = np.full(
            (len(self.indices_OT), *pixels_LXC.shape[1:]), 1 << (PRECISION_BITS - 1), np.int64
        )
        for tap in range(self.indices_OT.shape[1]):
            total_OXC += pixels_LXC[self.indices_OT[:, tap]] * self.weights_OT[:, tap, None, None]
        pixels_OXC: Pixels = np.clip(total_OXC >> PRECISION_BITS, 0, 255).astype(np.uint8)
        return pixels_OXC


def _nearest(scale: float, start: int, count: int) -> NDArray[np.int64]:
    """Inputs nearest to the outputs from `start`.

    Pillow adds the step up instead of multiplying: the rounding is part of the result.
    """
    position = 0.5 * scale
    while start:
        num_steps = min(start, 1 << 20)
        steps = np.full(num_steps + 1, scale)
        steps[0] = position
        position = float(np.add.accumulate(steps)[-1])
        start -= num_steps
    steps = np.full(count, scale)
    steps[0] = position
    return np.add.accumulate(steps).astype(np.int64)


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution with a = -0.5, as in Pillow."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3), 0.0)


_KERNELS: dict[str, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
