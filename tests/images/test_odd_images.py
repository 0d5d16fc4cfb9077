"""Over a thousand odd, damaged and hostile files of other projects' test suites."""

import io
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchclf.images.formats import DECODED
from batchclf.results.records import Failure, Preprocess
from tests.conftest import ODD_IMAGES, data
from tests.images.common import decode, in_8_bits, torchvision_pixels

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

CODES = {
    "empty_file",
    "not_an_image",
    "unsupported_format",
    "unsupported_mode",
    "too_large",
    "truncated",
    "corrupt",
    "oom",
}
FLAGS = {
    "jpeg_corrupt",
    "icc_ignored",
    "extension_mismatch",
    "has_alpha",
    "16bit_scaled",
    "16bit_range",
    "missing_end",
    "animated",
    "pages",
}
PREPROCESS = Preprocess(64, (56, 60), "bilinear", None, None)


def opened_without_complaint(content: bytes) -> Image.Image | None:
    """The picture as plain Pillow shows it, if it does so without an error or a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(content), formats=DECODED)
            if image.width * image.height > 89_478_485:
                return None
            if image.mode in ("I", "F"):
                return None  # Pillow clips these without a word
            image.load()
            return in_8_bits(image).convert("RGB")
    except Exception:  # noqa: BLE001 - whatever Pillow raises is a complaint
        return None


def test_every_odd_file_is_pixels_or_a_failure_and_those_pillow_likes_are_torchvisions() -> None:
    codes: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    num_compared = 0
    wrong: list[tuple[Path, object]] = []
    for path in sorted(data(ODD_IMAGES).rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        pixels_HWC, loaded = decode(content, path.name.encode(), PREPROCESS)
        codes[loaded.failure.code if loaded.failure else "pixels"] += 1
        flags.update(flag.split(":")[0] for flag in loaded.warnings)
        image = opened_without_complaint(content)
        if image is None:
            continue
        num_compared += 1
        if loaded.failure is not None:
            wrong.append((path, loaded.failure))
        elif not np.array_equal(pixels_HWC, torchvision_pixels(image, PREPROCESS)):
            wrong.append((path, "pixels differ"))
    print(f"\n{codes.total()} files: {codes}\nflags: {flags}\ncompared: {num_compared}")
    assert not wrong
    assert set(codes) <= CODES | {"pixels"}
    assert set(flags) <= FLAGS
    assert num_compared > 750


KNOWN = {
    "Pillow/Tests/images/truncated_jpeg.jpg": "truncated",
    "Pillow/Tests/images/truncated_image.png": "truncated",
    "sharp/truncated.jpg": "truncated",
    "sharp/truncated.png": "truncated",
    "Pillow/Tests/images/bmp/b/shortfile.bmp": "truncated",
    "Pillow/Tests/images/decompression_bomb.gif": "too_large",
    "sharp/giant-image.jpg": "too_large",
    "sharp/65536-uint32-limit.png": "too_large",
    "Pillow/Tests/images/png_decompression_dos.png": "too_large",
    "Pillow/Tests/images/bmp/b/badwidth.bmp": "too_large",
    "Pillow/Tests/images/zero_width.gif": "not_an_image",
    "sharp/check.svg": "unsupported_format",
    "sharp/relax.jp2": "unsupported_format",
    "Pillow/Tests/images/hopper.psd": "unsupported_format",
    "torchvision/test/assets/damaged_jpeg/corrupt.jpg": "corrupt",
    "Pillow/Tests/images/hopper_unknown_pixel_mode.tif": "unsupported_mode",
    "Pillow/Tests/images/16bit.s.tif": "unsupported_mode",
    "sharp/cielab-dagams.tiff": "unsupported_mode",
    "libjpeg-turbo/testimages/monkey12.jpg": "unsupported_mode",
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_well_known_bad_file_has_its_code(name: str) -> None:
    path = data(ODD_IMAGES / name)
    _, loaded = decode(path.read_bytes(), path.name.encode(), PREPROCESS)
    assert isinstance(loaded.failure, Failure)
    assert loaded.failure.code == KNOWN[name]
