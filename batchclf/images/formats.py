"""Image formats by content and by name: which are decoded, which are only recognised.

Also what a container says of itself: how long it is, which pixels a TIFF or a JPEG holds.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np

from batchclf.system.paths import GIT_LFS_POINTER

DECODED: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
"""Pillow's names of the formats that are decoded; every other is refused without touching it."""

SUFFIXES: Final[dict[bytes, str]] = {
    **dict.fromkeys((b".jpg", b".jpeg", b".jpe", b".jfif", b".mpo"), "JPEG"),
    **dict.fromkeys((b".png", b".apng"), "PNG"),
    b".webp": "WEBP",
    b".bmp": "BMP",
    b".dib": "DIB",
    b".gif": "GIF",
    **dict.fromkeys((b".tif", b".tiff"), "TIFF"),
    **dict.fromkeys((b".avif", b".avifs"), "AVIF"),
    **dict.fromkeys((b".heic", b".heif"), "HEIC"),
    **dict.fromkeys((b".jp2", b".j2k", b".jpx", b".jpf"), "JPEG 2000"),
    b".jxl": "JPEG XL",
    b".svg": "SVG",
    **dict.fromkeys((b".eps", b".ps"), "PostScript"),
    b".psd": "Photoshop",
    **dict.fromkeys((b".ico", b".cur"), "icon"),
    b".icns": "icon",
    b".tga": "Targa",
    b".dds": "DDS",
    **dict.fromkeys((b".pbm", b".pgm", b".ppm", b".pnm"), "Netpbm"),
    **dict.fromkeys((b".cr2", b".nef", b".arw", b".dng"), "camera raw"),
    **dict.fromkeys((b".wmf", b".emf"), "Windows metafile"),
    b".qoi": "QOI",
    b".exr": "OpenEXR",
    b".fits": "FITS",
}
"""Format that a file's suffix promises."""

_MAGIC: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\x01\0", "icon"),
    (0, b"\0\0\x02\0", "icon or Targa"),
    (0, b"icns", "icon"),
    (0, b"DDS ", "DDS"),
    (0, b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (40, b" EMF", "Windows metafile"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"BLP", "BLP"),
    (0, b"#define ", "XBM"),
    (0, b"/* XPM */", "XPM"),
    *((0, b"P%d" % kind + space, "Netpbm") for kind in range(1, 8) for space in (b"\n", b" ")),
)

_DAMAGED_HINTS: Final[tuple[tuple[bytes, str], ...]] = (
    (GIT_LFS_POINTER, "a Git LFS pointer; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, perhaps a saved error or login page"),
    (b"<html", "an HTML page, perhaps a saved error or login page"),
    (b"bplist00", "a property list, perhaps an iCloud placeholder"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "JSON text"),
    (b"\x89HDF", "an HDF5 file"),
)

ADVICE: Final[dict[str, str]] = {
    "HEIC": "convert it with pillow-heif or heif-convert",
    "JPEG XL": "convert it with djxl",
    "camera raw": "convert it with dcraw or rawpy",
}


def suffix_format(path: bytes) -> str | None:
    """The format that the name's suffix promises, if it promises any."""
    _, dot, suffix = path.rpartition(b"/")[2].rpartition(b".")
    return SUFFIXES.get(dot + suffix.lower())


def content_format(data: bytes) -> str | None:
    """The format that the first bytes say, among those decoded and those only recognised."""
    for offset, magic, name in _MAGIC:
        if data.startswith(magic, offset):
            return name
    if _is_svg(data):
        return "SVG"
    return None


def looks_like_image(head: bytes) -> bool:
    """Whether a file's first bytes are those of some image format."""
    return content_format(head) is not None


def describe_stranger(data: bytes) -> str:
    """What a file that is no image seems to be, with its first bytes in hexadecimal."""
    lowered = data[:64].lstrip().lower()
    hint = next((text for magic, text in _DAMAGED_HINTS if lowered.startswith(magic.lower())), "")
    return f"starts with {data[:8].hex(' ')}" + (f": {hint}" if hint else "")


def _is_svg(data: bytes) -> bool:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(b"<svg") or (
        head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in head
    )


# ---- what containers say of themselves -----------------------------------------------------------

_MAX_PARTS: Final = 16_384
"""Boxes, chunks or entries looked at: a hostile file may hold millions, and each takes time."""
_TIFF_PIXELS: Final = {273: 279, 324: 325}
"""TIFF 6.0 tags that say where strips and tiles lie: offsets, and their byte counts."""
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258
_TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 262, 339
_TIFF_TYPES: Final = {
    **dict.fromkeys((1, 2, 6, 7), "u1"),
    **dict.fromkeys((3, 8), "u2"),
    **dict.fromkeys((4, 9, 11, 13), "u4"),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), "u8"),
}
"""Unsigned integers as wide as one value of each TIFF 6.0 and BigTIFF type."""
_TIFF_KINDS: Final = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
"""TIFF 6.0, section 19: SampleFormat."""
_TIFF_COLOURS: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
"""TIFF 6.0: PhotometricInterpretation, where Pillow knows the colours (8 is CIELAB)."""


