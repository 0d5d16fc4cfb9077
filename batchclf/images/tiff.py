"""What a TIFF says of itself: where it ends, which pixels it holds, whether it is camera raw.

Tags and layout: TIFF 6.0; BigTIFF (libtiff's specification); TIFF/EP and DNG 1.7 for raw files.
"""

import ctypes
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

_MAX_ENTRIES: Final = 16_384
"""Entries looked at: a hostile file may hold millions, and each takes time."""
_MAX_SUB_DIRECTORIES: Final = 16
_PIXELS: Final = {273: 279, 324: 325}
"""Tags that say where strips and tiles lie: offsets, and their byte counts."""
_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_MAKE, _STRIPS, _PLANAR, _TILE_WIDTH, _TILES, _SUB_DIRECTORIES = 271, 273, 284, 322, 324, 330
_SAMPLE_FORMAT, _DNG_VERSION = 339, 50706
_TYPES: Final = {
    **dict.fromkeys((1, 2, 6, 7), "u1"),
    **dict.fromkeys((3, 8), "u2"),
    **dict.fromkeys((4, 9, 11, 13), "u4"),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), "u8"),
}
"""Unsigned integers as wide as one value of each TIFF 6.0 and BigTIFF type."""
_KINDS: Final = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
"""TIFF 6.0, section 19: SampleFormat."""
_COLOURS: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
"""PhotometricInterpretation, where Pillow knows the colours (8 is CIELAB)."""
_SHALLOW: Final = ("grey", "palette")
"""Colours that Pillow reads in fewer than 8 bits too."""
_OF_A_SENSOR: Final = (32803, 34892)
"""PhotometricInterpretation: a colour filter array, or what was made of one (DNG, LinearRaw)."""
_UNCOMPRESSED, _YCBCR, _IN_PLANES, _REDUCED = 1, 6, 2, 1
_ALWAYS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946)
"""Compressions that every libtiff under Pillow has."""
_SOMETIMES: Final = {34925: "LZMA", 50000: "Zstandard", 50001: "WebP"}
"""Compressions that Pillow reads where its libtiff was built with them."""
_NAMES: Final = _SOMETIMES | {
    **dict.fromkeys((33003, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((34661, 34715), "JBIG"),
    34887: "LERC",
    34892: "lossy JPEG (DNG)",
    50002: "JPEG XL",
    52546: "JPEG XL",
    32908: "PixarFilm",
    32909: "PixarLog",
    32766: "NeXT",
}

_Values = Mapping[int, np.ndarray]


class Directory(NamedTuple):
    """One of a file's directories."""

    end: int
    """Where the directory, its values and its pixels end."""
    values: _Values
    """By tag, as unsigned integers; empty where the file ends before the directory does."""

    def first(self, tag: int, default: int) -> int:
        """A tag's first value."""
        found = self.values.get(tag)
        return default if found is None or not len(found) else int(found[0])


def first_directory(data: bytes) -> Directory:
    """The one that the header names. Many writers put it behind the pixels: a cut takes it away."""
    return _directory(data, None)


def is_camera_raw(data: bytes, named_raw: bool) -> bool:
    """Whether the sensor's values are in it: Pillow would show the preview in its first directory.

    `named_raw`: the file has a camera's suffix; some makers give no other sign.
    """
    main = first_directory(data)
    if _DNG_VERSION in main.values or data[8:10] == b"CR":  # Canon's CR2
        return True
    directories = [main, *_sub_directories(data, main)]
    if any(one.first(_PHOTOMETRIC, 0) in _OF_A_SENSOR for one in directories):
        return True
    is_preview = len(directories) > 1 and bool(main.first(_SUBFILE_TYPE, 0) & _REDUCED)
    return _MAKE in main.values and (named_raw or is_preview)


def is_tiled_in_strips(data: bytes) -> bool:
    """Whether uncompressed tiles lie where strips should: Pillow takes them for strips.

    That is either an error or, where there are enough bytes, a wrong picture.
    """
    main = first_directory(data)
    return (
        _TILE_WIDTH in main.values
        and _STRIPS in main.values
        and _TILES not in main.values
        and main.first(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED
    )


def unread_form(data: bytes) -> str | None:
    """What about a file is beyond Pillow, in words; to be asked when Pillow has failed.

    None: nothing is, so the file is damaged, or its pixels are odd (`odd_pixels`).
    """
    if data.startswith(b"MM\0+"):
        return "a big-endian BigTIFF"
    main = first_directory(data)
    compression = main.first(_COMPRESSION, _UNCOMPRESSED)
    if compression not in _ALWAYS and not _is_built_in(compression):
        name = _NAMES.get(compression, f"number {compression}")
        return f"TIFF with {name} compression"
    is_planar = main.first(_PLANAR, 1) == _IN_PLANES
    if is_planar and main.first(_PHOTOMETRIC, -1) == _YCBCR:
        return "TIFF with planes of YCbCr"
    return None


def odd_pixels(data: bytes) -> str | None:
    """The pixels in words; None where the directory names none, or ordinary ones."""
    main = first_directory(data)
    photometric = main.first(_PHOTOMETRIC, -1)
    if not main.first(_WIDTH, 0) or not main.first(_HEIGHT, 0) or photometric < 0:
        return None
    bits = main.values.get(_BITS, np.ones(1, np.uint8))
    sample_format = main.first(_SAMPLE_FORMAT, 1)
    colour = _COLOURS.get(photometric)
    is_shallow = max(bits, default=0) <= 8 and (colour in _SHALLOW or min(bits, default=8) == 8)
    if colour and is_shallow and len(bits) <= 4 and sample_format == 1:
        return None
    kind = _KINDS.get(sample_format, "unknown")
    widths = "+".join(map(str, bits[:8]))
    return f"{colour or f'colour space {photometric}'} of {widths} bits ({kind})"


# ---- libtiff -------------------------------------------------------------------------------------


@lru_cache(1)
def _libtiff() -> tuple[ctypes.CDLL, ...]:
    """The library among those that Pillow has loaded, which offers no way to it."""
    try:
        loaded = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    # address, permissions, offset, device, inode, path
    paths = {line.split(maxsplit=5)[5] for line in loaded if "/libtiff" in line}
    return tuple(map(ctypes.CDLL, sorted(paths)))


def silence_libtiff() -> None:
    """Keep libtiff from printing to stderr; its errors reach us as exceptions all the same."""
    for library in _libtiff():
        for handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


def _is_built_in(compression: int) -> bool:
    """Whether Pillow and its libtiff know a compression that not all of them do."""
    if compression not in _SOMETIMES:
        return False
    number = ctypes.c_uint16(compression)
    return all(library.TIFFIsCODECConfigured(number) for library in _libtiff())


# ---- directories ---------------------------------------------------------------------------------


def _directory(data: bytes, start: int | None) -> Directory:
    """The directory at `start`, or the first one (TIFF 6.0, section 2)."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    is_big = 43 in data[2:4]  # BigTIFF
    at, wide, count_bytes, entry_bytes = (8, 8, 8, 20) if is_big else (4, 4, 2, 12)
    if start is None:
        start = int.from_bytes(data[at : at + wide], order)
    first = start + count_bytes
    num_entries = int.from_bytes(data[start:first], order)
    last = first + num_entries * entry_bytes
    if last + wide > len(data):
        return Directory(last + wide, {})
    end = last
    values: dict[int, np.ndarray] = {}
    for entry in range(first, min(last, first + _MAX_ENTRIES * entry_bytes), entry_bytes):
        tag, type_ = (int.from_bytes(data[entry + i : entry + i + 2], order) for i in (0, 2))
        num_values = int.from_bytes(data[entry + 4 : entry + 4 + wide], order)
        kind = np.dtype(_TYPES.get(type_, "V0")).newbyteorder(order)
        value = entry + 4 + wide
        if kind.itemsize * num_values > wide:
            value = int.from_bytes(data[value : value + wide], order)
            end = max(end, value + kind.itemsize * num_values)
        if kind.itemsize and tag not in values and value + kind.itemsize * num_values <= len(data):
            values[tag] = np.frombuffer(data, kind, num_values, value)
    return Directory(max(end, _pixels_end(values)), values)


def _pixels_end(values: _Values) -> int:
    end = 0
    for offsets, counts in _PIXELS.items():
        if offsets in values and counts in values:
            num_parts = min(len(values[offsets]), len(values[counts]))
            starts, lengths = (values[tag][:num_parts].astype(float) for tag in (offsets, counts))
            end = max(end, int((starts + lengths).max(initial=0)))
    return end


def _sub_directories(data: bytes, main: Directory) -> Iterator[Directory]:
    for start in main.values.get(_SUB_DIRECTORIES, ())[:_MAX_SUB_DIRECTORIES]:
        yield _directory(data, int(start))
