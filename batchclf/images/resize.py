"""One image resized into its place, by our own C or by Pillow: the same bytes.

Array shapes: H rows, W columns, C = 3 (RGB); a `size` is (width, height), as in Pillow.
"""

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from batchclf.errors import UsageError
from batchclf.images import resampler
from batchclf.images.resample import Window, resize_window
from batchclf.results.records import DecodeMode, Interpolation, Pixels

if resampler.NATIVE:
    from batchclf.images import _resize

Rgb = Image.Image | Pixels
"""An image in RGB or RGBX, or an array of it."""

MAX_RESIZED_PIXELS = 2**25
"""Enlarging to more pixels than this (a very long and thin image), only the crop is computed."""
LARGE_PIXELS = 2**22
"""From here on an image that Pillow has decoded is not copied out of its memory to be resized."""
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TALL_FIRST = {
    "5c14884c7648da274dfc9556cb0190618c13e5abfd8bc1699bec63ffae45cd6e": True,
    "dbf6a206161b0d11d4e7c577f758fcf0297556e62a1468ac9eb967a09272eab0": False,
}
"""Digests of the known image as Pillow resizes it: since 13 columns first, before 13 rows first."""


class Part(NamedTuple):
    """What of an image is resized to `size`, and the window of that which is wanted."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom edge, in pixels of the image."""
    size: tuple[int, int]
    window: Window


def resize_into(out_HWC: Pixels, rgb: Rgb, part: Part, interpolation: Interpolation) -> None:
    """Resize, and write the window, which is all of `out_HWC` (uint8).

    Raises:
        MemoryError: there is not enough.
    """
    is_copied = isinstance(rgb, np.ndarray) or rgb.width * rgb.height < LARGE_PIXELS
    if not (resampler.NATIVE and is_copied):
        out_HWC[:] = _by_pillow(as_image(rgb), part, interpolation)
        return
    corner = (part.window.left, part.window.top)
    tall_first = goes_tall_first() is not False
    _resize.resize_into(
        *(out_HWC, as_pixels(rgb), part.box, part.size, corner, interpolation),
        *(tall_first, resampler.NATIVE[0]),
    )


def is_too_large(rgb: Rgb, size: tuple[int, int]) -> bool:
    """Whether resizing the whole image to `size` would enlarge it beyond what is sensible."""
    width, height = size_of(rgb)
    is_enlarged = size[0] > width and size[1] > height
    return is_enlarged and size[0] * size[1] > MAX_RESIZED_PIXELS


def _by_pillow(image: Image.Image, part: Part, interpolation: Interpolation) -> Pixels:
    resampling, window = _RESAMPLING[interpolation], part.window
    if is_too_large(image, part.size):
        return resize_window(as_pixels(image), part.size, window, interpolation, resampling)
    resized = image.resize(part.size, resampling, part.box)
    is_whole = (window.width, window.height) == part.size
    return as_pixels(resized if is_whole else resized.crop(window.box))


# ---- images and arrays ---------------------------------------------------------------------------


def size_of(rgb: Rgb) -> tuple[int, int]:
    """Width and height."""
    if isinstance(rgb, Image.Image):
        return rgb.size
    height, width, _ = rgb.shape
    return width, height


def as_pixels(rgb: Rgb) -> Pixels:
    """As np.asarray, which takes its time to find out mode and shape."""
    if not isinstance(rgb, Image.Image):
        return rgb
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")  # RGBX
    return np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.height, rgb.width, 3)


def as_image(rgb: Rgb) -> Image.Image:
    """As Image.fromarray, which also blackens the image first."""
    if isinstance(rgb, Image.Image):
        return rgb
    image = Image.new("RGB", size_of(rgb), None)
    image.frombytes(rgb, "raw", "RGB", 0, 1)
    return image


# ---- whether the installed Pillow is Pillow ------------------------------------------------------


def require_pillow(mode: DecodeMode) -> None:
    """Refuse exact pixels where what is installed as Pillow resizes otherwise.

    Raises:
        UsageError: it does; pillow-simd, for one, which rounds its weights to 16 bits.
    """
    if mode == "exact" and goes_tall_first() is None:
        raise UsageError(
            f"loader.decode: exact: what is installed as Pillow ({Image.__file__}) does not resize "
            "as Pillow does; is it pillow-simd? pip uninstall that and pip install "
            "--force-reinstall 'pillow>=12.3', or give loader.decode: fast"
        )


@cache
def goes_tall_first() -> bool | None:
    """Whether columns are summed up before rows where much of the height goes.

    None: what is installed as Pillow gives other pixels than any Pillow.
    """
    return _TALL_FIRST.get(_digest_of_known())


def _digest_of_known() -> str:
    """Of a tall picture, made by arithmetic, as it is resized here."""
    y_H11, x_1W1, colour = np.ogrid[:211, :53, :3]
    known_HWC = ((7 * y_H11 * y_H11 + 13 * x_1W1 * y_H11 + 101 * x_1W1 + 31 * colour) % 256).astype(
        np.uint8
    )
    resized = Image.fromarray(known_HWC).resize((37, 41), Image.Resampling.BICUBIC)
    return hashlib.sha256(resized.tobytes()).hexdigest()
