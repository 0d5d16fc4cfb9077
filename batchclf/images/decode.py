"""One file's bytes into one uint8 slot: simplejpeg or Pillow decodes, our own C or Pillow resizes.

`exact` gives the very pixels of torchvision's `ImageClassification` transforms on a PIL image
(`Image.open(...).convert("RGB")`, resize, centre crop). `fast` lets libjpeg decode at a reduced
scale and resizes only what the crop keeps. Neither depends on which of them does the work.

Array shapes: H rows and W columns of the crop, C = 3 (RGB).
"""

import io
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from PIL import Image

from batchclf.images.deep import RANGELESS, to_rgb
from batchclf.images.extras import EXTRAS
from batchclf.images.failures import (
    BadImage,
    explain,
    too_large,
    unsupported,
    unsupported_mode,
)
from batchclf.images.foreign import Ask, read_foreign
from batchclf.images.formats import CAMERA_SUFFIXES, DECODED, avif_without_exif, content_format
from batchclf.images.jpeg import Jpeg, Limits, is_reducible, read_jpeg
from batchclf.images.memory import Claim
from batchclf.images.notes import colour_notes, content_notes, name_notes
from batchclf.images.picture import Picture
from batchclf.images.profile import profile_in_jpeg
from batchclf.images.resample import crop_window, resized_size
from batchclf.images.resize import Part, Rgb, as_image, is_too_large, resize_into, size_of
from batchclf.images.tiff import (
    first_directory,
    is_camera_raw,
    is_tiled_in_strips,
    silence_libtiff,
)
from batchclf.results.records import (
    DecodeMode,
    Failure,
    Loaded,
    Pixels,
    Preprocess,
    SixteenBit,
)

PIXELS_RECIPE = 2
"""Counted up when an image comes to give other pixels, or another failure, than before."""

# What is odd about a file is said in its record; a night's log is not the place.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Pillow checks the size before it allocates; up to twice its limit it would only warn.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
silence_libtiff()

FAST_FACTORS = ((8, 11), (4, 8), (2, 4))
"""By how much `fast` lets libjpeg reduce, and how many times the resize target an image must be.

What is left is at least twice the target, which hardly changes a pixel; but from 11 times on 1.4
times will do, since at 8 every block becomes one pixel, and most of the decoding is saved.
"""

