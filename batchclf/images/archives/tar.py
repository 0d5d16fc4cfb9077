"""Tar archives: members by their offset in the file."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from batchclf.results.records import Entry


def members(file: BinaryIO, path: bytes) -> Iterator[Entry]:
    """The regular files in a tar archive, in its order; locations are `offset:length`."""
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep each
            if member.isreg():
                name = member.name.removeprefix("./").encode(errors="surrogateescape")
                yield Entry(path + b"/" + name, b"%d:%d" % (member.offset_data, member.size))
