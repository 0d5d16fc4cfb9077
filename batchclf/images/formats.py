"""Image formats by content and by name: which are decoded, which are only recognised.

Also what containers say of themselves: how long they are, how large their pictures (tiff.py has
those parts of a TIFF).
"""

import re
from collections.abc import Iterator
from typing import Final

from batchclf.images.tiff import first_directory
from batchclf.system.paths import GIT_LFS_POINTER

MAX_BRANDS_BYTES: Final = 512
"""A box of brands has a few dozen bytes; a damaged one may say anything."""
DECODED: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
"""Pillow's names of the formats that are decoded; every other is refused without touching it."""

CAMERA_SUFFIXES: Final = tuple(
    b"." + name
    for name in b"""
    3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf pef raf rw2 rwl
    sr2 srf srw x3f
    """.split()
)
"""Of the makers' raw files; many of them are TIFFs inside."""

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
    **dict.fromkeys((b".tga", b".icb", b".vda", b".vst"), "Targa"),
    b".dds": "DDS",
    **dict.fromkeys((b".pbm", b".pgm", b".ppm", b".pnm"), "Netpbm"),
    **dict.fromkeys(CAMERA_SUFFIXES, "camera raw"),
    **dict.fromkeys((b".wmf", b".emf"), "Windows metafile"),
    b".qoi": "QOI",
    b".exr": "OpenEXR",
    b".fits": "FITS",
    **dict.fromkeys((b".dcm", b".dicom"), "DICOM"),
    **dict.fromkeys((b".jxr", b".wdp", b".hdp"), "JPEG XR"),
    b".pcx": "PCX",
    b".xcf": "GIMP",
    b".djvu": "DjVu",
    b".bpg": "BPG",
}
"""Format that a file's suffix promises."""

