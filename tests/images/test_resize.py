"""resize.py: our own C gives Pillow's bytes, whatever the size, the window and the instructions."""

import shutil
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchclf.errors import UsageError
from batchclf.images import resampler, resize
from batchclf.images.picture import Picture
from batchclf.images.resample import Window, crop_window, resized_size
from batchclf.images.resampler import NATIVE
from batchclf.images.resize import Part, goes_tall_first, require_pillow, resize_into
from batchclf.results.records import Interpolation, Pixels, Preprocess
from tests.conftest import PHOTOS, ROOT, data
from tests.images import resize_fuzz
from tests.images.common import (
    decode,
    encode,
    picture,
    torchvision_pixels,
    torchvision_presets,
)
from tests.images.resize_fuzz import Case, by_code, by_pillow, check, content_of

interpolations = st.sampled_from(get_args(Interpolation))
needs_code = pytest.mark.skipif(not NATIVE, reason="_resize.c is not compiled here")
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles _resize.c")
if NATIVE:
    from batchclf.images import _resize


@st.composite
def cases(draw: st.DrawFn) -> Case:
    edges = st.integers(1, 120)
    width, height, *size = draw(edges), draw(edges), draw(edges), draw(edges)
    left, top = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    return Case(
        source_size=(width, height),
        box=(0, 0, width, height),
        size=(size[0], size[1]),
        corner=(left, top),
        window=(draw(st.integers(1, size[0] - left)), draw(st.integers(1, size[1] - top))),
        interpolation=draw(interpolations),
        content=draw(st.sampled_from(resize_fuzz.CONTENTS)),
        seed=draw(st.integers(0, 2**32)),
    )


@needs_code
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_any_window_is_that_of_a_full_resize_by_pillow(case: Case) -> None:
    check(_resize, case)


@needs_code
def test_random_parts_of_images_with_edges_up_to_65_500_are_pillows() -> None:
    assert resize_fuzz.run(_resize, seed=7, count=150, seconds=60) > 0


CASE = Case((500, 375), (0, 0, 500, 375), (341, 256), (58, 16), (224, 224), "bilinear", "noise", 1)
STRIP = resize_fuzz.LONGEST


@needs_code
@pytest.mark.parametrize("content", resize_fuzz.CONTENTS)
@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize(
    ("source_size", "size"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (40, 30)),
        ((300, 200), (1, 1)),
        ((2, 2), (50, 50)),
        ((STRIP, 1), (64, 64)),
        ((1, STRIP), (64, 64)),
        ((3, STRIP), (3, 900)),
        ((STRIP, 2), (STRIP, 3)),
        ((97, 61), (97, 30)),
        ((97, 61), (50, 61)),
        ((97, 61), (97, 61)),
    ],
)
def test_edges_of_one_pixel_strips_and_extremes_are_pillows(
    source_size: tuple[int, int], size: tuple[int, int], interpolation: Interpolation, content: str
) -> None:
    whole = replace(
        CASE,
        source_size=source_size,
        box=(0, 0, *source_size),
        size=size,
        corner=(0, 0),
        window=size,
        interpolation=interpolation,
        content=content,
    )
    check(_resize, whole)


@needs_code
@pytest.mark.parametrize("interpolation", get_args(Interpolation))
def test_the_end_of_a_row_too_long_for_single_precision_is_not_passed(
    interpolation: Interpolation,
) -> None:
    """In which 2^24 + 3 is 2^24 + 4: the last output lies beyond the last input, and is black."""
    length = 2**24 + 3
    source_HWC = np.full((1, length, 3), 9, np.uint8)
    for instructions in NATIVE:
        out_HWC = np.zeros((1, 8, 3), np.uint8)
        _resize.resize_into(
            *(out_HWC, source_HWC, (0, 0, length, 1), (length + 1, 1), (length - 7, 0)),
            *(interpolation, True, instructions),
        )
        assert (out_HWC[0, :6] == 9).all()
        assert out_HWC.max() <= 10


@needs_code
@pytest.mark.parametrize("source_size", [(30, 61), (30, 60), (31, 90), (90, 181), (90, 180)])
def test_tall_images_are_resized_in_the_order_of_the_installed_pillow(
    source_size: tuple[int, int],
) -> None:
    """From more than twice as many rows as columns that go, columns are first."""
    case = replace(CASE, source_size=source_size, box=(0, 0, *source_size))
    check(_resize, replace(case, size=(30, 60), corner=(2, 1), window=(20, 50)))


