"""What went wrong with an image, as the code and the message of its record.

Pillow's exceptions tell little: what a file is, and what it promises, is asked of its own bytes.
"""

import logging
import re
import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from batchclf.images import tiff
from batchclf.images.extras import advice
from batchclf.images.formats import (
    DECODED,
    avif_size,
    content_format,
    describe_stranger,
    promised_bytes,
)
from batchclf.images.jpeg import bits_per_sample

OUT_OF_MEMORY = "out of memory while decoding"
LOGGER = logging.getLogger(__name__)

# What decoders raise on damaged files, collected from Pillow's own test images and from mutated
# ones. Pillow lets more through with every release, so this is no list of what is caught.
_FORESEEN = (
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    ZeroDivisionError,
    AssertionError,
    struct.error,
    zlib.error,
)
_LARGEST_AVIF_PIXELS, _LARGEST_AVIF_EDGE = 2**28, 2**15
"""Of libavif (avif.h, AVIF_DEFAULT_IMAGE_SIZE_LIMIT, ..._DIMENSION_LIMIT), which Pillow keeps."""
_OUR_CODE = str(Path(__file__).parent.parent)
_logged: set[tuple[str, int]] = set()


class BadImage(Exception):
    """An image without pixels; leaves this room only as a `Failure`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def explain(error: Exception, data: bytes, name: bytes) -> BadImage:
    """Whatever was raised while a file was read, as that image's failure.

    What no decoder was known to raise is logged as well, and so is what our own code raised: it may
    be a fault of this program, and would otherwise only show as an image that is called corrupt.
    """
    if isinstance(error, BadImage):
        return error
    if isinstance(error, MemoryError):
        return BadImage("oom", OUT_OF_MEMORY)
    if isinstance(error, UnidentifiedImageError):
        return _explain_unidentified(data)
    _log_unforeseen(error, name)
    text = str(error).strip() or "no more is said"
    return _explain_limit(error, text) or _explain_content(error, text, data)


def _explain_limit(error: Exception, text: str) -> BadImage | None:
    """The failure of an image that is beyond a limit of Pillow's, or of the job's."""
    lowered = text.lower()
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found_pixels = re.search(r"\d+", text)
        return too_large(int(found_pixels[0]) if found_pixels else 0, Image.MAX_IMAGE_PIXELS or 0)
    if "too large for pngimageplugin" in lowered or "exceeds limit" in lowered:
        return BadImage("too_large", text)
    return None


def _explain_content(error: Exception, text: str, data: bytes) -> BadImage:
    lowered = text.lower()
    found = content_format(data)
    if lowered.startswith("unsupported") or "not configured" in lowered:
        return BadImage("unsupported_format", f"{found} that Pillow cannot decode: {text}")
    total = promised_bytes(data, found)
    # A damaged PNG may promise anything; Pillow says itself when one is cut.
    if found != "PNG" and total > len(data):
        return truncated(data, total)
    if found == "TIFF" and (form := tiff.unread_form(data)):
        return unsupported(form, found)
    if "truncated" in lowered or isinstance(error, EOFError):
        return truncated(data, total)
    return BadImage("corrupt", f"{type(error).__name__}: {text}")


def _explain_unidentified(data: bytes) -> BadImage:
    """Why Pillow does not even open a file."""
    found = content_format(data)
    if found is None:
        return BadImage("not_an_image", describe_stranger(data))
    if found not in DECODED:
        return unsupported(found, found)
    if found in ("WEBP", "AVIF", "TIFF") and (total := promised_bytes(data, found)) > len(data):
        return truncated(data, total)
    if found == "TIFF" and (form := tiff.unread_form(data)):
        return unsupported(form, found)
    if found == "TIFF" and (pixels := tiff.odd_pixels(data)):
        return unsupported_mode(f"TIFF in {pixels}")
    if found == "JPEG" and (bits := bits_per_sample(data)) not in (None, 8):
        return unsupported_mode(f"JPEG of {bits} bits")
    if found == "AVIF" and (bad := _too_large_avif(data)):
        return bad
    return not_that_image(data, found)


def not_that_image(data: bytes, found: str) -> BadImage:
    """The failure of a file that only begins as an image does."""
    return BadImage(
        "not_an_image", f"the first bytes of a {found} file, but no image: {data[:8].hex(' ')}"
    )


def unsupported(what: str, found: str) -> BadImage:
    """The failure of a form that is not decoded here, of the format `found`."""
    return BadImage(
        "unsupported_format",
        f"{what}; decoded are JPEG, PNG, WebP, BMP, GIF, TIFF and AVIF: {advice(found)}",
    )


def unsupported_mode(found: str) -> BadImage:
    """The failure of pixels that are not decoded here."""
    return BadImage("unsupported_mode", f"{found}; convert it to 8-bit RGB or 16-bit grey")


def too_large(num_pixels: int, allowed: int) -> BadImage:
    """The failure of an image of more pixels than the job allows."""
    return BadImage("too_large", f"{num_pixels:,} pixels; loader.max_pixels allows {allowed:,}")


def truncated(data: bytes, total: int) -> BadImage:
    """The failure of a file that ends before its image, or before the `total` that it promises."""
    if total > len(data):
        return BadImage("truncated", f"ends after {len(data):,} of {total:,} bytes")
    return BadImage("truncated", f"ends after {len(data):,} bytes, before the image does")


def _too_large_avif(data: bytes) -> BadImage | None:
    width, height = avif_size(data) or (0, 0)
    allowed = Image.MAX_IMAGE_PIXELS or 0
    if width * height > allowed:
        return too_large(width * height, allowed)
    if width * height > _LARGEST_AVIF_PIXELS or max(width, height) > _LARGEST_AVIF_EDGE:
        return unsupported(f"AVIF of {width:,} x {height:,} pixels", "AVIF")
    return None


def _log_unforeseen(error: Exception, name: bytes) -> None:
    """Once for each line of code, since a night may hold a million such images."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return
    place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    is_ours = place[0].startswith(_OUR_CODE)
    if (isinstance(error, _FORESEEN) and not is_ours) or place in _logged:
        return
    _logged.add(place)
    LOGGER.error(
        "%s: recorded as corrupt, though this may be a fault of this program", name, exc_info=error
    )
