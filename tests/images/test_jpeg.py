"""jpeg.py: through simplejpeg every JPEG has the pixels, failures and flags it has through Pillow.

Besides, damage that Pillow passes over in silence is flagged.
"""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchclf.images import jpeg
from batchclf.images.jpeg import Limits, decoder_name, is_reducible, read_jpeg
from batchclf.results.records import DecodeMode, Loaded, Pixels, Preprocess
from tests.conftest import ODD_IMAGES, PHOTOS, ROOT, data
from tests.images.common import but_colours, decode, encode, picture

# The decoder silences Pillow; pytest switches every warning on again.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

SMALL = Preprocess(48, (40, 44), "bilinear", None, None)
MANY_PIXELS = 89_478_485


def limits(max_pixels: int = MANY_PIXELS, reduction: int = 1) -> Limits:
    return Limits(max_pixels, lambda width, height: reduction, lambda num_pixels, num_bytes: None)


def is_read(file: bytes) -> bool:
    """Whether simplejpeg takes the file, so that Pillow is not needed."""
    return read_jpeg(file, limits()).pixels_HWC is not None


def through_pillow(
    file: bytes, mode: DecodeMode = "exact", *, exif_transpose: bool = False
) -> tuple[Pixels, Loaded]:
    """What comes out where simplejpeg's pixels are not Pillow's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "USABLE", False)
        return decode(file, b"x.jpg", SMALL, mode=mode, exif_transpose=exif_transpose)


def assert_as_through_pillow(
    file: bytes, mode: DecodeMode = "exact", *, exif_transpose: bool = False
) -> Loaded:
    """Compare pixels, failure and flags; returns what was loaded, with any `jpeg_corrupt`."""
    pixels_HWC, loaded = decode(file, b"x.jpg", SMALL, mode=mode, exif_transpose=exif_transpose)
    expected_HWC, expected = through_pillow(file, mode, exif_transpose=exif_transpose)
    assert loaded.failure == expected.failure
    flags = tuple(flag for flag in loaded.warnings if flag != "jpeg_corrupt")
    assert flags == expected.warnings
    np.testing.assert_array_equal(pixels_HWC, expected_HWC)
    return loaded


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(data(folder).rglob("*")):
        if path.is_file() and (content := path.read_bytes()).startswith(b"\xff\xd8\xff"):
            yield path.name, content


# ---- the same pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_photo_is_read_without_pillow_to_the_same_pixels_and_none_is_flagged(
    mode: DecodeMode,
) -> None:
    for name, file in files_of(PHOTOS):
        assert is_read(file), name
        assert but_colours(assert_as_through_pillow(file, mode)) == Loaded(), name


FLAGGED = {"bad_huffman.jpg", "hopper_bad_exif.jpg"}
"""The odd files whose picture is visibly damaged, and that Pillow decodes all the same."""


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_odd_jpeg_comes_out_as_through_pillow_and_the_damaged_ones_are_flagged(
    mode: DecodeMode,
) -> None:
    flagged, num_read, num_files = set(), 0, 0
    for name, file in files_of(ODD_IMAGES):
        for exif_transpose in (False, True):
            loaded = assert_as_through_pillow(file, mode, exif_transpose=exif_transpose)
            if "jpeg_corrupt" in loaded.warnings:
                flagged.add(name)
        num_files += 1
        num_read += is_read(file)
    print(f"\n{num_read} of {num_files} odd files read without Pillow")
    assert flagged == FLAGGED
    assert num_read > 100


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    """Files as Pillow writes them: colours, chroma subsampling, scans, restarts, EXIF."""
    mode = draw(st.sampled_from(["RGB", "RGB", "RGB", "L", "CMYK", "YCbCr"]))
    size = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    exif = Image.Exif()
    if orientation := draw(st.integers(0, 9)):
        exif[274] = orientation
    keep_rgb = mode == "RGB" and draw(st.booleans())
    return encode(
        picture(*size, mode, seed=draw(st.integers(0, 3))),
        "JPEG",
        quality=draw(st.integers(1, 100)),
        subsampling=0 if keep_rgb else draw(st.integers(0, 2)),
        keep_rgb=keep_rgb,
        progressive=draw(st.booleans()),
        restart_marker_blocks=draw(st.integers(0, 3)),
        exif=exif,
    )


@settings(max_examples=200, deadline=None)
@given(file=jpegs(), mode=st.sampled_from(["exact", "fast"]), exif_transpose=st.booleans())
def test_any_jpeg_that_pillow_writes_has_the_same_pixels(
    file: bytes, mode: DecodeMode, exif_transpose: bool
) -> None:
    assert assert_as_through_pillow(file, mode, exif_transpose=exif_transpose) == Loaded()


def sampled(factors: str, width: int = 97, height: int = 75) -> bytes:
    return bytes(
        simplejpeg.encode_jpeg(np.asarray(picture(width, height)), colorsubsampling=factors)
    )


def sampled_441() -> bytes:
    """4:1:1 with its luminance factors exchanged: as many blocks, one above another."""
    file = bytearray(sampled("411", 64, 64))
    luminance = file.index(b"\xff\xc0") + 11
    assert file[luminance] == 0x41
    file[luminance] = 0x14
    return bytes(file)


@pytest.mark.parametrize("factors", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_chroma_subsampling_has_the_same_pixels(factors: str, mode: DecodeMode) -> None:
    file = sampled(factors)
    assert is_read(file)
    assert assert_as_through_pillow(file, mode) == Loaded()


@pytest.mark.parametrize(
    "make", [sampled_441, lambda: b"\xff\xd8\xff\xe0"], ids=["4:4:1", "a mere start"]
)
def test_what_simplejpeg_does_not_take_is_left_to_pillow(make: Callable[[], bytes]) -> None:
    assert not is_read(make())
    assert_as_through_pillow(make())


def test_a_jpeg_above_the_pixel_limit_is_not_even_allocated() -> None:
    file = encode(picture(30, 20), "JPEG")
    assert read_jpeg(file, limits(600)).pixels_HWC is not None
    assert read_jpeg(file, limits(599)).pixels_HWC is None


@pytest.mark.parametrize(("factor", "shape"), [(2, (61, 51)), (4, (31, 26)), (8, (16, 13))])
def test_a_reduced_jpeg_is_rounded_up_to_whole_pixels(factor: int, shape: tuple[int, int]) -> None:
    file = encode(picture(101, 121), "JPEG")
    found = read_jpeg(file, limits(reduction=factor))
    assert found.pixels_HWC is not None
    assert found.pixels_HWC.shape == (*shape, 3)
    assert (found.width, found.height, found.reduction) == (101, 121, factor)


def test_a_lossless_jpeg_is_decoded_whole_since_libjpeg_cannot_reduce_it() -> None:
    file = data(ODD_IMAGES / "sharp" / "testimgl.jpg").read_bytes()
    found = read_jpeg(file, limits(reduction=2))
    assert found.pixels_HWC is not None
    assert found.pixels_HWC.shape == (149, 227, 3)
    assert found.reduction == 1
    for usable in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jpeg, "USABLE", usable)
            tiny = Preprocess(32, (32, 32), "bilinear", None, None)
            fast_HWC, loaded = decode(file, preprocess=tiny, mode="fast")
            assert loaded == Loaded()
            exact_HWC, _ = decode(file, preprocess=tiny)
            assert np.abs(fast_HWC.astype(int) - exact_HWC).mean() < 0.1


def test_only_the_header_decides_whether_a_jpeg_is_reduced() -> None:
    """Phones append films to photos, and thumbnails may hold any bytes."""
    file = encode(picture(100, 80), "JPEG")
    sof3 = b"\xff\xc3"
    comment = b"\xff\xfe" + (2 + len(sof3)).to_bytes(2, "big") + sof3
    assert is_reducible(file)
    assert is_reducible(file + sof3)
    assert is_reducible(file[:2] + comment + file[2:])
    frame = file.index(b"\xff\xc0")
    assert not is_reducible(file[:frame] + sof3 + file[frame + 2 :])
    # What libjpeg passes over, and this does not: fill bytes, stray bytes, markers alone.
    for odd in (b"\xff", b"\0", b"\xff\x01", b"\xff\xd0"):
        assert not is_reducible(file[:frame] + odd + file[frame:])
    for end in range(frame + 1):
        assert not is_reducible(file[:end])


def test_threads_decode_at_once_without_disturbing_each_other() -> None:
    files = [encode(picture(200, 150, seed=seed), "JPEG") for seed in range(8)]
    alone = [decode(file, preprocess=SMALL)[0] for file in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = pool.map(lambda file: decode(file, preprocess=SMALL)[0], files)
            for found_HWC, expected_HWC in zip(together, alone, strict=True):
                np.testing.assert_array_equal(found_HWC, expected_HWC)


# ---- damage --------------------------------------------------------------------------------------


def _scan(file: bytes) -> int:
    """Where the compressed pixels begin."""
    return file.index(b"\xff\xda") + 14


def _scrambled(file: bytes) -> bytes:
    middle = (_scan(file) + len(file)) // 2
    noise = bytes(random.Random(7).choices(range(1, 255), k=40))
    return file[:middle] + noise + file[middle + 40 :]


def _with_zeros(file: bytes) -> bytes:
    middle = (_scan(file) + len(file)) // 2
    return file[:middle] + bytes(500) + file[middle:]


def _zeroed_half(file: bytes) -> bytes:
    return file[: len(file) // 2] + bytes(len(file) - len(file) // 2 - 2) + b"\xff\xd9"


def _half_with_end(file: bytes) -> bytes:
    return file[: len(file) // 2] + b"\xff\xd9"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", [_scrambled, _with_zeros, _zeroed_half, _half_with_end])
def test_damage_that_pillow_passes_in_silence_is_flagged(
    damage: Callable[[bytes], bytes], progressive: bool
) -> None:
    file = damage(encode(picture(200, 150), "JPEG", progressive=progressive))
    assert through_pillow(file)[1] == Loaded(), "Pillow is silent"
    assert assert_as_through_pillow(file) == Loaded(warnings=("jpeg_corrupt",))
    assert assert_as_through_pillow(file, "fast") == Loaded(warnings=("jpeg_corrupt",))
    named = decode(file, b"x.png", SMALL)[1]
    assert named == Loaded(warnings=("extension_mismatch", "jpeg_corrupt"))


def _with_odd_header(file: bytes) -> bytes:
    """Stray bytes before the tables, as in files that some programs touched."""
    at = file.index(b"\xff\xdb")
    return file[:at] + b"\0\1\2\3\4" + file[at:]


def _with_bad_profile(file: bytes) -> bytes:
    """The ninth part of one."""
    segment = b"ICC_PROFILE\0\x09\1" + bytes(200)
    return file[:2] + b"\xff\xe2" + (2 + len(segment)).to_bytes(2, "big") + segment + file[2:]


def _with_no_last_coefficient(file: bytes) -> bytes:
    """Some writers leave it 0 where it has no meaning."""
    last = _scan(file) - 2
    assert file[last] == 63
    return file[:last] + b"\0" + file[last + 1 :]


def _inks(width: int, height: int, **options: bool) -> bytes:
    return encode(picture(width, height, "CMYK"), "JPEG", **options)


HARD_TO_READ: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: _inks(200, 150),
    "progressive CMYK": lambda: _inks(200, 150, progressive=True),
    "stray bytes": lambda: _with_odd_header(encode(picture(200, 150), "JPEG")),
    "bad profile": lambda: _with_bad_profile(encode(picture(200, 150, "L"), "JPEG")),
    "last coefficient": lambda: _with_no_last_coefficient(encode(picture(200, 150), "JPEG")),
    "CMYK and stray bytes": lambda: _with_odd_header(_inks(200, 150)),
}
"""What simplejpeg does not take as it is."""


@pytest.mark.parametrize("case", HARD_TO_READ)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_damage_is_seen_in_files_of_every_kind_and_only_there(case: str, mode: DecodeMode) -> None:
    file = HARD_TO_READ[case]()
    assert is_read(file)
    assert but_colours(assert_as_through_pillow(file, mode)) == Loaded()
    for damage in (_scrambled, _zeroed_half, _half_with_end):
        damaged = but_colours(assert_as_through_pillow(damage(file), mode))
        assert damaged == Loaded(warnings=("jpeg_corrupt",)), damage


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", [_scrambled, _with_zeros, _zeroed_half, _half_with_end])
def test_strict_records_damage_that_can_be_decoded_as_corrupt(
    damage: Callable[[bytes], bytes], progressive: bool
) -> None:
    whole = encode(picture(200, 150), "JPEG", progressive=progressive)
    assert decode(whole, strict=True)[1] == Loaded()
    failure = decode(damage(whole), strict=True)[1].failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert "jpeg_corrupt" in failure.message
    assert "loader.strict" in failure.message


def test_a_lossless_jpeg_is_seen_to_be_damaged() -> None:
    file = data(ODD_IMAGES / "sharp" / "testimgl.jpg").read_bytes()
    assert decode(file, strict=True)[1] == Loaded()
    assert decode(_zeroed_half(file))[1] == Loaded(warnings=("jpeg_corrupt",))


def test_oddities_that_cost_no_pixel_are_not_flagged() -> None:
    file = encode(picture(64, 48), "JPEG")
    for odd in (
        file + b"trailing" * 50,
        _with_odd_header(file),
        _with_bad_profile(file),
        _with_no_last_coefficient(file),
    ):
        assert but_colours(assert_as_through_pillow(odd)) == Loaded()
        np.testing.assert_array_equal(
            decode(odd, preprocess=SMALL)[0], decode(file, preprocess=SMALL)[0]
        )


def test_a_failure_is_pillows_and_carries_no_flag() -> None:
    file = encode(picture(200, 150), "JPEG")
    for cut in (2, len(file) // 2):
        loaded = assert_as_through_pillow(file[:-cut])
        assert loaded.failure is not None
        assert loaded.failure.code == "truncated"
        assert loaded.warnings == ()


def test_random_damage_fails_and_shows_as_through_pillow() -> None:
    files = [
        encode(picture(70, 50), "JPEG"),
        encode(picture(70, 50), "JPEG", progressive=True),
        encode(picture(70, 50, "L"), "JPEG", restart_marker_blocks=2),
        encode(picture(60, 44, "CMYK"), "JPEG"),
    ]
    rng = random.Random(1)
    num_flagged = 0
    for number in range(800):
        damaged = bytearray(files[number % len(files)])
        for _ in range(rng.randint(1, 4)):
            last = len(damaged) - 1
            # Headers are short; half of the damage goes there.
            at = rng.randint(2, min(last, 600) if rng.random() < 0.5 else last)
            if rng.random() < 0.8:
                damaged[at] = rng.choice((0, 0xFF, rng.randrange(256)))
            else:
                del damaged[at : at + rng.randint(1, 20)]
        loaded = assert_as_through_pillow(bytes(damaged))
        num_flagged += "jpeg_corrupt" in loaded.warnings
    assert num_flagged > 40


# ---- another libjpeg -----------------------------------------------------------------------------


def test_the_decoder_is_named_with_its_version() -> None:
    assert decoder_name() == f"simplejpeg {version('simplejpeg')}"


def test_where_pillow_has_another_libjpeg_it_decodes_and_damage_shows_at_a_second_look_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _scrambled(encode(picture(200, 150), "JPEG"))
    with_simplejpeg_HWC, _ = decode(file, b"x.jpg", SMALL)
    monkeypatch.setattr(jpeg, "USABLE", False)
    assert decoder_name().startswith(f"Pillow {version('pillow')} (libjpeg")
    pixels_HWC, loaded = decode(file, b"x.jpg", SMALL)
    assert loaded == Loaded()
    np.testing.assert_array_equal(pixels_HWC, with_simplejpeg_HWC)
    failure = decode(file, b"x.jpg", SMALL, strict=True)[1].failure
    assert failure is not None
    assert failure.code == "corrupt"
    intact = encode(picture(200, 150), "JPEG")
    assert decode(intact, b"x.jpg", SMALL, strict=True)[1] == Loaded()


def test_another_libjpeg_under_pillow_is_noticed() -> None:
    """Its pixels would not be simplejpeg's, and torchvision's are Pillow's."""
    program = (
        "from PIL import features; features.check_feature = lambda name: False\n"
        "from batchclf.images import jpeg; print(jpeg.USABLE)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
