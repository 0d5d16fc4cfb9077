"""What systems leave among photos: told by name, left out of a listing and counted by kind."""

from typing import Final

from batchclf.images.formats import suffix_format

HIDDEN, OF_MACOS, OF_WINDOWS, OF_NAS = "hidden", "of macOS", "of Windows", "of a NAS"
_FILES: Final = {b"Icon\r": OF_MACOS, b".DS_Store": OF_MACOS}
_FOLDERS: Final = {
    b"__MACOSX": OF_MACOS,
    b"lost+found": "of the file system",
    **dict.fromkeys((b"@eaDir", b"#recycle", b"#snapshot"), OF_NAS),  # Synology
    **dict.fromkeys((b"@Recycle", b"@Recently-Snapshot"), OF_NAS),  # QNAP
}
_WINDOWS_FILES = (b"thumbs.db", b"ehthumbs.db", b"ehthumbs_vista.db", b"desktop.ini")
_WINDOWS_FOLDERS = (b"$recycle.bin", b"system volume information")
"""In lower case: Windows does not tell cases apart."""


def clutter_kind(name: bytes, is_folder: bool) -> str | None:
    """The kind of clutter that a name is of, as `Omissions` counts it; None: it may be a photo's.

    Hidden are names that begin with a dot, but for those of files with an image suffix.
    """
    known, of_windows = (_FOLDERS, _WINDOWS_FOLDERS) if is_folder else (_FILES, _WINDOWS_FILES)
    if kind := known.get(name):
        return kind
    if name.startswith(b"."):
        if is_apple_double(name) and not is_folder:
            return OF_MACOS
        return HIDDEN if is_folder or not suffix_format(name) else None
    return OF_WINDOWS if name.lower() in of_windows else None


def is_apple_double(name: bytes) -> bool:
    """Whether a file's name is one that macOS gives to AppleDouble files."""
    return name.startswith(b"._")
