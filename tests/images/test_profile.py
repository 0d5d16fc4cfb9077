"""ICC profiles that say other colours than sRGB's are told of; the pixels stay torchvision's."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from batchclf.images.profile import is_srgb, profile_in_jpeg
from tests.conftest import ODD_IMAGES, data
from tests.images.common import decode

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FLAG = "icc_ignored"


def wide(profile: bytes) -> bytes:
    """The profile with Display P3's red (0.5151, 0.2412, -0.0011 as D50) in place of sRGB's."""
    count = int.from_bytes(profile[128:132], "big")
    for at in range(132, 132 + 12 * count, 12):
        if profile[at : at + 4] == b"rXYZ":
            offset = int.from_bytes(profile[at + 4 : at + 8], "big") + 8
    red = b"".join(round(65536 * x).to_bytes(4, "big", signed=True) for x in (0.5151, 0.2412, 0))
    return profile[:offset] + red + profile[offset + 12 :]


def picture(format_: str, profile: bytes | None, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").convert(mode)
    image.save(file, format_, **({} if profile is None else {"icc_profile": profile}))
    return file.getvalue()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_a_wide_gamut_profile_is_told_of_and_changes_no_pixel(format_: str) -> None:
    plain = decode(picture(format_, None))
    assert plain[1].warnings == ()
    assert decode(picture(format_, SRGB))[1].warnings == ()
    pixels_HWC, loaded = decode(picture(format_, wide(SRGB)))
    assert loaded.warnings == (FLAG,)
    assert np.array_equal(pixels_HWC, plain[0])


@pytest.mark.parametrize(
    "profile",
    [b"broken", SRGB[:100], SRGB[:140], b"\0" * 400, SRGB[:128] + b"\xff" * 400],
    ids=["text", "in its header", "in its table", "NUL", "all ones"],  # SRGB holds the time
)
def test_a_broken_profile_is_told_of_and_costs_nothing(profile: bytes) -> None:
    pixels_HWC, loaded = decode(picture("JPEG", profile))
    assert (loaded.failure, loaded.warnings) == (None, (FLAG,))
    assert np.array_equal(pixels_HWC, decode(picture("JPEG", None))[0])


def test_a_profile_behind_a_full_exif_segment_is_found() -> None:
    content = picture("JPEG", wide(SRGB))
    exif = b"\xff\xe1" + (65535).to_bytes(2, "big") + b"Exif\0\0" + b"\0" * (65533 - 6)
    assert decode(content[:2] + exif + content[2:])[1].warnings == (FLAG,)


def test_the_mark_alone_is_no_profile() -> None:
    assert profile_in_jpeg(b"\xff\xd8\xff\xe0") is None
    assert not is_srgb(profile_in_jpeg(b"\0\x10ICC_PROFILE\0\1\1") or b"")


@given(st.binary(max_size=300).map(lambda tail: SRGB[:40] + tail) | st.binary(max_size=600))
def test_no_bytes_but_srgbs_colours_are_srgb(profile: bytes) -> None:
    colours = [SRGB[at : at + 12] for at in offsets_of(SRGB)]
    assert not is_srgb(profile) or profile[16:20] == b"GRAY" or all(map(profile.count, colours))


def offsets_of(profile: bytes) -> list[int]:
    """Where a profile has the numbers of its three colours."""
    count = int.from_bytes(profile[128:132], "big")
    tags = [profile[at : at + 12] for at in range(132, 132 + 12 * count, 12)]
    return [int.from_bytes(one[4:8], "big") + 8 for one in tags if one[1:4] == b"XYZ"]


@given(st.integers(0, 2), st.integers(0, 2), st.floats(-0.5, 0.5))
def test_a_profile_is_srgb_as_long_as_each_number_of_its_colours_is(
    colour: int, number: int, moved: float
) -> None:
    at = offsets_of(SRGB)[colour] + 4 * number
    value = int.from_bytes(SRGB[at : at + 4], "big", signed=True) + round(65536 * moved)
    profile = SRGB[:at] + value.to_bytes(4, "big", signed=True) + SRGB[at + 4 :]
    assert is_srgb(profile) if abs(moved) < 0.015 else True
    assert not is_srgb(profile) if abs(moved) > 0.025 else True


def test_real_profiles_that_call_themselves_srgb_are() -> None:
    found = {}
    for path in sorted(data(ODD_IMAGES).rglob("*.jp*g")):
        content = path.read_bytes()
        profile = profile_in_jpeg(content)
        if profile is not None:
            found[path.name] = (is_srgb(profile), described(content))
    assert len(found) > 5
    assert [name for name, (same, text) in found.items() if "sRGB" in text and not same] == []
    assert [name for name, (same, text) in found.items() if "P3" in text and same] == []


def described(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.getProfileDescription(profile)
    except (KeyError, OSError):  # no image, or no profile after all
        return ""