@needs_code
def test_both_orders_are_known_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = replace(
        CASE,
        source_size=(40, 400),
        box=(0, 0, 40, 400),
        size=(37, 41),
        corner=(0, 0),
        window=(37, 41),
    )
    source_HWC = content_of(tall)
    found = {}
    for order in (True, False):
        monkeypatch.setattr(resize_fuzz, "goes_tall_first", lambda order=order: order)
        made = [by_code(_resize, tall, source_HWC, one).tobytes() for one in NATIVE]
        assert len(set(made)) == 1
        found[order] = made[0]
    assert found[True] != found[False]
    assert found[bool(goes_tall_first())] == by_pillow(tall, source_HWC).tobytes()


@needs_code
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (341, 230)}, "not inside"),
        ({"corner": (118, 16)}, "not inside"),
        ({"corner": (-1, 16)}, "not inside"),
        ({"box": (0.0, 0.0, 501.0, 375.0)}, "not inside"),
        ({"box": (-0.5, 0.0, 500.0, 375.0)}, "not inside"),
        ({"box": (9.0, 0.0, 9.0, 375.0)}, "empty"),
        ({"box": (float("nan"), 0.0, 500.0, 375.0)}, "not inside"),
        ({"interpolation": "box"}, "unknown"),
    ],
)
def test_what_lies_outside_is_refused(change: dict[str, object], message: str) -> None:
    source_HWC = content_of(CASE)
    with pytest.raises(ValueError, match=message):
        by_code(_resize, replace(CASE, **change), source_HWC, NATIVE[0])  # type: ignore[arg-type]


@needs_code
@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 8, 3), np.uint8)[:, ::2],
        np.zeros((4, 4, 6), np.uint8)[:, :, ::2],
    ],
)
def test_pixels_of_another_form_are_refused(source: Pixels) -> None:
    out_HWC = np.zeros((2, 2, 3), np.uint8)
    asked = ((0, 0, 4, 4), (2, 2), (0, 0), "bilinear", True)
    with pytest.raises(ValueError, match="shape"):
        _resize.resize_into(out_HWC, source, *asked, NATIVE[0])
    with pytest.raises(ValueError, match="unknown"):
        _resize.resize_into(out_HWC, np.zeros((4, 4, 3), np.uint8), *asked, "mmx")
    out_HWC.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match=r"read-?only"):
        _resize.resize_into(out_HWC, np.zeros((4, 4, 3), np.uint8), *asked, NATIVE[0])


@needs_code
def test_rows_may_lie_in_any_order() -> None:
    source_HWC = content_of(CASE)[::-1]
    expected_HWC = by_pillow(CASE, source_HWC)
    out_HWC = np.zeros_like(expected_HWC)
    asked = (CASE.box, CASE.size, CASE.corner, CASE.interpolation, True)
    for instructions in NATIVE:
        _resize.resize_into(out_HWC, source_HWC, *asked, instructions)
        np.testing.assert_array_equal(out_HWC, expected_HWC)


# ---- the seam ------------------------------------------------------------------------------------


def paths() -> tuple[tuple[str, ...], ...]:
    """What NATIVE may be: nothing, for Pillow alone, and each instruction set in turn."""
    return ((), *((one,) for one in NATIVE))


