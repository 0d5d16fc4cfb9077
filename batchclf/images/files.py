"""Files, here (local.py) or on another machine (remote.py): listed, opened, read in ranges."""

from collections.abc import Iterator
from typing import Protocol

from batchclf.images.archives.members import Ranges
from batchclf.images.omissions import Omissions
from batchclf.results.records import Failure


class Paths(Protocol):
    """Paths in a fixed order; each iteration looks anew."""

    @property
    def left_out(self) -> Omissions:
        """Clutter or repeated ones, seen by the last iteration."""

    def __iter__(self) -> Iterator[bytes]: ...


class Files(Ranges, Protocol):
    """The files of one source."""

    def paths(self) -> Paths:
        """What the source holds, relative to its root."""

    def glimpse(self) -> Iterator[bytes]:
        """Paths in no order and not all, the first of which comes sooner than that of `paths`."""

    def require_some(self) -> None:
        """Refuse a source of whose first files too many are missing."""

    def head(self, path: bytes) -> bytes:
        """The first bytes of a file; empty where it cannot be read."""

    def read(self, path: bytes, max_bytes: int) -> bytes | Failure:
        """The whole content of one file, or why it cannot be read."""
