"""decode.py: torchvision's pixels exactly, and `fast` ones close to them."""

import io
import itertools
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from batchclf.images import jpeg
from batchclf.images.decode import Decoder
from batchclf.results.records import (
    DecodeMode,
    Interpolation,
    Loaded,
    Pixels,
    Preprocess,
)
from tests.conftest import BY_HAND, MOBILENET_WEIGHTS, ODD_IMAGES, PHOTOS, data
from tests.images.common import (
    CASES,
    RESNET50,
    RESNET50_V1,
    assert_torchvisions_pixels,
    but_colours,
    decode,
    decoding_mb,
    encode,
    picture,
    tiff,
    torchvision_pixels,
    torchvision_presets,
)

# The decoder silences Pillow; pytest switches every warning on again.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

DECODE_MODES: tuple[DecodeMode, ...] = ("exact", "fast")
SIZES = ((500, 333), (333, 500), (224, 224), (1001, 57), (31, 17), (777, 778))


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
            assert but_colours(loaded) == Loaded(), path.name
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
    "I;16-png": ("I;16", "PNG", ("16bit_scaled",)),
    "I;16-tiff": ("I;16", "TIFF", ("16bit_scaled",)),
    "I;16B-tiff": ("I;16B", "TIFF", ("16bit_scaled",)),
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


@pytest.mark.parametrize(
    "case", [case for case in MODES if not case.startswith(("I;16", "YCbCr-tiff"))]
)
def test_grey_is_what_pillow_makes_of_the_file_before_the_resize(case: str) -> None:
    """As `Image.open(file).convert("L")` stands before a script's transforms.

    Of a YCbCr TIFF Pillow would take Y itself, which is within 1 of the grey of its RGB.
    """
    mode, format_, _ = MODES[case]
    file = encode(picture(333, 251, mode), format_)
    for preset in (RESNET50, Preprocess(40, (64, 48), "bicubic", None, None)):
        pixels_HWC, _ = decode(file, preprocess=replace(preset, channels="grey"))
        expected_HWC = torchvision_pixels(Image.open(io.BytesIO(file)).convert("L"), preset)
        np.testing.assert_array_equal(pixels_HWC, expected_HWC)


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


BROKEN_EXIF = {
    "text": b"Exif\0\0LoremIpsum dolor sit amet",
    "too short": b"Exif\0\0MM\0*",
    "a directory beyond its end": b"Exif\0\0MM\0*\0\0\1\0" + bytes(20),
    "a directory cut short": b"Exif\0\0II*\0\x08\0\0\0\x10\0" + bytes(range(20)),
}


def avif_with_exif(exif: bytes) -> bytes:
    """Pillow writes only what it can read: put in the place of another block."""
    block = exif.removeprefix(b"Exif\0\0")
    placeholder = Image.Exif()
    placeholder[0x010E] = "x" * len(block)
    file = encode(picture(64, 48), "AVIF", exif=placeholder.tobytes())
    return file.replace(placeholder.tobytes()[6:][: len(block)], block)


@pytest.mark.parametrize(
    ("format_", "case"),
    [
        *itertools.product(["JPEG", "PNG", "WEBP"], BROKEN_EXIF),
        *(("AVIF", case) for case in BROKEN_EXIF if case != "too short"),  # not to be made so
    ],
)
def test_an_image_whose_exif_cannot_be_read_is_predicted_as_it_stands_and_flagged(
    format_: str, case: str
) -> None:
    exif = BROKEN_EXIF[case]
    if format_ == "AVIF":
        file = avif_with_exif(exif)
    else:
        file = encode(picture(64, 48), format_, exif=exif)
    assert exif[6:] in file
    expected_HWC, _ = decode(encode(picture(64, 48), format_))
    for exif_transpose, flags in ((False, ()), (True, ("exif_corrupt",))):
        pixels_HWC, loaded = decode(file, exif_transpose=exif_transpose)
        assert loaded == Loaded(warnings=flags)
        np.testing.assert_array_equal(pixels_HWC, expected_HWC)


@pytest.mark.parametrize("place", [0, 8, 9, 5000, 2**32 - 1])
def test_a_tiff_whose_exif_cannot_be_read_is_upright_by_its_own_orientation(place: int) -> None:
    """Which is in its main directory, and not in EXIF."""
    broken = tiff({34665: place, 274: [3]}, bytes(range(16)))
    pixels_HWC, loaded = decode(broken, exif_transpose=True)
    assert loaded == Loaded()
    turned = tiff({}, bytes(range(16))[::-1])
    np.testing.assert_array_equal(pixels_HWC, decode(turned)[0])


def test_the_real_file_with_a_broken_exif_block_is_predicted() -> None:
    file = data(CASES / "exif.png").read_bytes()
    pixels_HWC, loaded = decode(file, exif_transpose=True)
    assert loaded == Loaded(warnings=("exif_corrupt",))
    np.testing.assert_array_equal(pixels_HWC, decode(file)[0])


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


def test_fast_decodes_12_megapixels_at_least_twice_as_fast_as_exact() -> None:
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
    assert ratio >= 2


@BY_HAND
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