def promised_bytes(data: bytes, format_: str | None) -> int:
    """How long the container says the file is; 0 where it does not say."""
    if format_ == "WEBP" and len(data) >= 8:
        return int.from_bytes(data[4:8], "little") + 8
    if format_ == "BMP" and len(data) >= 6:
        return int.from_bytes(data[2:6], "little")
    if format_ == "AVIF":
        return _boxes_end(data)
    if format_ == "PNG":
        return _chunks_end(data)
    if format_ == "TIFF":
        return _tiff_directory(data).end
    return 0


def describe_odd_tiff(data: bytes) -> str | None:
    """The pixels of a TIFF in words; None where its directory names none, or ordinary ones."""
    values = _tiff_directory(data).values
    photometric = _first(values, _TIFF_PHOTOMETRIC, -1)
    if not _first(values, _TIFF_WIDTH, 0) or not _first(values, _TIFF_HEIGHT, 0) or photometric < 0:
        return None
    bits = values.get(_TIFF_BITS, np.ones(1, np.uint8))
    sample_format = _first(values, _TIFF_SAMPLE_FORMAT, 1)
    colour = _TIFF_COLOURS.get(photometric)
    if colour and max(bits, default=0) <= 8 and len(bits) <= 4 and sample_format == 1:
        return None
    kind = _TIFF_KINDS.get(sample_format, "unknown")
    widths = "+".join(map(str, bits[:8]))
    return f"{colour or f'colour space {photometric}'} of {widths} bits ({kind})"


def _boxes_end(data: bytes) -> int:
    """Where the last top-level ISO base media box says it ends (ISO/IEC 14496-12, 4.2)."""
    end = 0
    for _ in range(_MAX_PARTS):
        if end + 8 > len(data):
            break
        size = int.from_bytes(data[end : end + 4], "big")
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        if size < 8:  # 0: to the end of the file; else damaged
            return len(data)
        end += size
    return end


def _chunks_end(data: bytes) -> int:
    """Where the last PNG chunk says it ends (ISO/IEC 15948, 5.3): length, type, data, CRC."""
    end = 8
    for _ in range(_MAX_PARTS):
        if end + 8 > len(data):
            break
        end += 12 + int.from_bytes(data[end : end + 4], "big")
    return end


_Values = Mapping[int, np.ndarray]


class _TiffDirectory(NamedTuple):
    end: int
    """Where the directory, its values and its pixels end."""
    values: _Values
    """By tag, as unsigned integers; empty where the file ends before the directory does."""


def _tiff_directory(data: bytes) -> _TiffDirectory:
    """A TIFF's first directory (TIFF 6.0, section 2).

    Many writers put it behind the pixels, where a cut takes it away.
    """
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    is_big = 43 in data[2:4]  # BigTIFF
    at, wide, count_bytes, entry_bytes = (8, 8, 8, 20) if is_big else (4, 4, 2, 12)
    start = int.from_bytes(data[at : at + wide], order)
    first = start + count_bytes
    num_entries = int.from_bytes(data[start:first], order)
    last = first + num_entries * entry_bytes
    if last + wide > len(data):
        return _TiffDirectory(last + wide, {})
    end = last
    values: dict[int, np.ndarray] = {}
    for entry in range(first, min(last, first + _MAX_PARTS * entry_bytes), entry_bytes):
        tag, type_ = (int.from_bytes(data[entry + i : entry + i + 2], order) for i in (0, 2))
        num_values = int.from_bytes(data[entry + 4 : entry + 4 + wide], order)
        kind = np.dtype(_TIFF_TYPES.get(type_, "V0")).newbyteorder(order)
        value = entry + 4 + wide
        if kind.itemsize * num_values > wide:
            value = int.from_bytes(data[value : value + wide], order)
            end = max(end, value + kind.itemsize * num_values)
        if kind.itemsize and tag not in values and value + kind.itemsize * num_values <= len(data):
            values[tag] = np.frombuffer(data, kind, num_values, value)
    for offsets, counts in _TIFF_PIXELS.items():
        if offsets in values and counts in values:
            num_parts = min(len(values[offsets]), len(values[counts]))
            starts, lengths = (values[tag][:num_parts].astype(float) for tag in (offsets, counts))
            end = max(end, int((starts + lengths).max(initial=0)))
    return _TiffDirectory(end, values)


def _first(values: _Values, tag: int, default: int) -> int:
    found = values.get(tag)
    return default if found is None or not len(found) else int(found[0])
