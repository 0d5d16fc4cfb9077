"""resample.py: the sizes are torchvision's, and a window is what a full Pillow resize gives."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from batchclf.images.resample import Window, crop_window, resize_window, resized_size
from batchclf.results.records import Interpolation, Pixels
from tests.images.common import picture

RESAMPLING = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}
interpolations = st.sampled_from(get_args(Interpolation))


def full_resize(
    pixels_HWC: Pixels, size: tuple[int, int], window: Window, name: Interpolation
) -> Pixels:
    resized = Image.fromarray(pixels_HWC).resize(size, RESAMPLING[name])
    return np.asarray(resized)[
        window.top : window.top + window.height, window.left : window.left + window.width
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=interpolations)
def test_an_enlarged_window_is_the_same_part_of_a_full_resize(
    data: st.DataObject, name: Interpolation
) -> None:
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    # Enlarging only: resize_window is for images that a full resize would make too large.
    size = (
        data.draw(st.integers(width + 1, width * 12 + 1)),
        data.draw(st.integers(height + 1, height * 12 + 1)),
    )
    left, top = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    window = Window(
        left,
        top,
        data.draw(st.integers(1, size[0] - left)),
        data.draw(st.integers(1, size[1] - top)),
        0,
        0,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pixels_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = resize_window(pixels_HWC, size, window, name, RESAMPLING[name])
    np.testing.assert_array_equal(found, full_resize(pixels_HWC, size, window, name))


@pytest.mark.parametrize("name", get_args(Interpolation))
@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1), (2, 1999), (2501, 3)])
def test_the_centre_of_a_long_thin_image_is_that_of_a_full_resize(
    width: int, height: int, name: Interpolation
) -> None:
    pixels_HWC = np.asarray(picture(width, height))
    size = resized_size(width, height, 24)
    window = crop_window(size, (20, 22))
    found = resize_window(pixels_HWC, size, window, name, RESAMPLING[name])
    np.testing.assert_array_equal(found, full_resize(pixels_HWC, size, window, name))


sizes = st.integers(1, 5000)


@settings(max_examples=300, deadline=None)
@given(width=sizes, height=sizes, edge=st.integers(1, 1000))
def test_the_resized_size_is_the_one_torchvision_computes(
    width: int, height: int, edge: int
) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    expected_h, expected_w = functional._compute_resized_output_size((height, width), [edge])
    assert resized_size(width, height, edge) == (expected_w, expected_h)


def test_a_size_given_as_height_and_width_is_taken_as_it_is() -> None:
    assert resized_size(640, 480, (100, 300)) == (300, 100)


def cut(source_HW: NDArray[np.int32], window: Window, crop: tuple[int, int]) -> NDArray[np.int32]:
    """The window of an image, with zeros around it where the crop is larger."""
    found_HW = np.zeros((crop[1], crop[0]), np.int32)
    found_HW[
        window.pad_top : window.pad_top + window.height,
        window.pad_left : window.pad_left + window.width,
    ] = source_HW[window.top : window.top + window.height, window.left : window.left + window.width]
    return found_HW


@settings(max_examples=200, deadline=None)
@given(
    length=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_the_crop_window_keeps_and_pads_what_torchvision_does(
    length: tuple[int, int], crop: tuple[int, int]
) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    width, height = length
    source = np.arange(1, width * height + 1, dtype=np.int32).reshape(height, width)
    expected = np.asarray(functional.center_crop(Image.fromarray(source), [crop[1], crop[0]]))
    window = crop_window(length, crop)
    np.testing.assert_array_equal(cut(source, window, crop), expected)


@settings(max_examples=200, deadline=None)
@given(
    length=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_rounded_down_the_crop_window_is_transformers(
    length: tuple[int, int], crop: tuple[int, int]
) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    width, height = length
    source = np.arange(1, width * height + 1, dtype=np.int32).reshape(height, width)
    expected = transforms.center_crop(source[None], (crop[1], crop[0]), "channels_first")[0]
    window = crop_window(length, crop, "down")
    np.testing.assert_array_equal(cut(source, window, crop), expected)