_BARE_JXL: Final = b"\xff\x0a"
"""How a JPEG XL begins that is in no container of boxes."""
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
    (4, b"ftypcrx ", "camera raw"),  # CR3
    (0, b"IIU\0", "camera raw"),  # RW2
    *((0, order, "camera raw") for order in (b"IIRO", b"IIRS", b"MMOR")),  # ORF
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (6, b"HEAPCCDR", "camera raw"),  # CRW
    (0, b"\0MRM", "camera raw"),
    (0, b"FOVb", "camera raw"),  # X3F
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, _BARE_JXL, "JPEG XL"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\x01\0", "icon"),
    (0, b"\0\0\x02\0\x01", "icon"),
    (0, b"icns", "icon"),
    (0, b"DDS ", "DDS"),
    (0, b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (40, b" EMF", "Windows metafile"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"II\xbc", "JPEG XR"),
    (128, b"DICM", "DICOM"),
    (0, b"\x0a\x05\x01", "PCX"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"#?RADIANCE", "Radiance"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda", "SGI"),
    (0, b"BLP", "BLP"),
    (0, b"#define ", "XBM"),
    (0, b"/* XPM */", "XPM"),
    *((0, b"P%d" % kind + space, "Netpbm") for kind in range(1, 8) for space in (b"\n", b" ")),
    *((0, magic, "Netpbm") for magic in (b"PF\n", b"Pf\n")),
)

_TARGA_END: Final = b"TRUEVISION-XFILE.\0"
"""Of version 2; older files have neither a beginning nor an end that tells them."""
_TARGA_KINDS: Final = {0: (2, 3, 10, 11), 1: (1, 9)}
"""Image types that go without and with a colour map (Truevision's TGA 2.0 specification)."""

_DAMAGED_HINTS: Final[tuple[tuple[bytes, str], ...]] = (
    (GIT_LFS_POINTER, "a Git LFS pointer; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, perhaps a saved error or login page"),
    (b"<html", "an HTML page, perhaps a saved error or login page"),
    (b"bplist00", "a property list, perhaps an iCloud placeholder"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "JSON text"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\0\x05\x16\x07", "what macOS keeps beside a file on other disks (AppleDouble)"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
)

_CONVERTERS: Final[dict[str, str]] = {
    "HEIC": "heif-convert",
    "JPEG XL": "djxl",
    "JPEG 2000": "opj_decompress",
    "JPEG XR": "JxrDecApp",
    "camera raw": "darktable-cli or dcraw",
    "SVG": "rsvg-convert",
    "PostScript": "Ghostscript",
    "PDF": "pdftoppm",
    "DICOM": "dcm2pnm",
    "DjVu": "ddjvu",
}


def converter_of(format_: str) -> str:
    """A program that turns a format into one that is decoded here."""
    return _CONVERTERS.get(format_, "ImageMagick")


def suffix_format(path: bytes) -> str | None:
    """The format that the name's suffix promises, if it promises any."""
    _, dot, suffix = path.rpartition(b"/")[2].rpartition(b".")
    return SUFFIXES.get(dot + suffix.lower())


def content_format(data: bytes) -> str | None:
    """The format that the first bytes say, among those decoded and those only recognised."""
    for offset, magic, name in _MAGIC:
        if data.startswith(magic, offset):
            return "AVIF" if name == "HEIC" and _is_avif(data) else name
    if _is_svg(data):
        return "SVG"
    return "Targa" if _is_targa(data) else None


def _is_avif(data: bytes) -> bool:
    """Whether a file of another major brand says that it is compatible with AVIF's.

    ISO/IEC 14496-12, 4.3: the size and type of the box, major brand, version, compatible brands.
    """
    end = min(int.from_bytes(data[:4], "big"), MAX_BRANDS_BYTES)
    brands = {data[at : at + 4] for at in range(16, end, 4)}
    return not brands.isdisjoint((b"avif", b"avis"))


def looks_like_image(head: bytes) -> bool:
    """Whether a file's first bytes are those of some image format."""
    return content_format(head) is not None


def describe_stranger(data: bytes) -> str:
    """What a file that is no image seems to be, with its first bytes in hexadecimal."""
    lowered = data[:64].lstrip().lower()
    hint = next((text for magic, text in _DAMAGED_HINTS if lowered.startswith(magic.lower())), "")
    if data[4:8] == b"ftyp":
        hint = f"an MPEG-4 file, perhaps a video, of brand {data[8:12]!r}"
    return f"starts with {data[:8].hex(' ')}" + (f": {hint}" if hint else "")


def _is_svg(data: bytes) -> bool:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(b"<svg") or (
        head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in head
    )


def _is_targa(data: bytes) -> bool:
    if data.endswith(_TARGA_END):
        return True
    if len(data) < 18:
        return False
    has_map, kind, depth = data[1], data[2], data[16]
    is_consistent = kind in _TARGA_KINDS.get(has_map, ()) and depth in (8, 15, 16, 24, 32)
    has_size = any(data[12:14]) and any(data[14:16])
    return is_consistent and has_size and (has_map == 1 or not any(data[3:8]))


# ---- what containers say of themselves -----------------------------------------------------------

_MAX_PARTS: Final = 16_384
"""Boxes or chunks looked at: a hostile file may hold millions, and each takes time."""


def promised_bytes(data: bytes, format_: str | None) -> int:
    """How long the container says the file is; 0 where it does not say."""
    if format_ == "WEBP" and len(data) >= 8:
        return int.from_bytes(data[4:8], "little") + 8
    if format_ == "BMP" and len(data) >= 6:
        return int.from_bytes(data[2:6], "little")
    if format_ in ("AVIF", "HEIC", "JPEG XL"):
        return 0 if data.startswith(_BARE_JXL) else _boxes_end(data)
    if format_ == "PNG":
        return _chunks_end(data)
    if format_ == "TIFF":
        return first_directory(data).end
    return 0


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
    """Where the last PNG chunk says it ends."""
    end = 8
    for _, start, length in _chunks(data):
        end = start + length + 4  # CRC
    return end


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """PNG chunks (ISO/IEC 15948, 5.3): kind, where the content starts, how long it is."""
    at = 8
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            return
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def png_bits(data: bytes) -> int:
    """Bits per sample of a PNG, as its header says."""
    return data[24] if len(data) > 24 else 0


def png_significant_bits(data: bytes) -> int | None:
    """How many bits the samples had before a PNG writer scaled them up (chunk sBIT, 11.3.2.4)."""
    for kind, start, length in _chunks(data):
        if kind == b"sBIT" and length:
            return max(data[start : start + min(length, 4)], default=None)
        if kind == b"IDAT":
            return None
    return None


def avif_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the largest picture that a HEIF or AVIF file tells of (box ispe)."""
    sizes, at = [], 0
    for _ in range(_MAX_PARTS):
        at = data.find(b"ispe", at) + 8  # behind version and flags
        if at < 8 or at + 8 > len(data):
            break
        width, height = (int.from_bytes(data[at + i : at + i + 4], "big") for i in (0, 4))
        sizes.append((width * height, (width, height)))
    return max(sizes)[1] if sizes else None


_AVIF_EXIF: Final = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)
"""The entry of an EXIF block among the items of a file (ISO/IEC 14496-12, 8.11.6), up to its type:
version and flags, number, protection."""


def avif_without_exif(data: bytes) -> bytes | None:
    """The same AVIF with its EXIF as an item of no known type; None: it is none, or has no EXIF."""
    if content_format(data) != "AVIF":
        return None
    bare, count = _AVIF_EXIF.subn(rb"\1none", data)
    return bare if count else None


_JXL_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_JXL_LENGTHS: Final = (9, 13, 18, 30)


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG XL (ISO/IEC 18181-1, SizeHeader); None: no codestream is found."""
    at = 0 if data.startswith(_BARE_JXL) else data.find(_BARE_JXL, 0, _MAX_PARTS)
    if at < 0:
        return None
    bits = int.from_bytes(data[at + 2 : at + 16], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    is_small = take(1)

    def length() -> int:
        return 8 * (take(5) + 1) if is_small else take(_JXL_LENGTHS[take(2)]) + 1

    height = length()
    ratio = take(3)
    if not ratio:
        return length(), height
    numerator, denominator = _JXL_RATIOS[ratio - 1]
    return height * numerator // denominator, height
