"""What systems leave among photos: told by name, left out of a listing and counted."""

from batchclf.images.formats import suffix_format

_WINDOWS_FILES = (b"thumbs.db", b"ehthumbs.db", b"ehthumbs_vista.db", b"desktop.ini")
_WINDOWS_FOLDERS = (b"$recycle.bin", b"system volume information")
"""In lower case: Windows does not tell cases apart."""
_FILES = (b"Icon\r",)
_FOLDERS = (
    *(b"__MACOSX", b"lost+found"),
    *(b"@eaDir", b"#recycle", b"#snapshot"),  # Synology
    *(b"@Recycle", b"@Recently-Snapshot"),  # QNAP
)


def is_clutter(name: bytes, is_folder: bool) -> bool:
    """Whether a name is of no photo: hidden, a system's own, or an AppleDouble file's (`._`).

    Hidden are names that begin with a dot, but for those of files with an image suffix.
    """
    if name.startswith(b"."):
        return is_folder or is_apple_double(name) or not suffix_format(name)
    if is_folder:
        return name in _FOLDERS or name.lower() in _WINDOWS_FOLDERS
    return name in _FILES or name.lower() in _WINDOWS_FILES


def is_apple_double(name: bytes) -> bool:
    """Whether a file's name is one that macOS gives to AppleDouble files."""
    return name.startswith(b"._")
