"""Image formats by content and by name: which are decoded, which are only recognised."""

from typing import Final

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
    (b"version https://git-lfs.github.com", "a Git LFS pointer; run `git lfs pull`"),
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
