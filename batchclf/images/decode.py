"""One file's bytes into one uint8 slot: simplejpeg or Pillow decodes, Pillow resizes.

`exact` gives the very pixels of torchvision's `ImageClassification` transforms on a PIL image
(`Image.open(...).convert("RGB")`, resize, centre crop). `fast` lets libjpeg decode at a reduced
scale and resizes only what the crop keeps. Neither depends on which of the two decodes.

Array shapes: H rows and W columns of the crop, C = 3 (RGB).
"""

import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from batchclf.images.formats import (
    ADVICE,
    DECODED,
    content_format,
    describe_stranger,
    suffix_format,
)
from batchclf.images.jpeg import is_reducible, read_jpeg
from batchclf.images.resample import Window, crop_window, resize_window, resized_size
from batchclf.results.records import DecodeMode, Failure, Loaded, Pixels, Preprocess


def _silence_libtiff() -> None:
    """Keep libtiff from printing to stderr; its errors reach us as exceptions all the same.

    Pillow offers no setting for it, so the library is found among those it has loaded.
    """
    try:
        loaded = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    # address, permissions, offset, device, inode, path
    for path in {line.split(maxsplit=5)[5] for line in loaded if "/libtiff" in line}:
        library = ctypes.CDLL(path)
        for handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


# What is odd about a file is said in its record; a night's log is not the place.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Pillow checks the size before it allocates; up to twice its limit it would only warn.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
_silence_libtiff()

MAX_RESIZED_PIXELS = 2**25
"""Enlarging to more pixels than this (a very long and thin image), only the crop is computed."""
FAST_FACTORS = ((8, 11), (4, 8), (2, 4))
"""By how much `fast` lets libjpeg reduce, and how many times the resize target an image must be.

What is left is at least twice the target, which hardly changes a pixel; but from 11 times on 1.4
times will do, since at 8 every block becomes one pixel, and most of the decoding is saved.
"""

