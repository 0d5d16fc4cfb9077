"""What the tests of the image room share: generated images, and torchvision as the reference."""

import io
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from batchclf.images.decode import Decoder
from batchclf.results.records import DecodeMode, Loaded, Pixels, Preprocess, SixteenBit
from tests.conftest import DATA, ROOT

RESNET50 = Preprocess(232, (224, 224), "bilinear", None, None)
"""The preset of torchvision's newer weights; `RESNET50_V1` that of the older ones."""
RESNET50_V1 = Preprocess(256, (224, 224), "bilinear", None, None)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture with smooth parts, sharp edges and noise, so that every resampling tap counts."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (7, 5, 4), dtype=np.uint8), "RGBA")
    smooth = np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC)).copy()
    smooth[::3] = rng.integers(0, 256, smooth[::3].shape, dtype=np.uint8)
    image = Image.fromarray(smooth, "RGBA")
    if mode == "RGBA":
        return image
    if mode == "LA":
        return Image.merge("LA", (image.convert("L"), image.getchannel("A")))
    if mode == "PA":
        return image.convert("RGB").convert("PA")
    if mode == "I;16B":
        return picture(width, height, "I;16", seed).convert("I").convert("I;16B")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) * 1.7 - 60)
    return image.convert("RGB").convert(mode)


def encode(image: Image.Image, format_: str, **options: Any) -> bytes:
    """The file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def decode(
    data: bytes,
    name: bytes = b"x",
    preprocess: Preprocess = RESNET50,
    *,
    mode: DecodeMode = "exact",
    exif_transpose: bool = False,
    max_pixels: int = 89_478_485,
    strict: bool = False,
    sixteen_bit: SixteenBit = "scale",
) -> tuple[Pixels, Loaded]:
    """Decode into a slot that still holds another image's pixels."""
    slot_HWC = np.full((*preprocess.crop, 3), 123, np.uint8)
    decoder = Decoder(preprocess, mode, exif_transpose, max_pixels, strict, sixteen_bit)
    loaded = decoder(data, name, slot_HWC)
    if loaded.failure is not None:
        assert not slot_HWC.any(), "a failure leaves the slot zero"
        assert loaded.failure.message
    return slot_HWC, loaded


