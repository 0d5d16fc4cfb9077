"""A decoded image, perhaps reduced: turned upright, and which part of it becomes the crop."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from batchclf.images.resample import Window
from batchclf.images.resize import Part, Rgb, size_of
from batchclf.results.records import Pixels

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of each EXIF orientation (EXIF 2.32, tag 274) upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""
_FROM_RIGHT, _FROM_BELOW = (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations whose first pixels in the file are shown at the right, or below."""


class Picture(NamedTuple):
    """An image of `width` x `height` pixels before libjpeg reduced it.

    Reduced, it is rounded up to whole pixels: the true edge lies within the last column and row,
    or, turned upright, the first. A part taken from edge to edge instead would be shifted visibly.
    """

    rgb: Rgb
    width: int
    height: int
    reduction: int
    from_right: bool = False
    from_below: bool = False

    def upright(self, orientation: int | None) -> "Picture":
        """As it should be seen, by its EXIF orientation."""
        if orientation is None or orientation not in _UPRIGHT:
            return self
        if isinstance(self.rgb, Image.Image):
            rgb: Rgb = self.rgb.transpose(_UPRIGHT[orientation])
        else:
            rgb = _turned(self.rgb, orientation)
        width, height = self.width, self.height
        if orientation in _SIDEWAYS:
            width, height = height, width
        from_right, from_below = orientation in _FROM_RIGHT, orientation in _FROM_BELOW
        return Picture(rgb, width, height, self.reduction, from_right, from_below)

    def part(self, window: Window, size: tuple[int, int]) -> Part:
        """What becomes a window of the resized image, as a part of its own."""
        left, top, right, bottom = window.box
        rgb_w, rgb_h = size_of(self.rgb)
        true_w, true_h = self.width / self.reduction, self.height / self.reduction
        scale_w, scale_h = true_w / size[0], true_h / size[1]
        first_w = rgb_w - true_w if self.from_right else 0.0
        first_h = rgb_h - true_h if self.from_below else 0.0
        box = (
            first_w + left * scale_w,
            first_h + top * scale_h,
            min(first_w + right * scale_w, rgb_w),
            min(first_h + bottom * scale_h, rgb_h),
        )
        whole = Window(0, 0, window.width, window.height, 0, 0)
        return Part(box, (window.width, window.height), whole)


def _turned(pixels_HWC: Pixels, orientation: int) -> Pixels:
    """As Pillow's `transpose` turns an image."""
    pixels_HW = pixels_HWC.view("V3")[:, :, 0]  # whole pixels are moved
    if orientation in _SIDEWAYS:
        pixels_HW = pixels_HW.T
    if orientation in _FROM_RIGHT:
        pixels_HW = pixels_HW[:, ::-1]
    if orientation in _FROM_BELOW:
        pixels_HW = pixels_HW[::-1]
    return np.ascontiguousarray(pixels_HW).view(np.uint8).reshape(*pixels_HW.shape, 3)
