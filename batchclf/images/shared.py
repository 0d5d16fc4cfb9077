"""Memory that several processes map: a memfd, which the size of /dev/shm does not bound.

Array shapes: N rows of all batches together, H rows, W columns, C = 3 (RGB).
"""

import math
import mmap
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from batchclf.results.records import Pixels


class SharedPixels:
    """Memory for images (uint8, NHWC) that other processes can map."""

    def __init__(self, num_images: int, image_shape: tuple[int, ...]) -> None:
        self.image_shape = image_shape
        self._file = shared_memory("pixels", num_images * math.prod(image_shape))
        self.descriptor = self._file.fileno()
        try:
            self.pixels_NHWC = mapped_pixels(self.descriptor, image_shape)
        except OSError:
            self._file.close()
            raise

    def row_of(self, rows_NHWC: Pixels) -> int:
        """Which row of all a part of them begins with."""
        num_bytes = _address(rows_NHWC) - _address(self.pixels_NHWC)
        return num_bytes // math.prod(self.image_shape)

    def close(self) -> None:
        """Let no further process map it; the array lives on."""
        self._file.close()


def shared_memory(name: str, num_bytes: int) -> BinaryIO:
    """Memory to share with other processes, as a file: whoever maps it keeps it when it closes."""
    file = os.fdopen(os.memfd_create(f"batchclf-{name}", os.MFD_CLOEXEC), "r+b", buffering=0)
    try:
        file.truncate(num_bytes)
    except OSError:
        file.close()
        raise
    return file


def mapped_pixels(descriptor: int, image_shape: Sequence[int]) -> Pixels:
    """Shared memory as images."""
    memory = mmap.mmap(descriptor, 0)
    return np.frombuffer(memory, np.uint8).reshape(-1, *image_shape)


def _address(pixels: Pixels) -> int:
    return int(pixels.__array_interface__["data"][0])