def in_8_bits(image: Image.Image) -> Image.Image:
    """The reference for 16-bit grey, which torchvision itself shows white: its upper 8 bits.

    Or what lies between the least and the greatest value that a TIFF tells.
    """
    if not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})
    if 341 in tags:
        (lowest,), (highest,) = tags.get(340, (0,)), tags[341]
        shares = (np.asarray(image).astype(float) - lowest) / (highest - lowest)
        return Image.fromarray(np.floor(shares.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    is_12_bit = tags.get(258) == (12,)
    return Image.fromarray((np.asarray(image) // (16 if is_12_bit else 256)).astype(np.uint8))


def torchvision_pixels(image: Image.Image, preprocess: Preprocess) -> Pixels:
    """What torchvision's transforms make of an opened image."""
    pytest.importorskip("torchvision")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    size = preprocess.resize
    resized = transforms.resize(
        image.convert("RGB"),
        [size] if isinstance(size, int) else list(size),
        InterpolationMode(preprocess.interpolation),
        antialias=True,
    )
    cropped = transforms.center_crop(resized, list(preprocess.crop))
    pixels_HWC: Pixels = transforms.pil_to_tensor(cropped).permute(1, 2, 0).numpy()
    return pixels_HWC


@cache
def torchvision_presets() -> tuple[Preprocess, ...]:
    """Every distinct preset over all weights of `torchvision.models`, the commonest first."""
    pytest.importorskip("torchvision")
    from torchvision import models

    found = Counter(
        (preset.resize_size[0], preset.crop_size[0], preset.interpolation.value)
        for name in models.list_models(module=models)
        for weights in models.get_model_weights(name)
        for preset in [weights.transforms()]
    )
    return tuple(
        Preprocess(resize, (crop, crop), interpolation, None, None)
        for (resize, crop, interpolation), _ in found.most_common()
    )


def assert_torchvisions_pixels(
    data_: bytes, preprocess: Preprocess, image: Image.Image | None = None
) -> None:
    """Compare with `image`, or with the file as Pillow opens it."""
    pixels_HWC, loaded = decode(data_, preprocess=preprocess)
    assert loaded.failure is None
    expected_HWC = torchvision_pixels(in_8_bits(image or Image.open(io.BytesIO(data_))), preprocess)
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)


def tiff(tags: Mapping[int, int | bytes | Sequence[int]], pixels: bytes = b"") -> bytes:
    """A TIFF of one strip, by default of 4 x 4 in grey of 8 bits; other tags are added, or replace.

    Numbers are LONGs, lists of them SHORTs, and bytes a text.
    """
    image: dict[int, int | bytes | Sequence[int]] = {}
    image |= {256: 4, 257: 4, 258: [8], 259: 1, 262: 1, 273: 0, 277: 1, 278: 4, 279: len(pixels)}
    entries = sorted({**image, **tags}.items())
    behind = 8 + 2 + 12 * len(entries) + 4
    directory, values = struct.pack("<H", len(entries)), b""
    pixels_at = behind + sum(len(_value(value)) for _, value in entries)
    for tag, value in entries:
        packed = struct.pack("<I", pixels_at) if tag == 273 else _value(value)
        kind, count = _kind_and_count(value)
        directory += struct.pack("<HHI", tag, kind, count)
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack("<I", behind + len(values))
        values += packed
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + values + pixels


def _kind_and_count(value: int | bytes | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return 4, 1
    if isinstance(value, Rationals):
        return 10, len(value) // 8
    return (1 if isinstance(value, bytes) else 3), len(value)


def _value(value: int | bytes | Sequence[int]) -> bytes:
    if isinstance(value, bytes):
        return value
    return (
        struct.pack("<I", value)
        if isinstance(value, int)
        else struct.pack(f"<{len(value)}H", *value)
    )


CASES = DATA / "cases"
"""Small public files, each of a kind that was once mistaken for another."""


def dng(grey_HW: NDArray[np.uint16], **more: int) -> bytes:
    """Camera raw of a sensor that saw these values, behind red, green and blue alike.

    `more` replaces tags, by their numbers: `t262=1`.
    """
    height, width = grey_HW.shape
    identity = struct.pack(
        "<18i", *(value for one in (1, 0, 0, 0, 1, 0, 0, 0, 1) for value in (one, 1))
    )
    tags: dict[int, int | bytes | Sequence[int]] = {
        254: 0,
        256: width,
        257: height,
        258: [16],
        262: 32803,
        278: height,
        271: b"Maker\0",
        272: b"Camera\0",
        50708: b"Camera\0",
        33421: [2, 2],
        33422: bytes((0, 1, 1, 2)),
        50706: bytes((1, 4, 0, 0)),
        50717: 65535,
        50721: Rationals(identity),
        50728: Rationals(struct.pack("<6i", *[1] * 6)),
        **{int(name[1:]): value for name, value in more.items()},
    }
    return tiff(tags, grey_HW.astype("<u2").tobytes())


class Rationals(bytes):
    """Signed numerators and denominators in turn, as a tag's value."""


MEASURE = """
import sys
import numpy as np
from batchclf.images.decode import Decoder
from batchclf.system.machine import peak_rss_mb
from batchclf.results.records import Preprocess
data = open(sys.argv[1], "rb").read()
crop = (224, 224)
decoder = Decoder(Preprocess(232, crop, sys.argv[2], None, None), sys.argv[3])
before = peak_rss_mb()
loaded = decoder(data, b"x.png", np.zeros((*crop, 3), np.uint8))
assert (loaded.failure.code if loaded.failure else "") == sys.argv[4], loaded
print(round(peak_rss_mb() - before))
"""


def decoding_mb(file: Path, interpolation: str, mode: str, code: str = "") -> int:
    """Peak memory that decoding needs, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, file, interpolation, mode, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def but_colours(loaded: Loaded) -> Loaded:
    """The same without what is said of ICC profiles (test_profile.py)."""
    return replace(loaded, warnings=tuple(w for w in loaded.warnings if w != "icc_ignored"))
