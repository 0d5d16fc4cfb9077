"""One file's bytes into one uint8 slot: the only place that imports Pillow.

`exact` gives the very pixels of torchvision's `ImageClassification` transforms on a PIL image
(`Image.open(...).convert("RGB")`, resize, centre crop). `fast` lets libjpeg decode at a reduced
scale and resizes only what the crop keeps.

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
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from batchclf.images.formats import (
    ADVICE,
    DECODED,
    content_format,
    describe_stranger,
    suffix_format,
)
from batchclf.images.resample import crop_window, resize_window, resized_size
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
FAST_OVERSAMPLING = 2
"""libjpeg's reduced size is at least this many times the resize target: a low mean error."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""Values of EXIF's orientation that swap width and height."""
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
            slot_HWC[:] = 0
            return Loaded(failure=Failure(bad.code, bad.message))

    def _decode(self, data: bytes, name: bytes, slot_HWC: Pixels) -> tuple[str, ...]:
        if not data:
            raise _BadImage("empty_file", "the file has 0 bytes")
        image = _open(data)
        width, height = image.size
        if width * height > self.max_pixels:
            raise _too_large(width * height, self.max_pixels)
        try:
            if self.mode == "fast":
                self._draft(image)
            image.load()
            rgb = (ImageOps.exif_transpose(image) if self.exif_transpose else image).convert("RGB")
            if self.exif_transpose and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
        except _PILLOW_ERRORS as error:
            raise _explain(error, data) from error
        try:
            self._fit(rgb, resized_size(width, height, self.preprocess.resize), slot_HWC)
        except MemoryError as error:
            raise _explain(error, data) from error
        # Last, since counting the frames moves on to others.
        return _notes(image, data, name)

    def _draft(self, image: Image.Image) -> None:
        """Let libjpeg decode at 1/2, 1/4 or 1/8 of the size; other formats ignore it."""
        width, height = image.size
        target_w, target_h = resized_size(width, height, self.preprocess.resize)
        image.draft(None, (target_w * FAST_OVERSAMPLING, target_h * FAST_OVERSAMPLING))

    def _fit(self, rgb: Image.Image, size: tuple[int, int], slot_HWC: Pixels) -> None:
        """Resize to `size` (width, height) and centre-crop as torchvision does, into the slot."""
        crop_h, crop_w = self.preprocess.crop
        filter_ = self.preprocess.interpolation
        window = crop_window(size, (crop_w, crop_h))
        enlarging = size[0] > rgb.width and size[1] > rgb.height
        if enlarging and size[0] * size[1] > MAX_RESIZED_PIXELS:
            pixels_HWC = resize_window(np.asarray(rgb), size, window, filter_, _RESAMPLING[filter_])
        elif self.mode == "fast":
            scale_w, scale_h = rgb.width / size[0], rgb.height / size[1]
            left, top = window.left * scale_w, window.top * scale_h
            right = min(left + window.width * scale_w, rgb.width)
            bottom = min(top + window.height * scale_h, rgb.height)
            part = rgb.resize(
                (window.width, window.height), _RESAMPLING[filter_], (left, top, right, bottom)
            )
            pixels_HWC = np.asarray(part)
        else:
            resized = rgb.resize(size, _RESAMPLING[filter_])
            edges = (
                window.left,
                window.top,
                window.left + window.width,
                window.top + window.height,
            )
            pixels_HWC = np.asarray(resized.crop(edges))
        if pixels_HWC.shape == slot_HWC.shape:
            slot_HWC[:] = pixels_HWC
            return
        # Smaller than the crop: torchvision pads with black around it.
        slot_HWC[:] = 0
        top, left = window.pad_top, window.pad_left
        slot_HWC[top : top + window.height, left : left + window.width] = pixels_HWC


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
        return _BadImage("oom", "out of memory while decoding")
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


def _notes(image: Image.Image, data: bytes, name: bytes) -> tuple[str, ...]:
    found = str(image.format)
    promised = suffix_format(name)
    notes: list[str] = []
    if promised is not None and _SAME_FORMAT.get(promised, promised) != _SAME_FORMAT.get(
        found, found
    ):
        notes.append("extension_mismatch")
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
