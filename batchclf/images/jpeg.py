"""JPEG through simplejpeg: Pillow's very pixels in less time.

Both wrap libjpeg-turbo, with the same (its most exact) methods. simplejpeg is also stricter: it
tells of damage that Pillow passes over. Whatever it does not take is left to Pillow, which alone
says what is wrong with a file.

Array shapes: H rows and W columns of the image, perhaps reduced, C = 3 (RGB), or 4 (RGBX, as
Pillow keeps colours, or CMYK, inverted as Adobe writes it: 255 is no ink).
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Literal, NamedTuple

from PIL import features
from simplejpeg import decode_jpeg, decode_jpeg_header

from batchclf.images import resampler
from batchclf.results.records import Pixels

USABLE = features.check_feature("libjpeg_turbo") is True
"""Whether simplejpeg's pixels are Pillow's; another libjpeg under a Pillow built here gives others.
"""

_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression")
"""How libjpeg's warnings begin (jerror.h, JWRN_*) where pixels may be wrong."""
_OUTPUTS: Mapping[str, "Layout"] = {
    **dict.fromkeys(("YCbCr", "RGB", "Gray"), "RGB"),
    **dict.fromkeys(("CMYK", "YCCK"), "CMYK"),
}
"""What libjpeg converts each colour space to, under Pillow; CMYK to RGB is Pillow's own way."""

_SEGMENTS = (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
"""Markers that may stand before a frame, each followed by its length: tables, APPn, comments."""
_REDUCIBLE = (b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca")
"""Markers of frames coded by DCT that libjpeg decodes: all but the lossless ones."""

_START = b"\xff\xd8\xff"
_ALONE = (0x00, 0x01, *range(0xD0, 0xD8))
"""What is followed by no length: stuffing, and markers that have no place in a header."""
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
_NEEDED = (*range(0xC0, 0xC5), *range(0xC9, 0xCD), 0xDB, 0xDD, 0xE0, 0xEE)
"""Frames, tables, and the two APPn that tell the colour space: JFIF's and Adobe's."""
_SCAN = 0xDA
_WHOLE_BLOCK = bytes((0, 63, 0))
"""First and last coefficient and bit positions of a scan, in a sequential frame (T.81, B.2.3)."""

Reduction = Callable[[int, int], int]
"""By how much a JPEG of this width and height is reduced while decoding: 1, 2, 4 or 8."""
Claim = Callable[[int, int], None]
"""Told how many pixels of how many bytes there will be, before they are allocated."""
Layout = Literal["RGB", "RGBX", "CMYK"]

_LARGE_PIXELS = 2**22
"""From here on RGBX for Pillow: it takes longer to resize, but is not copied; less time and memory.
"""
_PEAK_BYTES: Mapping[Layout, int] = {"RGB": 8, "RGBX": 5, "CMYK": 12}
"""Of a pixel, with the image that Pillow makes of it."""
_PEAK_BYTES_NATIVE = 4
"""Where Pillow makes none, with what turning it upright or resizing it takes beside."""


class Limits(NamedTuple):
    """What holds for a JPEG to be decoded."""

    max_pixels: int
    reduction: Reduction
    claim: Claim


class Jpeg(NamedTuple):
    """What simplejpeg made of a file."""

    pixels_HWC: Pixels | None = None
    """None: left to Pillow."""
    width: int = 0
    height: int = 0
    """Before any reduction; 0 where there are no pixels."""
    layout: Layout = "RGB"
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
    frame = _frame(data)
    return frame is not None and data[frame + 1 : frame + 2] in _REDUCIBLE


def bits_per_sample(data: bytes) -> int | None:
    """As the header says; None where that is not well-formed. libjpeg is built for 8."""
    frame = _frame(data)
    return data[frame + 4] if frame is not None and frame + 4 < len(data) else None


def read_jpeg(data: bytes, limits: Limits, *, second_look: bool = False) -> Jpeg:
    """Decode a JPEG of at most `max_pixels`; no pixels for any other file, nor any error.

    Where Pillow has to decode, damage is seen by decoding twice, if a `second_look` is asked for.
    """
    if not (data.startswith(_START) and (USABLE or second_look)):
        return Jpeg()
    found = _read(data, limits)
    if found is None:
        found = _read(_bare(data), limits._replace(reduction=_whole)) or Jpeg()
    return found if USABLE else Jpeg(is_damaged=found.is_damaged)


def _read(data: bytes, limits: Limits) -> Jpeg | None:
    """As `read_jpeg`; None where simplejpeg refuses the file, perhaps only for its header."""
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except (ValueError, KeyError, RuntimeError):  # KeyError: a chroma subsampling it has no name of
        return None
    if colours not in _OUTPUTS or width * height > limits.max_pixels:
        return Jpeg()
    factor = limits.reduction(width, height)
    if factor > 1 and not is_reducible(data):
        factor = 1
    reduced_w, reduced_h = -(-width // factor), -(-height // factor)
    layout = _OUTPUTS[colours]
    if layout == "RGB" and not resampler.NATIVE and reduced_w * reduced_h >= _LARGE_PIXELS:
        layout = "RGBX"
    is_native = layout == "RGB" and resampler.NATIVE
    peak_bytes = _PEAK_BYTES_NATIVE if is_native else _PEAK_BYTES[layout]
    limits.claim(reduced_w * reduced_h, peak_bytes)
    # The smallest scale that is no smaller than this; 0 is the full size.
    least_w, least_h = (0, 0) if factor == 1 else (reduced_w, reduced_h)
    try:
        pixels_HWC = decode_jpeg(data, layout, min_width=least_w, min_height=least_h)
    except MemoryError:
        return Jpeg()
    except (ValueError, RuntimeError) as error:
        return Jpeg(is_damaged=True) if str(error).startswith(_DAMAGE) else None
    return Jpeg(pixels_HWC, width, height, layout, factor)


def _whole(width: int, height: int) -> int:
    """What `is_reducible` says of a header that is not well-formed."""
    return 1


def _bare(data: bytes) -> bytes:
    """The file without what simplejpeg stumbles over although it costs no pixel, or nothing.

    That is whatever stands between segments, all segments but those that say how to decode, and
    parameters of a scan that only progressive files have. Markers are found as libjpeg finds them
    (jdmarker.c, next_marker).
    """
    kept, at, is_sequential = [data[:2]], 2, False
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 4:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            scan = data[at : end - 3] + _WHOLE_BLOCK if is_sequential else data[at:end]
            return b"".join((*kept, scan, memoryview(data)[end:]))
        if marker in _NEEDED:
            kept.append(data[at:end])
        elif marker not in _SEGMENTS:
            break
        is_sequential |= marker in _SEQUENTIAL
        at = end
    return b""


def _frame(data: bytes) -> int | None:
    """Where the frame's marker is, if the header leads to it segment by segment (T.81, B.1.1)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] in _SEGMENTS:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at if data[at : at + 1] == b"\xff" else None
