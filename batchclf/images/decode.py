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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from batchclf.images.formats import (
    ADVICE,
    DECODED,
    content_format,
    describe_odd_tiff,
    describe_stranger,
    promised_bytes,
    suffix_format,
)
from batchclf.images.jpeg import bits_per_sample, is_reducible, read_jpeg
from batchclf.images.profile import is_srgb, profile_in_jpeg
from batchclf.images.resample import Window, crop_window, resize_window, resized_size
from batchclf.results.records import DecodeMode, Failure, Loaded, Pixels, Preprocess

PIXELS_RECIPE = 1
"""Counted up when an image comes to give other pixels, or another failure, than before."""


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
_RANGELESS = {"I": "signed or 32-bit integers", "F": "floating-point numbers"}
"""Pillow's modes that it would clip at 255, since nothing tells which value is white."""
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
_REDUCED = ("JPEG", "MPO")
"""Formats that libjpeg decodes."""
_SAME_FORMAT = {"DIB": "BMP", "MPO": "JPEG"}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0
"""TIFF 6.0: BitsPerSample, PhotometricInterpretation."""
_DAMAGES = {
    "jpeg_corrupt": "its compressed pixels are damaged",
    "missing_end": "ends without the chunk that should end it",
}
"""Warnings that `loader.strict` makes failures."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes files for one job: what the crop is, and how exact it has to be."""

    preprocess: Preprocess
    mode: DecodeMode = "exact"
    exif_transpose: bool = False
    max_pixels: int = 89_478_485
    strict: bool = False
    """Whether a damaged image that can still be decoded is a failure."""

    def __post_init__(self) -> None:
        # Pillow's limit is one for the process, and a process runs one job. It holds for crops too.
        crop_h, crop_w = self.preprocess.crop
        Image.MAX_IMAGE_PIXELS = max(self.max_pixels, crop_h * crop_w)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process makes it anew, which sets Pillow's limit there.
        return Decoder, tuple(getattr(self, field.name) for field in fields(self))

    def __call__(self, data: bytes, name: bytes, slot_HWC: Pixels) -> Loaded:
        """Decode `data` into `slot_HWC` (uint8, shape crop + (3,)); a failure leaves it zero."""
        try:
            notes = self._decode(data, name, slot_HWC)
            if self.strict:
                _refuse_damage(notes)
            return Loaded(warnings=notes)
        except _BadImage as bad:
            failure = Failure(bad.code, bad.message)
        except MemoryError:
            failure = Failure("oom", OUT_OF_MEMORY)
        slot_HWC[:] = 0
        return Loaded(failure)

    def _decode(self, data: bytes, name: bytes, slot_HWC: Pixels) -> tuple[str, ...]:
        if not data:
            raise _BadImage("empty_file", "the file has 0 bytes")
        jpeg = read_jpeg(data, self.max_pixels, self._reduction, second_look=self.strict)
        if jpeg.pixels_HWC is None:
            notes = self._decode_with_pillow(data, name, slot_HWC)
            return (*notes, "jpeg_corrupt") if jpeg.is_damaged else notes
        picture = _Picture(_image(jpeg.pixels_HWC), jpeg.width, jpeg.height, jpeg.reduction)
        if self.exif_transpose and _APP1 in data:
            picture = picture.upright(_orientation(_open(data), data))
        self._fit(picture, slot_HWC)
        return (*_name_notes("JPEG", name), *_colour_notes(profile_in_jpeg(data)))

    def _decode_with_pillow(self, data: bytes, name: bytes, slot_HWC: Pixels) -> tuple[str, ...]:
        image = _open(data)
        width, height = image.size
        if width * height > self.max_pixels:
            raise _too_large(width * height, self.max_pixels)
        if kind := _RANGELESS.get(image.mode):
            raise _unsupported_mode(f"{image.format} of {kind}")
        reduction = self._reduction(width, height)
        if reduction > 1 and not (image.format in _REDUCED and is_reducible(data)):
            reduction = 1
        try:
            if reduction > 1:
                image.draft(None, (width // reduction, height // reduction))
            image.load()
            rgb, notes = _to_rgb(image)
        except _PILLOW_ERRORS as error:
            raise _explain(error, data) from error
        picture = _Picture(rgb, width, height, reduction)
        if self.exif_transpose:
            picture = picture.upright(_orientation(image, data))
        self._fit(picture, slot_HWC)
        # Last, since counting the frames moves on to others.
        return (*_name_notes(str(image.format), name), *notes, *_content_notes(image, data))

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
        if self.preprocess.channels == "grey":
            rgb = rgb.convert("L").convert("RGB")
        size = resized_size(picture.width, picture.height, self.preprocess.resize)
        crop_h, crop_w = self.preprocess.crop
        window = crop_window(size, (crop_w, crop_h), self.preprocess.crop_rounding)
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
    """In RGB; as Image.fromarray, which also blackens the image first."""
    height, width, num_channels = pixels_HWC.shape
    if num_channels == 4:
        inks = Image.new("CMYK", (width, height), None)
        inks.frombytes(pixels_HWC, "raw", "CMYK;I", 0, 1)  # inverted, as Adobe writes them
        return inks.convert("RGB")
    rgb = Image.new("RGB", (width, height), None)
    rgb.frombytes(pixels_HWC, "raw", "RGB", 0, 1)
    return rgb


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The loaded image in 8-bit RGB, and a flag where its pixels had to be scaled for it.

    Pillow would clip deeper pixels at 255: a 16-bit image comes out white, one of 0.0 to 1.0 black.
    """
    if image.mode == "RGB":
        return image, ()
    if image.mode.startswith("I;16"):
        return _scaled_to_8bit(image).convert("RGB"), ("16bit_scaled",)
    return image.convert("RGB"), ()


def _scaled_to_8bit(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, or of the 12 that a TIFF may hold."""
    tags = getattr(image, "tag_v2", {})
    values_HW = np.asarray(image) >> (tags.get(_TIFF_BITS, (16,))[0] - 8)
    pixels_HW = values_HW.astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        pixels_HW = ~pixels_HW  # Pillow does so up to 8 bits
    return Image.fromarray(pixels_HW)


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
    ImageCms.PyCMSError,
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
    if found in ("WEBP", "AVIF", "TIFF") and (total := promised_bytes(data, found)) > len(data):
        return _truncated(data, total)
    if found == "TIFF" and (pixels := describe_odd_tiff(data)):
        return _unsupported_mode(f"TIFF in {pixels}")
    if found == "JPEG" and (bits := bits_per_sample(data)) not in (None, 8):
        return _unsupported_mode(f"JPEG of {bits} bits")
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
    total = promised_bytes(data, found)
    # A damaged PNG may promise anything; Pillow says itself when one is cut.
    is_cut = found != "PNG" and total > len(data)
    if is_cut or "truncated" in lowered or isinstance(error, EOFError):
        return _truncated(data, total)
    return _BadImage("corrupt", f"{type(error).__name__}: {text}")


def _unsupported_mode(found: str) -> _BadImage:
    return _BadImage("unsupported_mode", f"{found}; convert it to 8-bit RGB or 16-bit grey")


def _refuse_damage(notes: tuple[str, ...]) -> None:
    for note in notes:
        if note in _DAMAGES:
            raise _BadImage(
                "corrupt",
                f"{_DAMAGES[note]} ({note}); loader.strict: false predicts what can be decoded",
            )


def _too_large(num_pixels: int, allowed: int) -> _BadImage:
    return _BadImage("too_large", f"{num_pixels:,} pixels; loader.max_pixels allows {allowed:,}")


def _truncated(data: bytes, total: int) -> _BadImage:
    if total > len(data):
        return _BadImage("truncated", f"ends after {len(data):,} of {total:,} bytes")
    return _BadImage("truncated", f"ends after {len(data):,} bytes, before the image does")


# ---- warnings: what a prediction's reader should know --------------------------------------------


def _name_notes(found: str, name: bytes) -> tuple[str, ...]:
    promised = suffix_format(name)
    if promised is None or _SAME_FORMAT.get(promised, promised) == _SAME_FORMAT.get(found, found):
        return ()
    return ("extension_mismatch",)


def _colour_notes(profile: object) -> tuple[str, ...]:
    """Pillow and torchvision take all pixels for sRGB, as the model was trained."""
    return ("icc_ignored",) if isinstance(profile, bytes) and not is_srgb(profile) else ()


def _content_notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    found = str(image.format)
    notes = list(_colour_notes(image.info.get("icc_profile")))
    if image.has_transparency_data:
        notes.append("has_alpha")
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
