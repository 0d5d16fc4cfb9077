"""JPEG through simplejpeg, where it is installed: Pillow's very pixels in less time.

Both wrap libjpeg-turbo, with the same (its most exact) methods. simplejpeg is also stricter: it
tells of damage that Pillow passes over. Whatever it does not take is left to Pillow, which alone
says what is wrong with a file.

Array shapes: H rows and W columns of the image, perhaps reduced, C = 3 (RGB).
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

from PIL import features

from batchclf.results.records import Pixels

try:
    from simplejpeg import decode_jpeg, decode_jpeg_header
except ImportError:
    USABLE = False
else:
    # Another libjpeg under Pillow would give other pixels.
    USABLE = features.check_feature("libjpeg_turbo") is True

_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression")
"""How libjpeg's warnings begin (jerror.h, JWRN_*) where pixels may be wrong."""
_COLOURS = ("YCbCr", "RGB", "Gray")
"""Colour spaces that both convert to RGB in libjpeg; CMYK and YCCK each converts in its own way."""

_SEGMENTS = (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
"""Markers that may stand before a frame, each followed by its length: tables, APPn, comments."""
_REDUCIBLE = (b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca")
"""Markers of frames coded by DCT that libjpeg decodes: all but the lossless ones."""

Reduction = Callable[[int, int], int]
"""By how much a JPEG of this width and height is reduced while decoding: 1, 2, 4 or 8."""


class Jpeg(NamedTuple):
    """What simplejpeg made of a file."""

    pixels_HWC: Pixels | None = None
    """None: left to Pillow."""
    width: int = 0
    height: int = 0
    """Before any reduction; 0 where there are no pixels."""
    reduction: int = 1
    """The pixels are this many times fewer each way, rounded up."""
    is_damaged: bool = False
    """Whether the compressed pixels are damaged. The header's oddities cost no pixel."""


def decoder_name() -> str:
    """What decodes JPEGs here, as run.json says it."""
    if USABLE:
        return f"simplejpeg {version('simplejpeg')}"
    return f"Pillow {version('pillow')} (libjpeg {features.version('jpg')})"


def is_reducible(data: bytes) -> bool:
    """Whether libjpeg can decode a JPEG at a reduced scale: not a lossless one (marker SOF3).

    To be asked first: Pillow fails on such a file, and simplejpeg 1.9 writes all of its pixels into
    memory for the reduced ones. So a header that does not lead to its frame, segment by segment
    (ITU-T T.81, B.1.1), counts as lossless.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] in _SEGMENTS:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] in _REDUCIBLE


def read_jpeg(data: bytes, max_pixels: int, reduction: Reduction) -> Jpeg:
    """Decode a JPEG of at most `max_pixels`; no pixels for any other file, nor any error."""
    if not (USABLE and data.startswith(b"\xff\xd8\xff")):
        return Jpeg()
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except (ValueError, KeyError, RuntimeError):  # KeyError: a chroma subsampling it has no name of
        return Jpeg()
    if colours not in _COLOURS or width * height > max_pixels:
        return Jpeg()
    factor = reduction(width, height)
    if factor > 1 and not is_reducible(data):
        factor = 1
    # The smallest scale that is no smaller than this; 0 is the full size.
    least_w, least_h = (0, 0) if factor == 1 else (-(-width // factor), -(-height // factor))
    try:
        pixels_HWC = decode_jpeg(data, "RGB", min_width=least_w, min_height=least_h)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Jpeg(is_damaged=str(error).startswith(_DAMAGE))
    return Jpeg(pixels_HWC, width, height, factor)
