"""Samples of more than 8 bits made 8 bits, as the job's `loader.sixteen_bit` says.

Array shapes: H rows and W columns of the image.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batchclf.images.formats import png_bits, png_significant_bits
from batchclf.results.records import SixteenBit

RANGELESS: Final = {"I": "signed or 32-bit integers", "F": "floating-point numbers"}
"""Pillow's modes that it would clip at 255, since nothing tells which value is white."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0
_TIFF_LOWEST, _TIFF_HIGHEST = 340, 341
"""TIFF 6.0: BitsPerSample, PhotometricInterpretation, SMinSampleValue, SMaxSampleValue."""
_DARK: Final = 4
"""An image whose lightest sample is less than white by this factor is hardly more than black."""

_Values = NDArray[np.uint16]


def to_rgb(image: Image.Image, data: bytes, how: SixteenBit) -> tuple[Image.Image, tuple[str, ...]]:
    """A loaded image in 8-bit RGB, and flags where its samples had more bits.

    Pillow would clip deeper samples at 255: a 16-bit image comes out white.
    """
    if image.mode.startswith("I;16"):
        return _grey(image, data, how)
    if image.mode == "RGB":
        rgb = image
    else:
        # From grey premultiplied by its alpha, Pillow goes only there.
        rgb = (image.convert("LA") if image.mode == "La" else image).convert("RGB")
    return rgb, _dark_colours(rgb) if _is_deep(image, data) else ()


def _grey(image: Image.Image, data: bytes, how: SixteenBit) -> tuple[Image.Image, tuple[str, ...]]:
    notes: tuple[str, ...]
    if how == "clip":
        return image.convert("RGB"), ("16bit_clipped",)
    tags = getattr(image, "tag_v2", {})
    values_HW: _Values = np.asarray(image)
    lowest, highest = int(values_HW.min()), int(values_HW.max())
    if how == "stretch":
        pixels_HW, notes = _spread(values_HW, lowest, highest), ("16bit_stretched",)
    elif (said := _said_range(image, data, values_HW)) is not None:
        pixels_HW, notes = _spread(values_HW, *said), ("16bit_scaled",)
    else:
        bits = tags.get(_TIFF_BITS, (16,))[0]
        pixels_HW = (values_HW >> (bits - 8)).astype(np.uint8)
        notes = ("16bit_scaled", *_dark(lowest, highest, (1 << bits) - 1))
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        pixels_HW = ~pixels_HW  # Pillow does so up to 8 bits
    return Image.fromarray(pixels_HW).convert("RGB"), notes


def _said_range(image: Image.Image, data: bytes, values_HW: _Values) -> tuple[int, int] | None:
    """Black and white as the file says them, where that is not simply its bits."""
    tags = getattr(image, "tag_v2", {})
    if image.format == "PNG" and (bits := png_significant_bits(data)) and 8 <= bits < 16:
        # Samples are to be scaled up to all bits; some writers say how many they had, but do not.
        is_low = int(values_HW.max()) >> bits == 0
        is_scaled = not (values_HW & ((1 << (16 - bits)) - 1)).any()
        return (0, (1 << bits) - 1) if is_low and not is_scaled else None
    highest = _number(tags.get(_TIFF_HIGHEST))
    lowest = _number(tags.get(_TIFF_LOWEST)) or 0
    return (lowest, highest) if highest is not None and lowest < highest < 1 << 16 else None


def _number(tag: object) -> int | None:
    """One value for all samples, which may be of any type."""
    first = tag[0] if isinstance(tag, Sequence) and tag else tag
    return int(first) if isinstance(first, int | float) and 0 <= first < 1 << 16 else None


def _spread(values_HW: _Values, lowest: int, highest: int) -> NDArray[np.uint8]:
    """Black at `lowest`, white at `highest`; what lies outside is clipped."""
    span = max(highest - lowest, 1)
    above = np.clip(np.arange(1 << 16, dtype=np.int64) - lowest, 0, span)
    table = ((above * 255 + span // 2) // span).astype(np.uint8)
    pixels_HW: NDArray[np.uint8] = table[values_HW]
    return pixels_HW


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether Pillow has thrown the lower half of 16-bit colours away."""
    if image.format == "PNG":
        return png_bits(data) == 16
    return 16 in getattr(image, "tag_v2", {}).get(_TIFF_BITS, ())


def _dark_colours(rgb: Image.Image) -> tuple[str, ...]:
    lows, highs = zip(*(rgb.getchannel(band).getextrema() for band in "RGB"), strict=True)
    return _dark(min(lows) << 8, (max(highs) << 8) + 255, (1 << 16) - 1)


def _dark(lowest: int, highest: int, white: int) -> tuple[str, ...]:
    return (f"16bit_range:{lowest}-{highest}",) if highest <= white // _DARK else ()
