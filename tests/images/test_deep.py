"""Samples of more than 8 bits: what `loader.sixteen_bit` makes of them, what the record says."""

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from batchclf.results.records import Loaded, Pixels, Preprocess, SixteenBit
from tests.conftest import data
from tests.images.common import (
    CASES,
    RESNET50,
    assert_torchvisions_pixels,
    decode,
    encode,
    tiff,
    torchvision_pixels,
)
from tests.images.test_bad_input import chunk, tiff_of

WHOLE = Preprocess((4, 4), (4, 4), "nearest", None, None)
RAMP = np.arange(16, dtype="<u2") * 4369  # 0 to 65535


def test_16_bit_grey_becomes_its_upper_8_bits_whatever_holds_it() -> None:
    grey_HW = (RAMP >> 8).astype(np.uint8).reshape(4, 4)
    for file in (
        tiff_of(16, pixels=RAMP.tobytes()),
        encode(Image.fromarray(RAMP.reshape(4, 4)), "PNG"),
        encode(Image.fromarray(RAMP.reshape(4, 4)), "TIFF", compression="tiff_lzw"),
    ):
        pixels_HWC, loaded = decode(file, preprocess=WHOLE)
        assert loaded == Loaded(warnings=("16bit_scaled",))
        np.testing.assert_array_equal(pixels_HWC, np.stack([grey_HW] * 3, axis=-1))


def test_16_bit_grey_whose_zero_is_white_is_not_shown_as_a_negative() -> None:
    pixels_HWC, _ = decode(tiff_of(16, photometric=0, pixels=RAMP.tobytes()), preprocess=WHOLE)
    np.testing.assert_array_equal(pixels_HWC[..., 0].ravel(), 255 - (RAMP >> 8))


def test_12_bit_grey_becomes_its_upper_8_bits() -> None:
    values = [number * 273 for number in range(16)]  # 0 to 4095
    packed = b"".join(
        (first << 12 | second).to_bytes(3, "big")
        for first, second in zip(values[::2], values[1::2], strict=True)
    )
    pixels_HWC, loaded = decode(tiff_of(12, pixels=packed), preprocess=WHOLE)
    assert loaded == Loaded(warnings=("16bit_scaled",))
    assert pixels_HWC[..., 0].ravel().tolist() == [value >> 4 for value in values]


def test_a_tiff_in_8_bit_cielab_is_converted_as_pillow_does() -> None:
    colours = Image.new("LAB", (64, 48), (180, 90, 160))
    assert_torchvisions_pixels(encode(colours, "TIFF"), RESNET50)


def idat(rows: bytes) -> bytes:
    return chunk(b"IDAT", zlib.compress(rows))


# ---- what a file says of its range ---------------------------------------------------------------

LOW = np.arange(16, dtype=np.uint16).reshape(4, 4) * 100 + 300  # 300 to 1800


def shown(
    file: bytes, sixteen_bit: SixteenBit = "scale", preprocess: Preprocess = WHOLE
) -> tuple[Pixels, tuple[str, ...]]:
    """One channel of three that are equal, and the warnings."""
    pixels_HWC, loaded = decode(file, preprocess=preprocess, sixteen_bit=sixteen_bit)
    assert loaded.failure is None
    assert (pixels_HWC == pixels_HWC[..., :1]).all()
    return pixels_HWC[..., 0], loaded.warnings


def spread(values_HW: NDArray[np.uint16], black: int, white: int) -> NDArray[np.float64]:
    return np.floor((values_HW - float(black)) / (white - black) * 255 + 0.5)


def deep_tiff(values_HW: NDArray[np.uint16], **tags: int | list[int]) -> bytes:
    numbered = {int(name[1:]): value for name, value in tags.items()}
    return tiff({258: [16], **numbered}, values_HW.astype("<u2").tobytes())


def test_dark_16_bit_grey_is_flagged_with_its_range() -> None:
    for file in (deep_tiff(LOW), encode(Image.fromarray(LOW), "PNG")):
        pixels_HW, flags = shown(file)
        assert flags == ("16bit_scaled", "16bit_range:300-1800")
        np.testing.assert_array_equal(pixels_HW, LOW >> 8)


def test_only_what_is_less_than_a_quarter_of_white_is_flagged() -> None:
    for highest, is_dark in ((16_383, True), (16_384, False)):
        values_HW = np.full((4, 4), highest, np.uint16)
        assert ("16bit_range" in str(shown(deep_tiff(values_HW))[1])) is is_dark


def test_dark_colours_of_16_bits_are_flagged_as_well_though_pillow_keeps_their_upper_half() -> None:
    for value, expected in ((0x0740, ("16bit_range:1792-2047",)), (0x8000, ())):
        png = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        rows = (b"\0" + struct.pack(">12H", *[value] * 12)) * 4
        for file in (
            b"\x89PNG\r\n\x1a\n" + png + idat(rows) + chunk(b"IEND", b""),
            tiff({258: [16] * 3, 262: 2, 277: 3}, struct.pack("<H", value) * 48),
        ):
            pixels_HW, flags = shown(file)
            assert flags == expected
            assert (pixels_HW == value >> 8).all()


