"""decode.py: torchvision's pixels exactly, and a code for everything that is no such image."""

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from batchclf.images import jpeg
from batchclf.images.decode import Decoder
from batchclf.images.source import open_source, read_image_file
from batchclf.results.records import (
    DecodeMode,
    Failure,
    Interpolation,
    Loaded,
    Pixels,
    Preprocess,
)
from tests.conftest import MOBILENET_WEIGHTS, ODD_IMAGES, PHOTOS, ROOT, data
from tests.images.common import (
    RESNET50,
    RESNET50_V1,
    decode,
    encode,
    picture,
    torchvision_pixels,
    torchvision_presets,
)

# The decoder silences Pillow; pytest switches every warning on again.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

DECODE_MODES: tuple[DecodeMode, ...] = ("exact", "fast")
SIZES = ((500, 333), (333, 500), (224, 224), (1001, 57), (31, 17), (777, 778))


def assert_torchvisions_pixels(
    data_: bytes, preprocess: Preprocess, image: Image.Image | None = None
) -> None:
    pixels_HWC, loaded = decode(data_, preprocess=preprocess)
    assert loaded.failure is None
    expected_HWC = torchvision_pixels(image or Image.open(io.BytesIO(data_)), preprocess)
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)


def photos() -> list[Path]:
    return sorted(data(PHOTOS).iterdir())


# ---- exact: torchvision's pixels -----------------------------------------------------------------


def test_every_photo_gives_the_very_pixels_of_torchvision() -> None:
    """The two commonest presets on all photos, the others on every fifth one, in turn."""
    common, rest = torchvision_presets()[:2], torchvision_presets()[2:]
    assert RESNET50 in common
    assert RESNET50_V1 in common
    different = []
    for number, path in enumerate(photos()):
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content)).convert("RGB")
        others = [] if number % 5 else [rest[number // 5 % len(rest)]]
        for preset in (*common, *others):
            pixels_HWC, loaded = decode(content, b"a.jpeg", preset)
            assert loaded == Loaded(), path.name
            if not np.array_equal(pixels_HWC, torchvision_pixels(image, preset)):
                different.append((path.name, preset))
    assert not different


def test_every_preset_of_torchvision_gives_its_pixels_for_every_shape() -> None:
    files = [encode(picture(*size), "JPEG") for size in SIZES]
    presets = torchvision_presets()
    assert len(presets) > 20
    for preset in presets:
        for file in files:
            assert_torchvisions_pixels(file, preset)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.one_of(st.integers(1, 90), st.tuples(st.integers(1, 90), st.integers(1, 90))),
    crop=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
def test_any_resize_and_crop_gives_torchvisions_pixels(
    size: tuple[int, int],
    resize: int | tuple[int, int],
    crop: tuple[int, int],
    interpolation: Interpolation,
) -> None:
    preprocess = Preprocess(resize, crop, interpolation, None, None)
    assert_torchvisions_pixels(encode(picture(*size), "PNG"), preprocess)


MODES = {
    "1-png": ("1", "PNG", ()),
    "1-tiff": ("1", "TIFF", ()),
    "L-jpeg": ("L", "JPEG", ()),
    "L-png": ("L", "PNG", ()),
    "LA-png": ("LA", "PNG", ("has_alpha",)),
    "P-png": ("P", "PNG", ()),
    "P-gif": ("P", "GIF", ()),
    "P-bmp": ("P", "BMP", ()),
    "PA-tiff": ("PA", "TIFF", ("has_alpha",)),
    "RGB-jpeg": ("RGB", "JPEG", ()),
    "RGB-webp": ("RGB", "WEBP", ()),
    "RGB-avif": ("RGB", "AVIF", ()),
    "RGB-bmp": ("RGB", "BMP", ()),
    "RGB-dib": ("RGB", "DIB", ()),
    "RGB-tiff": ("RGB", "TIFF", ()),
    "RGBA-png": ("RGBA", "PNG", ("has_alpha",)),
    "RGBA-webp": ("RGBA", "WEBP", ("has_alpha",)),
    "RGBA-avif": ("RGBA", "AVIF", ("has_alpha",)),
    "CMYK-jpeg": ("CMYK", "JPEG", ()),
    "CMYK-tiff": ("CMYK", "TIFF", ()),
    "YCbCr-jpeg": ("YCbCr", "JPEG", ()),
    "YCbCr-tiff": ("YCbCr", "TIFF", ()),
    "I;16-png": ("I;16", "PNG", ("clipped_to_8bit",)),
    "I;16-tiff": ("I;16", "TIFF", ("clipped_to_8bit",)),
    "F-tiff": ("F", "TIFF", ("clipped_to_8bit",)),
}


@pytest.mark.parametrize("size", [(333, 251), (120, 401), (19, 8)])
@pytest.mark.parametrize("case", MODES)
def test_every_colour_mode_gives_torchvisions_pixels_and_its_flags(
    case: str, size: tuple[int, int]
) -> None:
    mode, format_, expected = MODES[case]
    file = encode(picture(*size, mode), format_)
    assert_torchvisions_pixels(file, RESNET50)
    assert_torchvisions_pixels(file, Preprocess(40, (64, 48), "bicubic", None, None))
    assert decode(file)[1].warnings == expected


def test_a_palette_with_a_transparent_colour_gives_torchvisions_pixels_and_a_flag() -> None:
    for transparency in (3, bytes(range(256))):
        file = encode(picture(90, 70, "P"), "PNG", transparency=transparency)
        assert_torchvisions_pixels(file, RESNET50)
        assert decode(file)[1].warnings == ("has_alpha",)


def test_the_hidden_colour_of_a_transparent_image_is_what_the_model_sees() -> None:
    file = encode(Image.new("RGBA", (64, 64), (200, 100, 50, 0)), "PNG")
    pixels_HWC, loaded = decode(file)
    assert (pixels_HWC == (200, 100, 50)).all()
    assert loaded.warnings == ("has_alpha",)


def test_an_inverted_cmyk_jpeg_shows_the_colour_that_was_printed() -> None:
    file = encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in file
    pixels_HWC, _ = decode(file)
    assert np.abs(pixels_HWC.astype(int) - (255, 0, 0)).max() <= 3


def test_two_identical_files_give_identical_pixels_whatever_was_in_the_slot() -> None:
    file = encode(picture(50, 400), "JPEG")
    small = Preprocess(64, (100, 100), "bilinear", None, None)
    decoder = Decoder(small)
    slots = [np.full((100, 100, 3), fill, np.uint8) for fill in (0, 255)]
    for slot_HWC, name in zip(slots, (b"a.jpg", b"b.jpg"), strict=True):
        assert decoder(file, name, slot_HWC) == Loaded()
    np.testing.assert_array_equal(slots[0], slots[1])


# ---- EXIF orientation ----------------------------------------------------------------------------


STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),
    8: lambda shown: np.rot90(shown, -1),
}
"""EXIF 2.32, tag 274: how the pixels lie in the file, from the picture as it should be seen."""


