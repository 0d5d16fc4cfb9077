"""Names: which promise an archive, and what becomes of those inside of one."""

from typing import Final

from batchclf.images.clutter import clutter_kind
from batchclf.results.records import Failure

COMPRESSED_TARS: Final[dict[bytes, str]] = {
    **dict.fromkeys((b".tar.gz", b".tgz"), "gz"),
    **dict.fromkeys((b".tar.bz2", b".tbz2", b".tbz"), "bz2"),
    **dict.fromkeys((b".tar.xz", b".txz"), "xz"),
    **dict.fromkeys((b".tar.zst", b".tzst"), "zst"),
}
SUFFIXES: Final[dict[bytes, str]] = {
    b".tar": "tar",
    b".zip": "zip",
    b".parquet": "parquet",
    **COMPRESSED_TARS,
}
"""Kind of archive that a name's suffix promises."""
_LONGEST_FIRST: Final = tuple(sorted(SUFFIXES, key=len, reverse=True))


def archive_kind(path: bytes) -> str | None:
    """The kind of archive that a name promises, if it promises any."""
    lowered = path.lower()
    if not lowered.endswith(_LONGEST_FIRST):
        return None
    return SUFFIXES[next(suffix for suffix in _LONGEST_FIRST if lowered.endswith(suffix))]


def is_archive(path: bytes) -> bool:
    """Whether a name promises an archive."""
    return archive_kind(path) is not None


def archive_around(path: bytes) -> bytes | None:
    """The first folder of a path that has the name of an archive, as the paths of members do."""
    names = path.split(b"/")
    ends = (end for end in range(1, len(names)) if is_archive(names[end - 1]))
    return next((b"/".join(names[:end]) for end in ends), None)


def tidy(name: bytes) -> bytes:
    """A member's name as a path: up to the first NUL, without `.` and without doubled `/`."""
    name = name.partition(b"\0")[0]
    if name.startswith(b"./") or b"/./" in name or b"//" in name:
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        name = (b"/" if name.startswith(b"/") else b"") + b"/".join(parts)
    return name


def left_out_as(name: bytes) -> str | None:
    """The kind that a member would be left out of a folder as; None: it would be listed."""
    *folders, base = name.split(b"/")
    for folder in folders:
        if folder not in (b".", b"..") and (kind := clutter_kind(folder, is_folder=True)):
            return kind
    return clutter_kind(base, is_folder=False)


def refused_name(name: bytes) -> Failure | None:
    """Why a member is not read, as its name alone tells."""
    if name.startswith(b"/") or b".." in name.split(b"/"):
        return Failure("unsafe_member", "its name leads out of the archive")
    if is_archive(name):
        return Failure("unsupported_format", "an archive inside an archive; unpack it first")
    return None
