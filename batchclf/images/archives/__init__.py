"""Images inside of files: tar and zip archives, listed and read without unpacking them.

One module per kind. Each lists the members of an opened file, with the location at which `read`
finds them again; a location is plain bytes, since it stands in the frozen listing.
"""

from collections.abc import Iterator
from typing import BinaryIO, Final, Protocol

from batchclf.images.archives import tar
from batchclf.results.records import Entry, Failure

SUFFIXES: Final[dict[bytes, str]] = {
    b".tar": "tar",
}
"""Kind of archive that a name's suffix promises."""


class Ranges(Protocol):
    """Files of which parts can be read."""

    def open(self, path: bytes) -> BinaryIO | Failure:
        """A file, opened to be read and sought in; or why that cannot be."""

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """So many bytes of a file, or why they cannot be read."""


def archive_kind(path: bytes) -> str | None:
    """The kind of archive that a name promises, if it promises any."""
    lowered = path.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if lowered.endswith(suffix)), None)


def is_archive(path: bytes) -> bool:
    """Whether a name promises an archive."""
    return archive_kind(path) is not None


def list_members(files: Ranges, path: bytes) -> Iterator[Entry]:
    """The images in an archive: `archive/name`, with where their bytes lie."""
    file = files.open(path)
    if isinstance(file, Failure):
        yield Entry(path)  # reading it records why
        return
    with file:
        for member in tar.members(file, path):
            yield Entry(member.path, b"%s:%s" % (member.location, path))


def read_member(files: Ranges, location: bytes, max_bytes: int) -> bytes | Failure:
    """The whole content of a member, or why it cannot be read."""
    start, length, path = location.split(b":", 2)
    if int(length) > max_bytes:
        return Failure(
            "too_large_bytes", f"{int(length):,} bytes; loader.max_bytes allows {max_bytes:,}"
        )
    return files.read_range(path, int(start), int(length))