def with_orientation(pixels_HWC: Pixels, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encode(Image.fromarray(np.ascontiguousarray(pixels_HWC)), "PNG", exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_asked_for(orientation: int) -> None:
    shown_HWC = np.asarray(picture(61, 40))
    stored_HWC = STORED[orientation](shown_HWC)
    file = with_orientation(stored_HWC, orientation)
    edge = Preprocess(30, (24, 28), "bicubic", None, None)

    ignored_HWC, loaded = decode(file, preprocess=edge)
    assert loaded == Loaded()
    expected = torchvision_pixels(Image.fromarray(np.ascontiguousarray(stored_HWC)), edge)
    np.testing.assert_array_equal(ignored_HWC, expected)

    turned_HWC, loaded = decode(file, preprocess=edge, exif_transpose=True)
    assert loaded == Loaded()
    expected = torchvision_pixels(Image.fromarray(shown_HWC), edge)
    np.testing.assert_array_equal(turned_HWC, expected)


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_impossible_exif_orientation_changes_nothing(orientation: int) -> None:
    file = with_orientation(np.asarray(picture(61, 40)), orientation)
    upright_HWC, loaded = decode(file, exif_transpose=True)
    assert loaded == Loaded()
    np.testing.assert_array_equal(upright_HWC, decode(file)[0])


@pytest.mark.parametrize("shape", ["Landscape", "Portrait"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_photos_of_all_eight_orientations_look_alike_once_turned(
    shape: str, orientation: int
) -> None:
    folder = data(ODD_IMAGES / "exif-orientation-examples")
    file = (folder / f"{shape}_{orientation}.jpg").read_bytes()
    assert_torchvisions_pixels(file, RESNET50)
    turned_HWC, loaded = decode(file, exif_transpose=True)
    assert loaded.failure is None
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(turned_HWC, torchvision_pixels(image, RESNET50))

    first_HWC, _ = decode((folder / f"{shape}_1.jpg").read_bytes())
    assert np.abs(turned_HWC.astype(int) - first_HWC).mean() < 8, "not the same way up"


def test_a_damaged_exif_block_does_not_fail_the_image() -> None:
    plain = encode(picture(64, 64), "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(200))
    file = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    for exif_transpose in (False, True):
        pixels_HWC, loaded = decode(file, exif_transpose=exif_transpose)
        assert loaded.failure is None
        np.testing.assert_array_equal(pixels_HWC, decode(plain)[0])


# ---- fast ----------------------------------------------------------------------------------------


def differences(files: Iterator[bytes], preprocess: Preprocess) -> np.ndarray:
    """Mean absolute difference of `fast` from `exact` per image, in steps of 1/255."""
    return np.array(
        [
            np.abs(
                decode(file, preprocess=preprocess, mode="fast")[0].astype(int)
                - decode(file, preprocess=preprocess)[0]
            ).mean()
            for file in files
        ]
    )


def test_fast_differs_from_exact_by_at_most_2_of_255_on_every_photo() -> None:
    found = differences((path.read_bytes() for path in photos()), RESNET50)
    print(f"fast, {len(found)} photos: mean {found.mean():.4f}/255, worst {found.max():.3f}/255")
    assert found.max() <= 2


@pytest.mark.parametrize("factor", [2, 4])
def test_fast_differs_little_where_libjpeg_really_decodes_at_a_reduced_scale(factor: int) -> None:
    """The photos are mostly too small for that, so some are enlarged (to odd sizes) first."""

    def enlarged() -> Iterator[bytes]:
        for path in photos()[::20]:
            image = Image.open(path).convert("RGB")
            size = (image.width * factor + 1, image.height * factor + 1)
            yield encode(image.resize(size, Image.Resampling.BICUBIC), "JPEG")

    found = differences(enlarged(), RESNET50)
    print(f"fast, photos x{factor}: mean {found.mean():.3f}/255, worst {found.max():.3f}/255")
    assert found.max() <= 2


def test_fast_differs_little_for_small_inputs_which_are_decoded_at_a_reduced_scale() -> None:
    files = (path.read_bytes() for path in photos()[::2])
    found = differences(files, Preprocess(64, (64, 64), "bilinear", None, None))
    print(f"fast, crops of 64: mean {found.mean():.3f}/255, worst {found.max():.3f}/255")
    assert found.max() <= 2


def test_fast_decodes_12_megapixels_at_least_4_times_as_fast_as_exact() -> None:
    """CPU time, both in turn; the photos are enlarged."""
    files = [
        encode(Image.open(path).convert("RGB").resize((4000, 3000)), "JPEG", quality=90)
        for path in photos()[::90]
    ]
    cpu_s = {"exact": 0.0, "fast": 0.0}
    for file in files:
        for mode in DECODE_MODES:
            started = time.process_time()
            decode(file, mode=mode)
            cpu_s[mode] += time.process_time() - started
    ratio = cpu_s["exact"] / cpu_s["fast"]
    print(f"fast, 12 megapixels: {ratio:.1f} times as fast as exact")
    assert ratio >= 4


def test_fast_finds_the_class_that_exact_finds_on_99_of_100_photos() -> None:
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    module = models.mobilenet_v2()
    module.load_state_dict(torch.load(data(MOBILENET_WEIGHTS), weights_only=True))
    module.eval()
    mean, std = (torch.tensor(each) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    num_same = 0
    for path in photos():
        content = path.read_bytes()
        classes = []
        for mode in DECODE_MODES:
            pixels_HWC, _ = decode(content, mode=mode)
            image_HWC = (torch.from_numpy(pixels_HWC).float() / 255 - mean) / std
            with torch.inference_mode():
                logits_NK = module(image_HWC.permute(2, 0, 1)[None])
            classes.append(int(logits_NK.argmax()))
        num_same += classes[0] == classes[1]
    print(f"fast: the class of exact on {num_same} of {len(photos())} photos")
    assert num_same >= 0.99 * len(photos())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (1001, 665)])
def test_fast_keeps_the_very_part_of_the_picture_that_exact_keeps(
    size: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes at which the reduced picture, taken for the whole, would have another shape."""
    exif = Image.Exif()
    exif[274] = orientation
    for edge in (48, 64, 96):
        # Waves of 16 pixels of the result: half a pixel beside, and the mean differs by about 16.
        wave = 2 * np.pi * edge / min(size) / 16
        columns, rows = (127.5 + 127.5 * np.sin(np.arange(length) * wave) for length in size)
        mixed = (columns[None, :] + rows[:, None]) / 2
        channels_HWC = np.stack([mixed, mixed, mixed], axis=-1).astype(np.uint8)
        file = encode(Image.fromarray(channels_HWC), "JPEG", quality=95, exif=exif)
        preprocess = Preprocess(edge, (edge, edge), "bilinear", None, None)
        for usable in (True, False):  # through simplejpeg, and through Pillow
            monkeypatch.setattr(jpeg, "USABLE", usable)
            exact_HWC, _ = decode(file, preprocess=preprocess, exif_transpose=True)
            fast_HWC, _ = decode(file, preprocess=preprocess, mode="fast", exif_transpose=True)
            assert np.abs(exact_HWC.astype(int) - fast_HWC).mean() < 0.8


@pytest.mark.parametrize("case", MODES)
def test_fast_flags_and_fails_as_exact_does(case: str) -> None:
    mode, format_, expected = MODES[case]
    file = encode(picture(333, 251, mode), format_)
    assert decode(file, mode="fast")[1] == Loaded(warnings=expected)
    half = file[: len(file) // 2]
    failure = decode(half)[1].failure
    assert failure is not None
    assert decode(half, mode="fast")[1].failure == failure


# ---- extreme shapes ------------------------------------------------------------------------------

INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 2000)])
def test_a_tiny_or_thin_image_gives_torchvisions_pixels(size: tuple[int, int], mode: str) -> None:
    file = encode(picture(*size), "PNG")
    pixels_HWC, loaded = decode(file, mode="fast" if mode == "fast" else "exact")
    assert loaded == Loaded()
    if mode == "exact":
        expected = torchvision_pixels(Image.open(io.BytesIO(file)), RESNET50)
        np.testing.assert_array_equal(pixels_HWC, expected)
    else:
        assert np.ptp(pixels_HWC) > 0 or size == (1, 1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_very_long_line_gives_the_pixels_of_a_full_resize(
    interpolation: Interpolation, turned: bool
) -> None:
    """One pixel wide, its long axis can be resized alone: all columns of the result are equal."""
    length = 9_001
    image = picture(1, length)
    preprocess = replace(RESNET50, interpolation=interpolation)
    tall = image.resize((1, 232 * length), Image.Resampling[interpolation.upper()])
    top = round((tall.height - 224) / 2)
    column = np.asarray(tall.crop((0, top, 1, top + 224)))
    expected_HWC = np.repeat(column, 224, axis=1)
    if turned:
        image, expected_HWC = (
            image.transpose(Image.Transpose.TRANSPOSE),
            expected_HWC.swapaxes(0, 1),
        )
    pixels_HWC, loaded = decode(encode(image, "PNG"), preprocess=preprocess)
    assert loaded == Loaded()
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)


MEASURE = """
import resource, sys
import numpy as np
from batchclf.images.decode import Decoder
from batchclf.results.records import Preprocess
data = open(sys.argv[1], "rb").read()
crop = (224, 224)
decoder = Decoder(Preprocess(232, crop, sys.argv[2], None, None), sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = decoder(data, b"x.png", np.zeros((*crop, 3), np.uint8))
assert (loaded.failure.code if loaded.failure else "") == sys.argv[4], loaded
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
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


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1)])
def test_an_image_of_1_by_65500_pixels_is_decoded_within_bounded_memory(
    tmp_path: Path, size: tuple[int, int], mode: str, interpolation: str
) -> None:
    """Resized whole it would take 14 GB."""
    file = tmp_path / "x.png"
    file.write_bytes(encode(picture(*size), "PNG"))
    assert decoding_mb(file, interpolation, mode) < 300


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_a_line_of_a_million_pixels_is_decoded_within_bounded_memory(
    tmp_path: Path, interpolation: str
) -> None:
    """A file of a few kilobytes; `max_pixels` allows far longer ones."""
    file = tmp_path / "x.png"
    file.write_bytes(encode(Image.new("1", (1, 1_000_000), 1), "PNG"))
    assert decoding_mb(file, interpolation, "exact") < 300


# ---- files that are no such image ----------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header, and the start of pixels that never come."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 5000) + b"IDAT" + zlib.compress(b"x")


def jpeg_claiming(width: int, height: int) -> bytes:
    file = bytearray(encode(picture(64, 48), "JPEG"))
    frame = file.index(b"\xff\xc0")
    file[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(file)


def gif_claiming(width: int, height: int) -> bytes:
    file = bytearray(encode(picture(64, 48, "P"), "GIF"))
    size, claimed = struct.pack("<HH", 64, 48), struct.pack("<HH", width, height)
    return bytes(file).replace(size, claimed)


def bmp_claiming(width: int, height: int) -> bytes:
    file = bytearray(encode(picture(64, 48), "BMP"))
    file[18:26] = struct.pack("<ii", width, height)
    return bytes(file)


def tiff_claiming(width: int, height: int) -> bytes:
    """Entries 256 and 257 of the directory: width and height, as LONGs."""
    file = encode(Image.new("L", (70_000, 1)).resize((70_000, 70)), "TIFF", compression="packbits")
    ifd = int.from_bytes(file[4:8], "little")
    patched = bytearray(file)
    for position in range(
        ifd + 2, ifd + 2 + 12 * int.from_bytes(file[ifd : ifd + 2], "little"), 12
    ):
        tag = int.from_bytes(file[position : position + 2], "little")
        if tag in (256, 257):
            value = width if tag == 256 else height
            patched[position : position + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(patched)


def avif_claiming(width: int, height: int) -> bytes:
    file = bytearray(encode(picture(64, 48), "AVIF"))
    box = file.index(b"ispe")
    file[box + 8 : box + 16] = struct.pack(">II", width, height)
    return bytes(file)


def flipped(file: bytes, position: int) -> bytes:
    damaged = bytearray(file)
    damaged[position] ^= 0xFF
    return bytes(damaged)


def png_without_end() -> bytes:
    file = encode(picture(64, 48), "PNG")
    return file[: file.rindex(b"IEND") - 4]


def animation(format_: str, num_frames: int, **options: object) -> bytes:
    first, *rest = [picture(64, 48, seed=number) for number in range(num_frames)]
    return encode(first, format_, save_all=True, append_images=rest, **options)


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\n%%EOF\n"
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>"""


@dataclass(frozen=True)
class Bad:
    """A file, and the failure's code and a part of its message."""

    name: str
    make: Callable[[], bytes]
    code: str
    says: str = ""


def _half(format_: str, **options: object) -> Callable[[], bytes]:
    def make() -> bytes:
        file = encode(picture(120, 90), format_, **options)
        return file[: len(file) // 2]

    return make


def _short(format_: str, num_bytes: int, **options: object) -> Callable[[], bytes]:
    return lambda: encode(picture(120, 90), format_, **options)[:-num_bytes]


BAD_FILES = [
    Bad("empty.jpg", lambda: b"", "empty_file", "0 bytes"),
    Bad("text.jpg", lambda: b"a note to myself\n", "not_an_image", "61 20 6e 6f"),
    Bad("page.jpg", lambda: b"<!DOCTYPE html><html>404</html>", "not_an_image", "HTML"),
    Bad("page2.jpg", lambda: b"\n<html><body>log in</body></html>", "not_an_image", "HTML"),
    Bad("api.jpg", lambda: b'{"error": "no such key"}', "not_an_image", "JSON"),
    Bad("lfs.jpg", lambda: LFS, "not_an_image", "git lfs pull"),
    Bad("archive.jpg", lambda: b"PK\x03\x04" + bytes(60), "not_an_image", "zip"),
    Bad("placeholder.jpg", lambda: b"bplist00\xd0", "not_an_image", "property list"),
    Bad("zeros.jpg", lambda: bytes(4096), "not_an_image", "00 00 00 00"),
    Bad("header.jpg", lambda: encode(picture(64, 64), "JPEG")[:20], "not_an_image", "ff d8 ff"),
    Bad("soi.jpg", lambda: b"\xff\xd8", "not_an_image", "ff d8"),
    Bad("magic.png", lambda: b"\x89PNG\r\n\x1a\n", "not_an_image", "PNG"),
    Bad("width0.png", lambda: png_claiming(0, 10), "not_an_image"),
    Bad("height0.png", lambda: png_claiming(10, 0), "not_an_image"),
    Bad("width0.jpg", lambda: jpeg_claiming(0, 48), "not_an_image"),
    Bad("width0.gif", lambda: gif_claiming(0, 48), "not_an_image"),
    Bad("half.jpg", _half("JPEG"), "truncated", "ends after"),
    Bad("half_progressive.jpg", _half("JPEG", progressive=True), "truncated", "ends after"),
    Bad("without_last_2.jpg", _short("JPEG", 2), "truncated", "ends after"),
    Bad("without_last_1.jpg", _short("JPEG", 1), "truncated", "ends after"),
    Bad("half.png", _half("PNG"), "truncated", "ends after"),
    Bad("half.webp", _half("WEBP"), "truncated", "ends after"),
    Bad("half_lossless.webp", _half("WEBP", lossless=True), "truncated", "ends after"),
    Bad("short.webp", _short("WEBP", 2), "truncated", "ends after"),
    Bad("half.gif", _half("GIF"), "truncated", "ends after"),
    Bad("half.avif", _half("AVIF"), "truncated", "ends after"),
    Bad("short.avif", _short("AVIF", 2), "truncated", "ends after"),
    Bad("half.bmp", _half("BMP"), "truncated", "ends after"),
    Bad("short.bmp", _short("BMP", 2), "truncated", "ends after"),
    Bad("half.tif", _half("TIFF"), "truncated", "ends after"),
    Bad("short.tif", _short("TIFF", 2), "truncated", "ends after"),
    # libtiff writes the directory behind the pixels: cut, it is gone.
    Bad("half_lzw.tif", _half("TIFF", compression="tiff_lzw"), "truncated", "ends after"),
    Bad("short_lzw.tif", _short("TIFF", 2, compression="tiff_lzw"), "truncated", "ends after"),
    Bad("short_jpeg.tif", _short("TIFF", 2, compression="jpeg"), "truncated", "ends after"),
    Bad("half_big.tif", _half("TIFF", compression="packbits", big_tiff=True), "truncated"),
    Bad("flipped.png", lambda: flipped(encode(picture(64, 48), "PNG"), 200), "corrupt"),
    Bad("100mp.png", lambda: png_claiming(10_000, 10_000), "too_large", "100,000,000 pixels"),
    Bad("400mp.png", lambda: png_claiming(20_000, 20_000), "too_large", "max_pixels"),
    Bad("4gp.png", lambda: png_claiming(65_000, 65_000), "too_large", "4,225,000,000 pixels"),
    Bad("2_31.png", lambda: png_claiming(2**31 - 1, 2**31 - 1), "too_large", "89,478,485"),
    Bad("100mp.jpg", lambda: jpeg_claiming(10_000, 10_000), "too_large", "100,000,000 pixels"),
    Bad("4gp.jpg", lambda: jpeg_claiming(65_000, 65_000), "too_large", "4,225,000,000 pixels"),
    Bad("4gp.gif", lambda: gif_claiming(65_000, 65_000), "too_large", "4,225,000,000 pixels"),
    Bad("400mp.bmp", lambda: bmp_claiming(20_000, 20_000), "too_large", "400,000,000 pixels"),
    Bad("4gp.tif", lambda: tiff_claiming(65_000, 65_000), "too_large", "4,225,000,000 pixels"),
    Bad("100mp.avif", lambda: avif_claiming(10_000, 10_000), "too_large", "100,000,000 pixels"),
    Bad("eps.jpg", lambda: EPS, "unsupported_format", "PostScript"),
    Bad("ps.jpg", lambda: b"%!PS-Adobe-3.0\nshowpage\n", "unsupported_format", "PostScript"),
    Bad("dos_eps.jpg", lambda: b"\xc5\xd0\xd3\xc6" + bytes(28) + EPS, "unsupported_format"),
    Bad("pdf.jpg", lambda: b"%PDF-1.7\n1 0 obj\n", "unsupported_format", "PDF"),
    Bad("wmf.jpg", lambda: b"\xd7\xcd\xc6\x9a" + bytes(60), "unsupported_format", "metafile"),
    Bad("emf.jpg", lambda: b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60), "unsupported_format"),
    Bad("svg.jpg", lambda: SVG, "unsupported_format", "SVG"),
    Bad("svg_xml.svg", lambda: b'<?xml version="1.0"?>\n' + SVG, "unsupported_format", "SVG"),
    Bad("psd.jpg", lambda: b"8BPS\0\1" + bytes(40), "unsupported_format", "Photoshop"),
    Bad("icon.png", lambda: encode(picture(32, 32), "ICO"), "unsupported_format", "icon"),
    Bad("heic.jpg", lambda: b"\0\0\0\x18ftypheic" + bytes(60), "unsupported_format", "heif"),
    Bad("jxl.jpg", lambda: b"\xff\x0a" + bytes(60), "unsupported_format", "djxl"),
    Bad("jp2.jpg", lambda: encode(picture(32, 32), "JPEG2000"), "unsupported_format"),
]


def test_a_gif_whose_frame_lies_far_outside_its_screen_costs_no_memory(tmp_path: Path) -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 100, 50, 0x80, 0, 0) + bytes(6)
    disposal = b"\x21\xf9\x04\x09\x0a\x00\x00\x00"  # to the background: Pillow allocates it
    frame = b"," + struct.pack("<HHHHB", 28_000, 18_000, 41_000, 40_000, 0)
    file = tmp_path / "bomb.gif"
    file.write_bytes(screen + disposal + frame + b"\x02\x02\x44\x01\x00;")
    assert decoding_mb(file, "bilinear", "exact", code="too_large") < 100


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_a_bad_file_is_recorded_with_its_code(tmp_path: Path, bad: Bad) -> None:
    (tmp_path / bad.name).write_bytes(bad.make())
    source = open_source(tmp_path)
    (path,) = source.paths()
    content = read_image_file(source.root, path, confined=source.confined)
    assert not isinstance(content, Failure)
    _, loaded = decode(content, path)
    assert loaded.failure is not None
    assert loaded.failure.code == bad.code, loaded.failure
    assert bad.says in loaded.failure.message
    assert " at 0x" not in loaded.failure.message, "an object's address changes from run to run"
    assert loaded.warnings == ()


@settings(max_examples=60, deadline=None)
@given(
    format_=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"]),
    cut=st.floats(0.25, 0.95),
)
def test_a_file_cut_anywhere_within_its_pixels_is_recorded_as_truncated(
    format_: str, cut: float
) -> None:
    file = encode(picture(90, 70), format_)
    _, loaded = decode(file[: int(len(file) * cut)])
    assert loaded.failure is not None
    assert loaded.failure.code == "truncated", loaded.failure


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"])
def test_random_damage_gives_pixels_or_a_failure_but_no_exception(format_: str) -> None:
    files = [
        encode(picture(40, 30), format_),
        animation(format_, 3) if format_ in ANIMATED else b"",
    ]
    rng = random.Random(format_)
    small = Preprocess(32, (32, 32), "bilinear", None, None)
    for number in range(250):
        damaged = bytearray(files[number % 2] or files[0])
        for _ in range(rng.randint(1, 12)):
            # Headers are short; most damage goes there.
            last = len(damaged) - 1
            at = rng.randint(0, min(last, 300) if rng.random() < 0.7 else last)
            damaged[at] = rng.choice((0, 0xFF, rng.randrange(256)))
        decode(bytes(damaged), preprocess=small, max_pixels=1_000_000)


@pytest.mark.parametrize("content", ["PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_an_image_under_another_formats_name_is_decoded_by_content_and_flagged(
    content: str,
) -> None:
    file = encode(picture(90, 60), content)
    pixels_HWC, loaded = decode(file, b"folder/photo.jpg")
    assert loaded == Loaded(warnings=("extension_mismatch",))
    np.testing.assert_array_equal(pixels_HWC, decode(file)[0])


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        ("JPEG", b"a.jpg"),
        ("JPEG", b"a.JPEG"),
        ("JPEG", b"a.jfif"),
        ("MPO", b"a.jpg"),
        ("MPO", b"a.mpo"),
        ("PNG", b"a.PnG"),
        ("TIFF", b"a.tif"),
        ("BMP", b"a.dib"),
        ("WEBP", b"a.webp"),
        ("AVIF", b"a.avif"),
        ("GIF", b"a.gif"),
        ("PNG", b"without a suffix"),
        ("PNG", b"folder.jpg/name"),
        ("PNG", b"a.jpg.unknown"),
        ("PNG", b"\xff\xfe.png"),
    ],
)
def test_a_name_that_promises_the_right_format_or_none_is_not_flagged(
    format_: str, name: bytes
) -> None:
    assert decode(encode(picture(60, 60), format_), name)[1] == Loaded()


def test_a_png_without_its_end_is_predicted_and_flagged() -> None:
    whole = encode(picture(64, 48), "PNG")
    pixels_HWC, loaded = decode(png_without_end(), b"a.png")
    assert loaded == Loaded(warnings=("missing_end",))
    np.testing.assert_array_equal(pixels_HWC, decode(whole)[0])


def test_a_jpeg_with_trailing_junk_is_predicted() -> None:
    file = encode(picture(64, 48), "JPEG")
    pixels_HWC, loaded = decode(file + b"junk" * 100, b"a.jpg")
    assert loaded == Loaded()
    np.testing.assert_array_equal(pixels_HWC, decode(file)[0])


ANIMATED = {"GIF": "animated:3", "WEBP": "animated:3", "PNG": "animated:3", "AVIF": "animated:3"}


@pytest.mark.parametrize(("format_", "flag"), [*ANIMATED.items(), ("TIFF", "pages:3")])
def test_of_several_frames_the_first_is_predicted_and_their_number_flagged(
    format_: str, flag: str
) -> None:
    file = animation(format_, 3)
    assert decode(file)[1] == Loaded(warnings=(flag,))
    assert_torchvisions_pixels(file, RESNET50)


@pytest.mark.parametrize("format_", ["GIF", "PNG", "TIFF"])
def test_damage_in_a_later_frame_leaves_the_first_as_torchvision_sees_it(format_: str) -> None:
    file = animation(format_, 4)
    one = len(encode(picture(64, 48), format_))
    for cut in range(one + one // 3, len(file), one // 4):
        assert_torchvisions_pixels(file[:cut], RESNET50)


def test_the_pixel_limit_is_the_jobs_and_an_image_of_just_that_size_passes() -> None:
    file = encode(picture(30, 20), "JPEG")
    assert decode(file, max_pixels=600)[1] == Loaded()
    failure = decode(file, max_pixels=599)[1].failure
    assert failure == Failure("too_large", "600 pixels; loader.max_pixels allows 599")


def test_a_jpeg_of_81_megapixels_is_decoded_by_default_and_refused_by_limit() -> None:
    file = encode(Image.new("L", (9000, 9000), 77), "JPEG")
    assert len(file) < 1_300_000
    pixels_HWC, loaded = decode(file, b"big.jpg")
    assert loaded == Loaded()
    assert (pixels_HWC == 77).all()
    failure = decode(file, b"big.jpg", max_pixels=80_000_000)[1].failure
    assert failure is not None
    assert failure.code == "too_large"


GHOSTSCRIPT_CHILD = """
import io, sys
import numpy as np
from PIL import Image
data = open(sys.argv[1], "rb").read()
if sys.argv[2] == "decoder":
    from batchclf.images.decode import Decoder
    from batchclf.results.records import Preprocess
    crop = (32, 32)
    decoder = Decoder(Preprocess(32, crop, "bilinear", None, None))
    print(decoder(data, b"x.jpg", np.zeros((*crop, 3), np.uint8)).failure.code)
else:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception as error:
        print(error)
"""


def test_ghostscript_is_never_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    fake.chmod(0o755)
    eps = tmp_path / "x.jpg"
    eps.write_bytes(EPS)

    def child(how: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GHOSTSCRIPT_CHILD, eps, how],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    assert child("decoder") == "unsupported_format"
    assert not started.exists()
    child("plain Pillow")
    assert started.exists(), "the trap does not work: plain Pillow should have started it"


def test_what_pillow_warns_of_does_not_reach_the_log(tmp_path: Path) -> None:
    """A palette with transparency in bytes makes Pillow warn, each time."""
    file = tmp_path / "x.png"
    file.write_bytes(encode(picture(64, 48, "P"), "PNG", transparency=bytes(range(256))))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, file, "bilinear", "exact", ""],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""


def test_the_decoder_works_where_pillow_is_installed_under_a_path_with_blanks(
    tmp_path: Path,
) -> None:
    import PIL

    here = tmp_path / "my programs"
    site = Path(PIL.__file__).parent.parent
    for name in ("PIL", "pillow.libs"):
        if not (site / name).is_dir():
            pytest.skip("Pillow is not installed from a wheel")
        shutil.copytree(site / name, here / name)
    file = tmp_path / "x.tif"
    file.write_bytes(encode(picture(64, 48), "TIFF", compression="tiff_lzw")[:-2])
    done = subprocess.run(
        [sys.executable, "-c", WHERE, file],
        env={**os.environ, "PYTHONPATH": f"{here}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{here / 'PIL'}\n"
    assert done.stderr == "", "libtiff is silenced there as well"


WHERE = """
import os, sys
import numpy as np
import PIL
from batchclf.images.decode import Decoder
from batchclf.results.records import Preprocess
crop = (32, 32)
decoder = Decoder(Preprocess(32, crop, "bilinear", None, None))
decoder(open(sys.argv[1], "rb").read(), b"x.tif", np.zeros((*crop, 3), np.uint8))
print(os.path.dirname(PIL.__file__))
"""
