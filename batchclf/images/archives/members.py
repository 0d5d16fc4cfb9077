"""What a look into an archive finds, one after the other, whatever kind of archive it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple, Protocol

from batchclf.images.archives.location import failed
from batchclf.images.room import Claim, unclaimed
from batchclf.results.records import Failure

Log = Callable[[str], None]


class Ranges(Protocol):
    """Files of which parts can be read; hashable."""

    def open(self, path: bytes) -> BinaryIO | Failure:
        """A file, opened to be read and sought in; or why that cannot be."""

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """So many bytes of a file, or why they cannot be read."""

    def version(self, path: bytes) -> bytes | Failure:
        """Another one where the file is another; or why that cannot be told."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which columns of Parquet files hold the images, and the paths of their records."""

    column: str | None = None
    """None: the only one that holds images."""
    id: str | None = None
    """None: the image's own path, or else the file and the row."""


class Member(NamedTuple):
    """A file in an archive."""

    name: bytes
    """As the archive has it."""
    place: int
    """Where its bytes begin: members are listed in the order of their bytes."""
    fields: bytes
    """Of its location."""
    size: int
    content: Callable[[], bytes | Failure]
    """Reads it, while it is the last that was found."""


class Link(NamedTuple):
    """Another name of a file in the same archive."""

    name: bytes
    place: int
    target: bytes


class LeftOut(NamedTuple):
    """What is neither a file nor a folder."""

    name: bytes


class Damage(NamedTuple):
    """What keeps others from being found."""

    failure: Failure


Found = Member | Link | LeftOut | Damage


def unreadable(name: bytes, place: int, failure: Failure) -> Member:
    """A member of which is known already why it cannot be read."""
    return Member(name, place, failed(failure), 0, lambda: failure)


def damage(what: str) -> Damage:
    """Damage to an archive."""
    return Damage(Failure("damaged_archive", what))


Pace = Literal["many", "one", "tried"]
"""How many units are read at once, where reading may end this process: `tried` is one by one too,
and as far on as `many` would have been read, since another of them may be to blame."""


class Limits(NamedTuple):
    """What a member may take."""

    max_bytes: int
    claim: Claim = unclaimed
    """Called before it is read with the bytes that this takes, however small its archive is. As it
    may wait, whoever calls it holds no lock."""
    pace: Pace = "many"


def too_large(size: int, max_bytes: int) -> Failure | None:
    """The failure of a member that is larger than the job allows."""
    if size <= max_bytes:
        return None
    return Failure("too_large_bytes", f"{size:,} bytes; loader.max_bytes allows {max_bytes:,}")