OUT_OF_MEMORY = "out of memory while decoding"

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of each EXIF orientation (EXIF 2.32, tag 274) upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""
_FROM_RIGHT, _FROM_BELOW = (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations whose first pixels in the file are shown at the right, or below."""
_APP1 = b"\xff\xe1"
"""The JPEG marker before EXIF and XMP: without it there is no orientation to read."""
_TIFF_PIXELS = {273: 279, 324: 325}
"""TIFF 6.0 tags that say where strips and tiles lie: offsets, and their byte counts."""
_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    16: 8,
}
"""Bytes of one value of each TIFF 6.0 and BigTIFF type."""
_REDUCED = ("JPEG", "MPO")
"""Formats that libjpeg decodes."""
_SAME_FORMAT = {"DIB": "BMP", "MPO": "JPEG"}


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes files for one job: what the crop is, and how exact it has to be."""

    preprocess: Preprocess
    mode: DecodeMode = "exact"
    exif_transpose: bool = False
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        # Pillow's limit is one for the process, and a process runs one job. It holds for crops too.
        crop_h, crop_w = self.preprocess.crop
        Image.MAX_IMAGE_PIXELS = max(self.max_pixels, crop_h * crop_w)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process makes it anew, which sets Pillow's limit there.
        return Decoder, (self.preprocess, self.mode, self.exif_transpose, self.max_pixels)

    def __call__(self, data: bytes, name: bytes, slot_HWC: Pixels) -> Loaded:
        """Decode `data` into `slot_HWC` (uint8, shape crop + (3,)); a failure leaves it zero."""
        try:
            return Loaded(warnings=self._decode(data, name, slot_HWC))
        except _BadImage as bad:
            failure = Failure(bad.code, bad.message)
        except MemoryError:
            failure = Failure("oom", OUT_OF_MEMORY)
        slot_HWC[:] = 0
        return Loaded(failure)

    def _decode(self, data: bytes, name: bytes, slot_HWC: Pixels) -> tuple[str, ...]:
        if not data:
            raise _BadImage("empty_file", "the file has 0 bytes")
        jpeg = read_jpeg(data, self.max_pixels, self._reduction)
        if jpeg.pixels_HWC is None:
            notes = self._decode_with_pillow(data, name, slot_HWC)
            return (*notes, "jpeg_corrupt") if jpeg.is_damaged else notes
        picture = _Picture(_image(jpeg.pixels_HWC), jpeg.width, jpeg.height, jpeg.reduction)
        if self.exif_transpose and _APP1 in data:
            picture = picture.upright(_orientation(_open(data), data))
        self._fit(picture, slot_HWC)
        return _name_notes("JPEG", name)

    def _decode_with_pillow(self, data: bytes, name: bytes, slot_HWC: Pixels) -> tuple[str, ...]:
        image = _open(data)
        width, height = image.size
        if width * height > self.max_pixels:
            raise _too_large(width * height, self.max_pixels)
        reduction = self._reduction(width, height)
        if reduction > 1 and not (image.format in _REDUCED and is_reducible(data)):
            reduction = 1
        try:
            if reduction > 1:
                image.draft(None, (width // reduction, height // reduction))
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        except _PILLOW_ERRORS as error:
            raise _explain(error, data) from error
        picture = _Picture(rgb, width, height, reduction)
        if self.exif_transpose:
            picture = picture.upright(_orientation(image, data))
        self._fit(picture, slot_HWC)
        # Last, since counting the frames moves on to others.
        return (*_name_notes(str(image.format), name), *_content_notes(image, data))

    def _reduction(self, width: int, height: int) -> int:
        """By how much libjpeg is to reduce; other eighths than these are slower and no better."""
        if self.mode == "exact":
            return 1
        target_w, target_h = resized_size(width, height, self.preprocess.resize)
        times = min(width / target_w, height / target_h)
        for factor, least in FAST_FACTORS:
            if least <= times:
                return factor
        return 1

    def _fit(self, picture: "_Picture", slot_HWC: Pixels) -> None:
        """Resize and centre-crop as torchvision does, into the slot."""
        rgb = picture.rgb
        size = resized_size(picture.width, picture.height, self.preprocess.resize)
        crop_h, crop_w = self.preprocess.crop
        window = crop_window(size, (crop_w, crop_h))
        filter_ = self.preprocess.interpolation
        enlarging = size[0] > rgb.width and size[1] > rgb.height
        if enlarging and size[0] * size[1] > MAX_RESIZED_PIXELS:
            pixels_HWC = resize_window(np.asarray(rgb), size, window, filter_, _RESAMPLING[filter_])
        elif self.mode == "fast":
            part = rgb.resize(
                (window.width, window.height), _RESAMPLING[filter_], picture.part(window, size)
            )
            pixels_HWC = _pixels(part)
        else:
            resized = rgb.resize(size, _RESAMPLING[filter_])
            is_whole = (window.width, window.height) == size
            pixels_HWC = _pixels(resized if is_whole else resized.crop(window.box))
        if pixels_HWC.shape == slot_HWC.shape:
            slot_HWC[:] = pixels_HWC
            return
        # Smaller than the crop: torchvision pads with black around it.
        slot_HWC[:] = 0
        top, left = window.pad_top, window.pad_left
        slot_HWC[top : top + window.height, left : left + window.width] = pixels_HWC


class _Picture(NamedTuple):
    """An image in RGB of `width` x `height` pixels before libjpeg reduced it.

    Reduced, it is rounded up to whole pixels: the true edge lies within the last column and row,
    or, turned upright, the first. A part taken from edge to edge instead would be shifted visibly.
    """

    rgb: Image.Image
    width: int
    height: int
    reduction: int
    from_right: bool = False
    from_below: bool = False

    def upright(self, orientation: int | None) -> "_Picture":
        """As it should be seen, by its EXIF orientation."""
        if orientation is None or orientation not in _UPRIGHT:
            return self
        rgb = self.rgb.transpose(_UPRIGHT[orientation])
        width, height = self.width, self.height
        if orientation in _SIDEWAYS:
            width, height = height, width
        from_right, from_below = orientation in _FROM_RIGHT, orientation in _FROM_BELOW
        return _Picture(rgb, width, height, self.reduction, from_right, from_below)

    def part(self, window: Window, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box (left, top, right, bottom) in `rgb` that becomes a window of the resized one."""
        left, top, right, bottom = window.box
        rgb_w, rgb_h = self.rgb.size
        true_w, true_h = self.width / self.reduction, self.height / self.reduction
        scale_w, scale_h = true_w / size[0], true_h / size[1]
        first_w = rgb_w - true_w if self.from_right else 0.0
        first_h = rgb_h - true_h if self.from_below else 0.0
        return (
            first_w + left * scale_w,
            first_h + top * scale_h,
            min(first_w + right * scale_w, rgb_w),
            min(first_h + bottom * scale_h, rgb_h),
        )


def _pixels(rgb: Image.Image) -> Pixels:
    """As np.asarray, which takes its time to find out mode and shape."""
    return np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.height, rgb.width, 3)


def _image(pixels_HWC: Pixels) -> Image.Image:
    """As Image.fromarray, which also blackens the image first."""
    height, width, _ = pixels_HWC.shape
    rgb = Image.new("RGB", (width, height), None)
    rgb.frombytes(pixels_HWC, "raw", "RGB", 0, 1)
    return rgb


class _BadImage(Exception):
    """Leaves this module only as a `Failure`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


# What Pillow's parsers raise on damaged files, collected from its own test images and from mutated
# ones. Only calls of Pillow are guarded with it: a bug of ours ends the job.
_PILLOW_ERRORS = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    AssertionError,
    AttributeError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=DECODED)
    except UnidentifiedImageError:
        raise _explain_unidentified(data) from None
    except _PILLOW_ERRORS as error:
        raise _explain(error, data) from error


def _orientation(image: Image.Image, data: bytes) -> int | None:
    try:
        found: int | None = image.getexif().get(_ORIENTATION)
    except _PILLOW_ERRORS as error:
        raise _explain(error, data) from error
    return found


def _explain_unidentified(data: bytes) -> _BadImage:
    found = content_format(data)
    if found is None:
        return _BadImage("not_an_image", describe_stranger(data))
    if found not in DECODED:
        advice = ADVICE.get(found, "convert it")
        return _BadImage(
            "unsupported_format",
            f"{found}; decoded are JPEG, PNG, WebP, BMP, GIF, TIFF and AVIF: {advice}",
        )
    if found in ("WEBP", "AVIF", "TIFF") and (total := _promised_bytes(data, found)) > len(data):
        return _truncated(data, total)
    return _BadImage(
        "not_an_image", f"the first bytes of a {found} file, but no image: {data[:8].hex(' ')}"
    )


def _explain(error: Exception, data: bytes) -> _BadImage:
    """The code for what Pillow raised; its messages are the only thing that tells these apart."""
    text = str(error).strip() or type(error).__name__
    lowered = text.lower()
    found = content_format(data)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found_pixels = re.search(r"\d+", text)
        return _too_large(int(found_pixels[0]) if found_pixels else 0, Image.MAX_IMAGE_PIXELS or 0)
    if isinstance(error, MemoryError):
        return _BadImage("oom", OUT_OF_MEMORY)
    if "too large for pngimageplugin" in lowered or "exceeds limit" in lowered:
        return _BadImage("too_large", text)
    if lowered.startswith("unsupported") or "not configured" in lowered:
        return _BadImage("unsupported_format", f"{found} that Pillow cannot decode: {text}")
    if "truncated" in lowered or isinstance(error, EOFError):
        return _truncated(data, _promised_bytes(data, found))
    # A damaged PNG may promise anything; Pillow says itself when one is cut.
    if found != "PNG" and _promised_bytes(data, found) > len(data):
        return _truncated(data, _promised_bytes(data, found))
    return _BadImage("corrupt", f"{type(error).__name__}: {text}")


def _too_large(num_pixels: int, allowed: int) -> _BadImage:
    return _BadImage("too_large", f"{num_pixels:,} pixels; loader.max_pixels allows {allowed:,}")


def _truncated(data: bytes, total: int) -> _BadImage:
    if total > len(data):
        return _BadImage("truncated", f"ends after {len(data):,} of {total:,} bytes")
    return _BadImage("truncated", f"ends after {len(data):,} bytes, before the image does")


def _promised_bytes(data: bytes, format_: str | None) -> int:
    """How long the container says the file is; 0 where it does not say."""
    if format_ == "WEBP" and len(data) >= 8:
        return int.from_bytes(data[4:8], "little") + 8
    if format_ == "BMP" and len(data) >= 6:
        return int.from_bytes(data[2:6], "little")
    if format_ == "AVIF":
        return _boxes_end(data)
    if format_ == "PNG":
        return _chunks_end(data)
    if format_ == "TIFF":
        return _tiff_end(data)
    return 0


def _boxes_end(data: bytes) -> int:
    """Where the last top-level ISO base media box says it ends (ISO/IEC 14496-12, 4.2)."""
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        if size < 8:  # 0: to the end of the file; else damaged
            return len(data)
        end += size
    return end


def _chunks_end(data: bytes) -> int:
    """Where the last PNG chunk says it ends (ISO/IEC 15948, 5.3): length, type, data, CRC."""
    end = 8
    while end + 8 <= len(data):
        end += 12 + int.from_bytes(data[end : end + 4], "big")
    return end


def _tiff_end(data: bytes) -> int:
    """Where a TIFF's first directory, its values and its pixels end (TIFF 6.0, section 2).

    Many writers put the directory behind the pixels, where a cut takes it away.
    """
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    is_big = 43 in data[2:4]  # BigTIFF
    at, wide, count_bytes, entry_bytes = (8, 8, 8, 20) if is_big else (4, 4, 2, 12)
    start = int.from_bytes(data[at : at + wide], order)
    first = start + count_bytes
    num_entries = int.from_bytes(data[start:first], order)
    last = first + num_entries * entry_bytes
    if last + wide > len(data):
        return last + wide
    end = last
    strips: dict[int, tuple[int, ...]] = {}
    for entry in range(first, last, entry_bytes):
        tag, type_ = (int.from_bytes(data[entry + i : entry + i + 2], order) for i in (0, 2))
        num_values = int.from_bytes(data[entry + 4 : entry + 4 + wide], order)
        size = _TIFF_TYPE_BYTES.get(type_, 0)
        value = entry + 4 + wide
        if size * num_values > wide:
            value = int.from_bytes(data[value : value + wide], order)
            end = max(end, value + size * num_values)
        if (
            size
            and tag in (*_TIFF_PIXELS, *_TIFF_PIXELS.values())
            and value + size * num_values <= len(data)
        ):
            strips[tag] = tuple(
                int.from_bytes(data[value + i : value + i + size], order)
                for i in range(0, size * num_values, size)
            )
    for offsets, counts in _TIFF_PIXELS.items():
        pairs = zip(strips.get(offsets, ()), strips.get(counts, ()), strict=False)
        end = max([end, *(offset + count for offset, count in pairs)])
    return end


# ---- warnings: what a prediction's reader should know --------------------------------------------


def _name_notes(found: str, name: bytes) -> tuple[str, ...]:
    promised = suffix_format(name)
    if promised is None or _SAME_FORMAT.get(promised, promised) == _SAME_FORMAT.get(found, found):
        return ()
    return ("extension_mismatch",)


def _content_notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    found = str(image.format)
    notes: list[str] = []
    if image.has_transparency_data:
        notes.append("has_alpha")
    if image.mode.startswith(_DEEP_MODES):
        # Pillow clips what lies above 255: such an image comes out white, or a float one black.
        notes.append("clipped_to_8bit")
    if found == "PNG" and b"IEND" not in data[-64:] and b"IEND" not in data:
        notes.append("missing_end")
    if found != "MPO" and (num_frames := _num_frames(image)) > 1:
        notes.append(f"pages:{num_frames}" if found == "TIFF" else f"animated:{num_frames}")
    return tuple(notes)


def _num_frames(image: Image.Image) -> int:
    """Frames of the file; the first one is already loaded, so a damaged later one costs nothing."""
    try:
        return int(getattr(image, "n_frames", 1))
    except _PILLOW_ERRORS:
        return 1
