"""Files that are no such image, damaged ones and odd ones: the code or the flag of each.

What concerns names, links, permissions and lists is in test_source.py; JPEGs that Pillow passes
although they are damaged in test_jpeg.py; colour modes and orientations in test_decode.py.
"""

import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchclf.images.local import LocalFiles
from batchclf.images.source import open_source
from batchclf.results.records import Failure, Loaded, Preprocess
from tests.conftest import ROOT, read_records
from tests.images.common import (
    MEASURE,
    RESNET50,
    assert_torchvisions_pixels,
    but_colours,
    decode,
    decoding_mb,
    encode,
    picture,
    tiff,
)
from tests.tiny import run_here, write_tiny_job

# The decoder silences Pillow; pytest switches every warning on again.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")


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


def tiff_of(
    bits: int, *, channels: int = 1, kind: int = 1, photometric: int = 1, pixels: bytes = b""
) -> bytes:
    """A TIFF of 4 x 4 pixels with one strip; `kind` is 1 unsigned, 2 signed, 3 floating-point."""
    pixels = pixels or bytes(range(16 * channels * bits // 8))
    entries = [
        (256, 3, 1, 4),
        (257, 3, 1, 4),
        (258, 3, channels, bits if channels == 1 else 200),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 300),
        (277, 3, 1, channels),
        (278, 3, 1, 4),
        (279, 4, 1, len(pixels)),
        (339, 3, channels, kind if channels == 1 else 250),
    ]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    file = bytearray(b"II*\0" + struct.pack("<I", 8) + directory).ljust(300, b"\0")
    file[200 : 200 + 2 * channels] = struct.pack("<H", bits) * channels
    file[250 : 250 + 2 * channels] = struct.pack("<H", kind) * channels
    return bytes(file) + pixels


SIXTEEN = bytes(range(16))
"""The pixels of a grey image of 4 x 4."""


def rgb_tiff(bits: int) -> bytes:
    return tiff({258: [bits] * 3, 262: 2, 277: 3}, bytes(16 * 3 * bits // 8))


def planes_of_ycbcr() -> bytes:
    """One plane after the other, of one byte per pixel."""
    return tiff({258: [8] * 3, 262: 6, 277: 3, 284: 2, 530: [1, 1]}, SIXTEEN * 3)


def tiles_as_strips() -> bytes:
    """So many bytes that Pillow would show its rows in the wrong places."""
    return tiff({256: 20, 257: 16, 322: 16, 323: 16}, bytes(512))


def jpeg_of_12_bits() -> bytes:
    file = bytearray(encode(picture(64, 48), "JPEG"))
    file[file.index(b"\xff\xc0") + 4] = 12
    return bytes(file)


def png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, behind its header."""
    file = encode(picture(64, 48), "PNG")
    return file[:33] + chunk(kind, content) + file[33:]


TEXT_BOMB = zlib.compress(bytes(200_000_000), 9)


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
    Bad("text_bomb.png", lambda: png_with(b"zTXt", b"a\0\0" + TEXT_BOMB), "too_large"),
    Bad("profile_bomb.png", lambda: png_with(b"iCCP", b"a\0\0" + TEXT_BOMB), "too_large"),
    Bad("float.tif", lambda: encode(picture(64, 48, "F"), "TIFF"), "unsupported_mode", "floating"),
    Bad("double.tif", lambda: tiff_of(64, kind=3), "unsupported_mode", "floating"),
    Bad("float_rgb.tif", lambda: tiff_of(32, channels=3, kind=3), "unsupported_mode", "floating"),
    Bad("signed.tif", lambda: tiff_of(16, kind=2), "unsupported_mode", "signed"),
    Bad("integer.tif", lambda: tiff_of(32), "unsupported_mode", "32-bit"),
    Bad("integer_rgb.tif", lambda: tiff_of(32, channels=3, photometric=2), "unsupported_mode"),
    Bad("bands.tif", lambda: tiff_of(8, channels=7), "unsupported_mode", "8+8+8"),
    Bad("lab16.tif", lambda: tiff_of(16, channels=3, photometric=8), "unsupported_mode", "space 8"),
    Bad("12bit.jpg", jpeg_of_12_bits, "unsupported_mode", "12 bits"),
    Bad("fits.jpg", lambda: b"SIMPLE  =                    T".ljust(2880), "unsupported_format"),
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
    Bad(
        "raw.tif",
        lambda: tiff({256: 4, 257: 4, 259: 34892}, SIXTEEN),
        "unsupported_format",
        "lossy",
    ),
    Bad("j2k.tif", lambda: tiff({259: 34712}, SIXTEEN), "unsupported_format", "JPEG 2000"),
    Bad("lerc.tif", lambda: tiff({259: 34887}, SIXTEEN), "unsupported_format", "LERC"),
    Bad("unknown.tif", lambda: tiff({259: 4711}, SIXTEEN), "unsupported_format", "number 4711"),
    Bad("webp.tif", lambda: tiff({259: 50001}, SIXTEEN), "unsupported_format", "WebP"),
    Bad("planes.tif", planes_of_ycbcr, "unsupported_format", "planes of YCbCr"),
    Bad("tiles.tif", tiles_as_strips, "unsupported_format", "tiles in the place of strips"),
    Bad("4bit.tif", lambda: rgb_tiff(4), "unsupported_mode", "RGB of 4+4+4 bits"),
    Bad("2bit.tif", lambda: rgb_tiff(2), "unsupported_mode", "RGB of 2+2+2 bits"),
    Bad(
        "big_motorola.tif",
        lambda: b"MM\0+\0\x08" + bytes(9) + b"\x10" + bytes(60),
        "unsupported_format",
        "big-endian",
    ),
    Bad("huge.avif", lambda: avif_claiming(40_000, 40_000), "too_large", "1,600,000,000 pixels"),
    Bad("old.tga", lambda: encode(picture(9, 9), "TGA")[:-26], "unsupported_format", "Targa"),
    Bad("new.jpg", lambda: encode(picture(9, 9), "TGA"), "unsupported_format", "Targa"),
    Bad(
        "packed.tga",
        lambda: encode(picture(9, 9), "TGA", compression="tga_rle"),
        "unsupported_format",
    ),
    Bad(
        "palette.tga",
        lambda: encode(picture(9, 9, "P"), "TGA")[:-26],
        "unsupported_format",
        "Targa",
    ),
    Bad("x.pcx", lambda: encode(picture(9, 9), "PCX"), "unsupported_format", "PCX"),
    Bad("x.jxr", lambda: b"II\xbc\x01" + bytes(60), "unsupported_format", "JPEG XR"),
    Bad("x.dcm", lambda: bytes(128) + b"DICM" + bytes(60), "unsupported_format", "DICOM"),
    Bad("film.jpg", lambda: b"\0\0\0\x18ftypisom" + bytes(60), "not_an_image", "video"),
    Bad(
        "apple_double.jpg",
        lambda: b"\0\x05\x16\x07\0\2\0\0Mac OS X" + bytes(60),
        "not_an_image",
        "AppleDouble",
    ),
    Bad("jp2.jpg", lambda: encode(picture(32, 32), "JPEG2000"), "unsupported_format"),
]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_png_whose_text_or_profile_unpacks_to_200_mb_costs_little_memory(
    tmp_path: Path, kind: bytes
) -> None:
    file = tmp_path / "bomb.png"
    before = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
    file.write_bytes(png_with(kind, before + TEXT_BOMB))
    assert decoding_mb(file, "bilinear", "exact", code="too_large") < 100


def test_a_gif_whose_frame_lies_far_outside_its_screen_costs_no_memory(tmp_path: Path) -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 100, 50, 0x80, 0, 0) + bytes(6)
    disposal = b"\x21\xf9\x04\x09\x0a\x00\x00\x00"  # to the background: Pillow allocates it
    frame = b"," + struct.pack("<HHHHB", 28_000, 18_000, 41_000, 40_000, 0)
    file = tmp_path / "bomb.gif"
    file.write_bytes(screen + disposal + frame + b"\x02\x02\x44\x01\x00;")
    assert decoding_mb(file, "bilinear", "exact", code="too_large") < 100


def test_a_container_of_countless_parts_is_explained_without_reading_them_all() -> None:
    """Each entry of the TIFF names the same million values; all of them would take hours."""
    values, num_entries = bytes(1_000_000), 60_000
    entry = struct.pack("<HHII", 273, 1, len(values), 8 + 2 + 12 * num_entries + 4)
    directory = struct.pack("<H", num_entries) + entry * num_entries + bytes(4)
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + values
    avif = encode(picture(64, 48), "AVIF")[:32] + struct.pack(">I4s", 8, b"free") * 1_000_000
    for file in (tiff, avif):
        failure = decode(file)[1].failure
        assert failure is not None
        assert failure.code == "not_an_image"


class Unheard(Exception):
    """What no decoder was ever seen to raise."""


@pytest.mark.parametrize("place", ["load", "has_transparency_data", "convert", "tobytes"])
@pytest.mark.parametrize("error", [Unheard("boo"), AssertionError(), AttributeError("boo")])
def test_whatever_a_decoder_raises_and_wherever_is_that_images_failure(
    monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    file = encode(picture(64, 48, "P"), "PNG")
    expected_HWC, _ = decode(file)

    def raises(*arguments: object, **named: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        broken = property(raises) if place == "has_transparency_data" else raises
        patch.setattr(Image.Image, place, broken)
        failure = decode(file)[1].failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert failure.message == f"{type(error).__name__}: {str(error) or 'no more is said'}"
    np.testing.assert_array_equal(decode(file)[0], expected_HWC)


def test_an_exception_that_may_be_our_own_fault_is_logged_with_its_trace_but_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(image: Image.Image, data: bytes) -> tuple[str, ...]:
        raise Unheard("boo")

    def raises(image: Image.Image) -> None:
        raise OSError("as a decoder does")

    file = encode(picture(64, 48), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "getexif", raises)
        decode(file, exif_transpose=True)
        patch.setattr("batchclf.images.decode.content_notes", fails)
        for _ in range(3):
            decode(file, b"a/b.png")
    (record,) = caplog.records
    assert "a/b.png" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is Unheard


@pytest.mark.parametrize("mode", ["1", "2", "4", "8"])
def test_a_palette_image_without_a_palette_is_corrupt(mode: str) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, int(mode), 3, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(33 * 32)))
    file = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    assert decode(file)[1].failure == Failure("corrupt", "its palette is missing")


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_a_bad_file_is_recorded_with_its_code(tmp_path: Path, bad: Bad) -> None:
    (tmp_path / bad.name).write_bytes(bad.make())
    source = open_source(tmp_path)
    (path,) = LocalFiles(source).paths()
    content = LocalFiles(source).read(path)
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


# ---- what lies beside the pixels -----------------------------------------------------------------


def jpeg_with(segment: bytes) -> bytes:
    """A JPEG with one more segment, of APP1 or APP2."""
    file = encode(picture(64, 48), "JPEG")
    marker = b"\xff\xe2" if segment.startswith(b"ICC") else b"\xff\xe1"
    return file[:2] + marker + struct.pack(">H", len(segment) + 2) + segment + file[2:]


BESIDE = {
    "an ICC profile of nothing": lambda: jpeg_with(b"ICC_PROFILE\0\1\1" + bytes(128)),
    "half of an ICC profile": lambda: jpeg_with(b"ICC_PROFILE\0\1\2" + bytes(range(200))),
    "noise for an ICC profile": lambda: png_with(b"iCCP", b"a\0\0" + zlib.compress(b"noise")),
    "an ICC profile cut short": lambda: png_with(b"iCCP", b"a\0\0\x78\x9c"),
    "noise for XMP": lambda: jpeg_with(b"http://ns.adobe.com/xap/1.0/\0<x:xmp" + bytes(99)),
    "noise for XMP in a PNG": lambda: png_with(
        b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x" + b"\xff" * 9
    ),
    "noise for EXIF in a PNG": lambda: png_with(b"eXIf", b"MM\0*" + b"\xff" * 40),
}


@pytest.mark.parametrize("exif_transpose", [False, True])
@pytest.mark.parametrize("case", BESIDE)
def test_damaged_metadata_does_not_fail_the_image(case: str, exif_transpose: bool) -> None:
    file = BESIDE[case]()
    plain = encode(picture(64, 48), "JPEG" if file.startswith(b"\xff\xd8") else "PNG")
    pixels_HWC, loaded = decode(file, exif_transpose=exif_transpose, strict=True)
    told = ("exif_corrupt",) if "EXIF" in case and exif_transpose else ()
    assert but_colours(loaded) == Loaded(warnings=told)
    np.testing.assert_array_equal(pixels_HWC, decode(plain)[0])


# ---- strict --------------------------------------------------------------------------------------


def test_strict_records_a_png_without_its_end_as_corrupt_and_says_what_it_is() -> None:
    _, loaded = decode(png_without_end(), strict=True)
    assert loaded.failure is not None
    assert loaded.failure.code == "corrupt"
    assert "missing_end" in loaded.failure.message
    assert "loader.strict" in loaded.failure.message


@pytest.mark.parametrize("format_", [*ANIMATED, "TIFF", "JPEG", "BMP", "MPO"])
def test_strict_changes_nothing_for_an_image_that_is_whole(format_: str) -> None:
    several = format_ not in ("JPEG", "BMP", "MPO")
    file = animation(format_, 3) if several else encode(picture(64, 48), format_)
    strict_HWC, loaded = decode(file, strict=True)
    pixels_HWC, expected = decode(file)
    assert loaded == expected
    assert loaded.failure is None
    np.testing.assert_array_equal(strict_HWC, pixels_HWC)


def test_strict_leaves_every_other_failure_its_own_code() -> None:
    for bad in BAD_FILES:
        file = bad.make()
        assert decode(file, strict=True)[1] == decode(file)[1], bad.name


def test_a_job_says_how_strict_it_is_and_how_many_bytes_it_allows(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    cut = png_without_end()
    (folder / "cut.png").write_bytes(cut)
    (folder / "large.png").write_bytes(encode(picture(64, 48), "PNG") + bytes(20))
    job = write_tiny_job(
        tmp_path, input=str(folder), loader={"strict": True, "max_bytes": len(cut) + 20}
    )
    run_here(job)
    codes = [record["error"]["code"] for record in read_records(tmp_path / "out")]
    assert codes == ["corrupt", "too_large_bytes"]