def test_8_bit_images_are_never_flagged_however_dark() -> None:
    for mode in ("L", "RGB", "LA"):
        for format_ in ("PNG", "TIFF"):
            assert "16bit" not in str(decode(encode(Image.new(mode, (9, 9)), format_))[1])


def test_a_tiff_that_says_its_range_is_scaled_by_it() -> None:
    for lowest, highest in ((300, 1800), (0, 4095), (0, 2047)):
        pixels_HW, flags = shown(deep_tiff(LOW, t340=[lowest], t341=[highest]))
        assert flags == ("16bit_scaled",)
        np.testing.assert_array_equal(pixels_HW, spread(LOW, lowest, highest))
    pixels_HW, _ = shown(deep_tiff(LOW, t341=[1000]))
    np.testing.assert_array_equal(pixels_HW, spread(LOW, 0, 1000).clip(0, 255))


def test_a_tiff_whose_zero_is_white_is_scaled_by_its_range_and_inverted() -> None:
    pixels_HW, _ = shown(deep_tiff(LOW, t340=[300], t341=[1800], t262=0))
    np.testing.assert_array_equal(pixels_HW, 255 - spread(LOW, 300, 1800))


@pytest.mark.parametrize("nonsense", [[0], [300], [65535, 3]])
def test_a_range_that_is_none_is_passed_over(nonsense: list[int]) -> None:
    if nonsense[0] == 65535:
        file = deep_tiff(LOW, t340=[65535], t341=[65535])
    else:
        file = deep_tiff(LOW, t340=[300], t341=nonsense)
    np.testing.assert_array_equal(shown(file)[0], LOW >> 8)


def png_of_significant_bits(values_HW: NDArray[np.uint16], bits: int) -> bytes:
    file = encode(Image.fromarray(values_HW), "PNG")
    return file[:33] + chunk(b"sBIT", bytes([bits])) + file[33:]


def test_a_png_that_says_how_many_bits_are_used_is_scaled_by_them_if_its_samples_are_not() -> None:
    """A writer should have scaled them up, as the standard wants it; then they fill all bits."""
    pixels_HW, flags = shown(png_of_significant_bits(LOW, 11))
    assert flags == ("16bit_scaled",)
    np.testing.assert_array_equal(pixels_HW, spread(LOW, 0, 2047))
    as_it_should_HW = ((LOW << 5) | (LOW >> 6)).astype(np.uint16)
    pixels_HW, flags = shown(png_of_significant_bits(as_it_should_HW, 11))
    np.testing.assert_array_equal(pixels_HW, as_it_should_HW >> 8)
    dark_HW = np.full((4, 4), 1 << 5, np.uint16)
    np.testing.assert_array_equal(shown(png_of_significant_bits(dark_HW, 11))[0], 0)


# ---- the key -------------------------------------------------------------------------------------


def test_stretch_takes_each_image_from_its_darkest_to_its_lightest_value() -> None:
    for file in (deep_tiff(LOW, t341=[4095]), encode(Image.fromarray(LOW), "PNG")):
        pixels_HW, flags = shown(file, "stretch")
        assert flags == ("16bit_stretched",)
        np.testing.assert_array_equal(pixels_HW, spread(LOW, 300, 1800))
    flat_HW = np.full((4, 4), 700, np.uint16)
    assert (shown(deep_tiff(flat_HW), "stretch")[0] == 0).all()


def test_clip_has_the_pixels_of_torchvision() -> None:
    values_HW = np.random.default_rng(0).integers(0, 600, (60, 80)).astype(np.uint16)
    file = encode(Image.fromarray(values_HW), "PNG")
    pixels_HWC, loaded = decode(file, preprocess=RESNET50, sixteen_bit="clip")
    assert loaded == Loaded(warnings=("16bit_clipped",))
    expected_HWC = torchvision_pixels(Image.open(io.BytesIO(file)), RESNET50)
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)


def test_the_key_changes_nothing_in_8_bits() -> None:
    file = encode(Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)), "PNG")
    for sixteen_bit in ("stretch", "clip"):
        np.testing.assert_array_equal(shown(file, sixteen_bit)[0].ravel(), np.arange(16))


def test_a_microscopes_picture_of_11_bits_is_told_and_can_be_seen() -> None:
    file = data(CASES / "exiv2-bug1044.tif").read_bytes()
    dark_HW, flags = shown(file, preprocess=RESNET50)
    assert flags == ("16bit_scaled", "16bit_range:115-1846")
    assert dark_HW.max() < 8
    assert shown(file, "stretch", RESNET50)[0].max() > 100


def test_grey_premultiplied_by_its_alpha_is_shown_as_colours_are() -> None:
    """Pillow goes from RGBa to RGB by itself, from La only by way of LA."""
    pixels_HWC, loaded = decode(
        tiff({258: [8, 8], 277: 2, 338: [1]}, bytes((100, 200)) * 16), preprocess=WHOLE
    )
    assert loaded == Loaded(warnings=("has_alpha",))
    colours = tiff({258: [8] * 4, 262: 2, 277: 4, 338: [1]}, bytes((100, 100, 100, 200)) * 16)
    expected_HWC, loaded = decode(colours, preprocess=WHOLE)
    assert loaded == Loaded(warnings=("has_alpha",))
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)
    assert_torchvisions_pixels(colours, RESNET50)
