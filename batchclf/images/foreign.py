"""HEIC, JPEG XL and camera raw, read by other packages where they are installed (extras.py).

Each reader asks before anything of the picture's size is allocated.

Array shapes: H rows and W columns of a sensor.
"""

import io
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batchclf.images.extras import EXTRAS
from batchclf.images.failures import (
    OUT_OF_MEMORY,
    BadImage,
    not_that_image,
    truncated,
    unsupported,
)
from batchclf.images.formats import jxl_size, promised_bytes

Ask = Callable[[int, int, int], None]
"""Called with width, height and bytes per pixel before they are allocated; raises BadImage."""
Reader = Callable[[bytes, Ask], Image.Image]

_LAST_ROWS: Final = 16
"""This part of a raw picture is looked at to see whether it is there."""
_LEAST_SET: Final = 0.01
_HEIF_BYTES, _JXL_BYTES, _RAW_BYTES = 12, 16, 20
"""Peak memory per pixel, measured with pillow-heif 1.8, pillow-jxl-plugin 1.3 and rawpy 0.28."""


def read_foreign(found: str, data: bytes, ask: Ask) -> Image.Image:
    """The image of a file in one of `EXTRAS`, in a mode of Pillow's.

    Raises:
        BadImage: the package is not installed, or does not read the file.
    """
    try:
        reader = _READERS[found]()
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise unsupported(f"{found}{why}", found) from error
    image = reader(data, ask)
    image.format = found
    return image


# ---- the packages --------------------------------------------------------------------------------


@lru_cache(1)
def _heif_reader() -> Reader:
    from pillow_heif import HeifImageFile

    def read(data: bytes, ask: Ask) -> Image.Image:
        try:
            image: Image.Image = HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]
        except SyntaxError:
            raise _unopened("HEIC", data) from None
        ask(*image.size, _HEIF_BYTES)
        image.load()
        return image

    return read


@lru_cache(1)
def _jxl_reader() -> Reader:
    from pillow_jxl import JpegXLImagePlugin

    JpegXLImagePlugin.DECODE_THREADS = 0  # as many images as there are workers are at it already

    def read(data: bytes, ask: Ask) -> Image.Image:
        size = jxl_size(data)
        if size is None:
            raise _unopened("JPEG XL", data)
        ask(*size, _JXL_BYTES)
        try:
            image: Image.Image = JpegXLImagePlugin.JXLImageFile(io.BytesIO(data))  # decodes it, too
            image.load()
        except MemoryError:
            raise
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # of Rust: not even an Exception
                raise BadImage("corrupt", f"its decoder gave up: {error}") from error
            if isinstance(error, RuntimeError):  # says that the decoder was built without messages
                raise _damaged_jxl(data) from error
            raise
        return image

    return read


@lru_cache(1)
def _raw_reader() -> Reader:
    import rawpy

    def read(data: bytes, ask: Ask) -> Image.Image:
        try:
            with rawpy.imread(io.BytesIO(data)) as raw:
                ask(raw.sizes.width, raw.sizes.height, _RAW_BYTES)
                if _is_cut(raw.raw_image):
                    raise truncated(data, 0)
                return Image.fromarray(raw.postprocess(use_camera_wb=True, output_bps=8))
        except rawpy.LibRawUnsufficientMemoryError:
            raise BadImage("oom", OUT_OF_MEMORY) from None
        except (rawpy.LibRawFileUnsupportedError, rawpy.NotSupportedError) as error:
            raise unsupported(f"camera raw that rawpy does not read: {_text(error)}", "") from error
        except rawpy.LibRawIOError:  # it wants more than there is
            raise truncated(data, 0) from None
        except rawpy.LibRawError as error:
            raise BadImage("corrupt", f"{type(error).__name__}: {_text(error)}") from error

    return read


def _is_cut(values_HW: NDArray[np.uint16] | None) -> bool:
    """Whether hardly a value of the last rows is set: LibRaw leaves at 0 what a file lacks.

    A sensor's noise is seen in the dark as well. None: it has no rows of single values.
    """
    if values_HW is None:
        return False
    last = values_HW[-(len(values_HW) // _LAST_ROWS + 1) :]
    return bool(np.count_nonzero(last) < last.size * _LEAST_SET)


def _text(error: Exception) -> str:
    """What LibRaw says, which rawpy hands on as bytes."""
    said = error.args[0] if error.args else ""
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


_READERS: Final[Mapping[str, Callable[[], Reader]]] = {
    "HEIC": _heif_reader,
    "JPEG XL": _jxl_reader,
    "camera raw": _raw_reader,
}
assert set(_READERS) == set(EXTRAS)


def _unopened(found: str, data: bytes) -> BadImage:
    total = promised_bytes(data, found)
    return truncated(data, total) if total > len(data) else not_that_image(data, found)


def _damaged_jxl(data: bytes) -> BadImage:
    total = promised_bytes(data, "JPEG XL")
    bad = BadImage("corrupt", "its decoder does not read it, and says no more")
    return truncated(data, total) if total > len(data) else bad