def test_photos_are_torchvisions_by_whatever_resizes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset on a few photos; test_decode.py compares more of them, by the fastest."""
    presets = torchvision_presets()
    for number, path in enumerate(sorted(data(PHOTOS).iterdir())[::4]):
        preset = presets[number % len(presets)]
        expected_HWC = torchvision_pixels(Image.open(path), preset)
        for instructions in paths():
            monkeypatch.setattr(resampler, "NATIVE", instructions)
            found_HWC, _ = decode(path.read_bytes(), preprocess=preset)
            np.testing.assert_array_equal(found_HWC, expected_HWC, f"{instructions} {path.name}")


def test_fast_gives_the_same_bytes_by_whatever_resizes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in sorted(data(PHOTOS).iterdir())[::25]:
        file = path.read_bytes()
        found = set()
        for instructions in paths():
            monkeypatch.setattr(resampler, "NATIVE", instructions)
            found.add(decode(file, mode="fast")[0].tobytes())
        assert len(found) == 1


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(333, 251), (19, 8)])
def test_every_kind_of_image_is_padded_and_grey_alike_by_whatever_resizes_it(
    format_: str, mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if (mode, format_) not in [("CMYK", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("L", "JPEG")]:
        mode = "RGB"
    file = encode(picture(*size, mode), format_)
    padded = Preprocess(40, (64, 48), "bicubic", None, None)
    for preprocess in (padded, replace(padded, channels="grey")):
        found = set()
        for instructions in paths():
            monkeypatch.setattr(resampler, "NATIVE", instructions)
            pixels_HWC, loaded = decode(file, preprocess=preprocess)
            assert loaded.failure is None
            found.add(pixels_HWC.tobytes())
        assert len(found) == 1


def test_a_large_image_of_pillows_stays_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied out it would take as much again."""
    own, copied = resize.as_pixels, []

    def as_pixels(rgb: Image.Image) -> Pixels:
        copied.append(rgb)
        return own(rgb)

    monkeypatch.setattr(resize, "as_pixels", as_pixels)
    for size in ((2048, 2047), (2048, 2048)):
        assert decode(encode(Image.new("RGB", size), "PNG"))[1].failure is None
    assert [image.size for image in copied] == [(2048, 2047) if NATIVE else (224, 224), (224, 224)]


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
def test_what_is_too_large_whole_is_resized_alike_by_whatever_does_it(
    interpolation: Interpolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels_HWC = np.asarray(picture(2501, 3))
    size = resized_size(2501, 3, 240)
    assert resize.is_too_large(pixels_HWC, size)
    part = Part((0, 0, 2501, 3), size, crop_window(size, (224, 224)))
    found = set()
    for instructions in paths():
        monkeypatch.setattr(resampler, "NATIVE", instructions)
        out_HWC = np.zeros((224, 224, 3), np.uint8)
        resize_into(out_HWC, pixels_HWC, part, interpolation)
        found.add(out_HWC.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("orientation", range(10))
def test_an_array_is_turned_upright_as_an_image_of_pillow_is(orientation: int) -> None:
    image = picture(61, 40)
    of_image = Picture(image, 61, 40, 1).upright(orientation)
    of_array = Picture(np.asarray(image), 61, 40, 1).upright(orientation)
    assert of_image[1:] == of_array[1:]
    np.testing.assert_array_equal(resize.as_pixels(of_image.rgb), resize.as_pixels(of_array.rgb))
    window = Window(3, 4, 20, 10, 0, 0)
    assert of_image.part(window, (30, 20)) == of_array.part(window, (30, 20))


# ---- whether the installed Pillow is Pillow ------------------------------------------------------


def test_the_installed_pillow_is_one_and_its_order_is_known() -> None:
    tall = replace(CASE, source_size=(9, 90), box=(0, 0, 9, 90), size=(8, 9))
    assert goes_tall_first() is not None
    assert by_pillow(replace(tall, corner=(0, 0), window=(8, 9)), content_of(tall)).any()
    require_pillow("exact")


def test_another_package_in_pillows_place_is_refused_for_exact_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As pillow-simd 12.1.1 does: its weights have 16 bits, and some pixels differ by one."""
    own = Image.Image.resize

    def resized(image: Image.Image, *arguments: object) -> Image.Image:
        pixels_HWC = np.asarray(own(image, *arguments)).copy()  # type: ignore[arg-type]
        pixels_HWC[20, 20, 1] += 1
        return Image.fromarray(pixels_HWC)

    monkeypatch.setattr(Image.Image, "resize", resized)
    goes_tall_first.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"pillow-simd.*pip install.*decode: fast"):
            require_pillow("exact")
        require_pillow("fast")
    finally:
        goes_tall_first.cache_clear()


# ---- the C code itself ---------------------------------------------------------------------------


@needs_gcc
def test_the_code_makes_no_error_of_memory_and_nothing_undefined() -> None:
    assert resize_fuzz.run_sanitized(["--count", "200", "--seed", "3"]) == 0


@needs_gcc
def test_it_is_compiled_where_a_compiler_is() -> None:
    if sys.modules.get("batchclf.images._resize", ...) is None:
        pytest.skip("hidden, so that Pillow is tested")
    assert NATIVE, "pip install -e . compiles it"
    assert NATIVE[-1] == "plain"


@needs_code
def test_other_threads_run_while_it_resizes() -> None:
    """Were the interpreter held, a second thread could count only between two calls."""
    program = (
        "import sys, threading, numpy as np\n"
        "from batchclf.images import _resize\n"
        "sys.setswitchinterval(60)\n"
        "source = np.zeros((4000, 4000, 3), np.uint8)\n"
        "out = np.zeros((2000, 2000, 3), np.uint8)\n"
        "counted, done = [0], threading.Event()\n"
        "def count():\n"
        "    while not done.is_set(): counted[0] += 1; done.wait(1e-4)\n"
        "thread = threading.Thread(target=count); thread.start()\n"
        "before = counted[0]\n"
        "_resize.resize_into(out, source, (0, 0, 4000, 4000), (2000, 2000), (0, 0), 'lanczos', "
        "True, 'plain')\n"
        "after = counted[0]; done.set(); thread.join(); print(after - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 3