_ORIENTATION = 0x0112
_APP1 = b"\xff\xe1"
"""The JPEG marker before EXIF and XMP: without it there is no orientation to read."""
_PEAK_BYTES_OF_RGB, _PEAK_BYTES, _PEAK_BYTES_OF = 5, 10, {"WEBP": 18, "AVIF": 11}
"""Per pixel, measured with Pillow 13: colours take four, the image in RGB another four."""
_PALETTES = ("P", "PA")
_REDUCED = ("JPEG", "MPO")
"""Formats that libjpeg decodes."""
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
    sixteen_bit: SixteenBit = "scale"
    max_memory: int = sys.maxsize
    """Bytes that large images take together, files and pixels; further ones wait."""

    def __post_init__(self) -> None:
        # Pillow's limit is one for the process, and a process runs one job. It holds for crops too.
        crop_h, crop_w = self.preprocess.crop
        Image.MAX_IMAGE_PIXELS = max(self.max_pixels, crop_h * crop_w)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process makes it anew, which sets Pillow's limit there.
        return Decoder, tuple(getattr(self, field.name) for field in fields(self))

    def claim(self) -> Claim:
        """What one image takes, nothing yet."""
        return Claim(self.max_memory)

    def __call__(
        self, data: bytes, name: bytes, slot_HWC: Pixels, claim: Claim | None = None
    ) -> Loaded:
        """Decode `data` into `slot_HWC` (uint8, shape crop + (3,)); a failure leaves it zero.

        `claim`: what was taken to read it; the caller ends it.
        """
        if claim is None:
            with self.claim() as own:
                return self(data, name, slot_HWC, own)
        try:
            claim.keep(len(data))
            notes = self._decode(data, name, slot_HWC, claim)
            if self.strict:
                _refuse_damage(notes)
            return Loaded(warnings=notes)
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is this image's record
            bad = explain(error, data, name)
        slot_HWC[:] = 0
        return Loaded(Failure(bad.code, bad.message))

    def _decode(self, data: bytes, name: bytes, slot_HWC: Pixels, claim: Claim) -> tuple[str, ...]:
        if not data:
            raise BadImage("empty_file", "the file has 0 bytes")
        limits = Limits(self.max_pixels, self._reduction, partial(self._claim, claim))
        jpeg = read_jpeg(data, limits, second_look=self.strict)
        if jpeg.pixels_HWC is None:
            notes = self._decode_with_pillow(data, name, slot_HWC, claim)
            return (*notes, "jpeg_corrupt") if jpeg.is_damaged else notes
        picture = Picture(_rgb(jpeg), jpeg.width, jpeg.height, jpeg.reduction)
        turned: tuple[str, ...] = ()
        if self.exif_transpose and _APP1 in data:
            picture, turned = _upright(picture, lambda: _open(data))
        self._fit(picture, slot_HWC)
        return (*name_notes("JPEG", name), *turned, *colour_notes(profile_in_jpeg(data)))

    def _decode_with_pillow(
        self, data: bytes, name: bytes, slot_HWC: Pixels, claim: Claim
    ) -> tuple[str, ...]:
        found = _format_to_read(data, name)
        ask = partial(self._ask, claim)
        if found in EXTRAS:
            image = read_foreign(found, data, ask)
            _refuse_rangeless(image)
            (width, height), reduction = image.size, 1
        else:
            image, width, height, reduction = self._load(data, ask)
        rgb, notes = to_rgb(image, data, self.sixteen_bit)
        picture = Picture(rgb, width, height, reduction)
        turned: tuple[str, ...] = ()
        if self.exif_transpose:
            picture, turned = _upright(picture, lambda: image)
        self._fit(picture, slot_HWC)
        # Last, since counting the frames moves on to others.
        return (*name_notes(str(image.format), name), *turned, *notes, *content_notes(image, data))

    def _load(self, data: bytes, ask: Ask) -> tuple[Image.Image, int, int, int]:
        """The image, its width and height, and by how much libjpeg has reduced it."""
        image = _open(data)
        _refuse_rangeless(image)
        width, height = image.size
        ask(width, height, 0)
        reduction = self._reduction(width, height)
        if reduction > 1 and not (image.format in _REDUCED and is_reducible(data)):
            reduction = 1
        if reduction > 1:
            image.draft(None, (width // reduction, height // reduction))
        default = _PEAK_BYTES_OF_RGB if image.mode == "RGB" else _PEAK_BYTES
        ask(*image.size, _PEAK_BYTES_OF.get(str(image.format), default))
        image.load()
        return image, width, height, reduction

    def _ask(self, claim: Claim, width: int, height: int, bytes_per_pixel: int) -> None:
        """To be called before so much is allocated; waits until it may be."""
        if width * height > self.max_pixels:
            raise too_large(width * height, self.max_pixels)
        self._claim(claim, width * height, bytes_per_pixel)

    def _claim(self, claim: Claim, num_pixels: int, bytes_per_pixel: int) -> None:
        turned_bytes = 4 if self.exif_transpose else 0
        claim(num_pixels * (bytes_per_pixel + turned_bytes))

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

    def _fit(self, picture: Picture, slot_HWC: Pixels) -> None:
        """Resize and centre-crop as torchvision does, into the slot."""
        rgb = picture.rgb
        if self.preprocess.channels == "grey":
            rgb = as_image(rgb).convert("L").convert("RGB")
        size = resized_size(picture.width, picture.height, self.preprocess.resize)
        crop_h, crop_w = self.preprocess.crop
        window = crop_window(size, (crop_w, crop_h), self.preprocess.crop_rounding)
        if self.mode == "exact" or is_too_large(rgb, size):
            part = Part((0, 0, *size_of(rgb)), size, window)
        else:
            part = picture.part(window, size)
        top, left = window.pad_top, window.pad_left
        inner_HWC = slot_HWC[top : top + window.height, left : left + window.width]
        if inner_HWC.shape != slot_HWC.shape:
            slot_HWC[:] = 0  # smaller than the crop: torchvision pads with black around it
        resize_into(inner_HWC, rgb, part, self.preprocess.interpolation)


def _rgb(jpeg: Jpeg) -> Rgb:
    """What is to be resized; an image of Pillow where Pillow has to convert it."""
    assert jpeg.pixels_HWC is not None, "it is left to Pillow"
    height, width, _ = jpeg.pixels_HWC.shape
    if jpeg.layout == "RGBX":  # as Pillow has it in memory: nothing is copied
        return Image.frombuffer("RGBX", (width, height), jpeg.pixels_HWC, "raw", "RGBX", 0, 1)
    if jpeg.layout == "CMYK":
        inks = Image.new("CMYK", (width, height), None)
        inks.frombytes(jpeg.pixels_HWC, "raw", "CMYK;I", 0, 1)  # inverted, as Adobe writes them
        return inks.convert("RGB")
    return jpeg.pixels_HWC


def _format_to_read(data: bytes, name: bytes) -> str:
    """What the first bytes say, unless what Pillow would show is not what the file holds.

    Raises:
        BadImage: it is that.
    """
    found = content_format(data) or ""
    if found != "TIFF":
        return found
    if is_camera_raw(data, named_raw=name.lower().endswith(CAMERA_SUFFIXES)):
        return "camera raw"
    if is_tiled_in_strips(data):
        raise unsupported("TIFF with uncompressed tiles in the place of strips", found)
    return found


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=DECODED)
    except Exception:
        # For a broken EXIF block, whose place in an AVIF is well known, libavif gives all of it up.
        bare = avif_without_exif(data)
        if bare is None:
            raise
        image = Image.open(io.BytesIO(bare), formats=DECODED)
        image.info.setdefault("exif", b"")
    if image.mode in _PALETTES and image.palette is None:
        raise BadImage("corrupt", "its palette is missing")
    return image


def _upright(
    picture: Picture, opened: Callable[[], Image.Image]
) -> tuple[Picture, tuple[str, ...]]:
    """The picture as its EXIF orientation says, or as it stands where that cannot be read."""
    try:
        image = opened()
        orientation = image.getexif().get(_ORIENTATION)
        is_cut = orientation is None and _is_exif_cut(image.info.get("exif"))
    except Exception:  # noqa: BLE001 - pixels that are there need no orientation
        is_cut, orientation = True, None
    return picture.upright(orientation), ("exif_corrupt",) if is_cut else ()


def _is_exif_cut(exif: object) -> bool:
    """Whether its directory, a TIFF's, lies beyond its end: Pillow passes over that in silence."""
    if not isinstance(exif, bytes):
        return False
    block = exif.removeprefix(b"Exif\0\0")
    directory = first_directory(block)
    return directory.end > len(block) and not directory.values


def _refuse_rangeless(image: Image.Image) -> None:
    if kind := RANGELESS.get(image.mode):
        raise unsupported_mode(f"{image.format} of {kind}")


def _refuse_damage(notes: tuple[str, ...]) -> None:
    for note in notes:
        if note in _DAMAGES:
            raise BadImage(
                "corrupt",
                f"{_DAMAGES[note]} ({note}); loader.strict: false predicts what can be decoded",
            )
