"""Files of this machine: below a folder, selected by a glob or named by a list."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchclf.errors import NoImagesError, UsageError
from batchclf.images.archives.names import archive_around
from batchclf.images.dialect import is_far
from batchclf.images.disk import (
    OPENED_BYTES,
    OUT_OF_MEMORY,
    InsistingFile,
    failure_of,
    head,
    insist,
    open_regular,
    read_file,
    read_range,
    state,
    version,
)
from batchclf.images.globs import describe_others
from batchclf.images.lists import NUM_TRIED, ListedPaths, mark_repeated
from batchclf.images.omissions import Omissions
from batchclf.images.source import Source, selector
from batchclf.images.walk import glimpse, walk
from batchclf.results.records import Failure

MAX_FILE_BYTES = 2**31
"""A larger file is no photo: reading it would only cost the memory. The default."""
MAX_SURVEYED = 100_000
"""Files that are looked at to tell what a glob does not select."""
_Found = TypeVar("_Found")


class Paths:
    """The paths of an input, relative to its root, in a fixed order; each iteration looks anew."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.left_out = Omissions()
        """Clutter, or comments and repeated lines of a list, seen by the last iteration."""

    def __iter__(self) -> Iterator[bytes]:
        self.left_out = Omissions()
        if self.source.kind == "file":
            return iter([os.fsencode(self.source.names[0])])
        return self._listed() if self.source.kind == "list" else self._walked()

    def _listed(self) -> Iterator[bytes]:
        for paths, is_repeated in mark_repeated(_lines_of(self.source, self.left_out), bytes):
            if is_repeated.any():
                self.left_out.add("repeated", paths[is_repeated.argmax()], int(is_repeated.sum()))
            yield from compress(paths, ~is_repeated)

    def _walked(self) -> Iterator[bytes]:
        return filter(selector(self.source), walk(self.source, self.left_out))


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of an input on this machine."""

    source: Source

    def paths(self) -> Paths:
        """What the input holds, as an iterable.

        Raises:
            UsageError: while it is iterated: a line of a list holds no path.
            EnvironmentFailed: while it is iterated: a list or a folder cannot be read.
        """
        return Paths(self.source)

    def glimpse(self) -> Iterator[bytes]:
        """Paths in no order and not all, the first of which comes sooner than that of `paths`."""
        return glimpse(self.source)

    def require_some(self) -> None:
        """Refuse a list of whose first files the most are missing, and a glob that selects nothing.

        Raises:
            NoImagesError: naming a file of the list and where it was looked for, or what is there
                that the glob does not select.
            UsageError: a line of the list holds no path, or more than that.
        """
        if self.source.kind == "list":
            _require_some(self.source)
        elif self.source.kind == "glob":
            _require_selected(self.source)

    def head(self, path: bytes) -> bytes:
        """The first bytes of a regular file; empty where it cannot be read."""
        return head(os.path.join(self.source.root, path))

    def open(self, path: bytes) -> BinaryIO | Failure:
        """One listed file, opened to be read and sought in; or why that cannot be.

        Raises:
            EnvironmentFailed: as `read`.
        """
        opened = self._insisting(path, open_regular)
        if isinstance(opened, Failure):
            return opened
        return io.BufferedReader(InsistingFile(opened), OPENED_BYTES)

    def read(self, path: bytes, max_bytes: int = MAX_FILE_BYTES) -> bytes | Failure:
        """The whole content of one listed file, or why it cannot be read.

        Nothing but a regular file is read.

        Raises:
            EnvironmentFailed: the whole input has gone, or no descriptor is left to open it with.
        """
        return self._insisting(path, partial(read_file, max_bytes=max_bytes))

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """So many bytes of one listed file, or why they cannot be read.

        Raises:
            EnvironmentFailed: as `read`.
        """
        return self._insisting(path, partial(read_range, start=start, length=length))

    def version(self, path: bytes) -> bytes | Failure:
        """Size and time of writing of one listed file, or why they cannot be told.

        Raises:
            EnvironmentFailed: as `read`.
        """
        return self._insisting(path, version)

    def state(self, path: bytes) -> bytes | Failure:
        """Another one whenever the file was written, replaced or renamed; or why it has none.

        Raises:
            EnvironmentFailed: as `read`.
        """
        return self._insisting(path, state)

    def _insisting(
        self, path: bytes, action: Callable[[Source, bytes], _Found]
    ) -> _Found | Failure:
        full = os.path.join(self.source.root, path)
        try:
            return insist(lambda: action(self.source, full))
        except MemoryError:
            return Failure("oom", OUT_OF_MEMORY)
        except OSError as error:
            return failure_of(self.source, error, full)


def _lines_of(source: Source, left_out: Omissions) -> ListedPaths:
    assert source.dialect is not None, "a list has one"
    return ListedPaths(Path(source.spec), source.dialect, left_out)


def _require_some(source: Source) -> None:
    lines = _lines_of(source, Omissions())
    num_tried, missing = 0, []
    for path in islice(lines, NUM_TRIED):
        num_tried += 1
        if not is_far(path) and not os.path.lexists(os.path.join(source.root, source.locate(path))):
            missing.append((lines.place, path))
    if 2 * len(missing) <= num_tried:
        return
    for place, path in missing:
        _require_one_path(source, place, path)
    for place, path in missing:
        if archive := archive_around(path):
            raise NoImagesError(
                f"{place}: found {os.fsdecode(path)}: an image inside of an archive, which a list "
                f"cannot name; give the archive as input, or in the list: {os.fsdecode(archive)}"
            )
    place, path = missing[0]
    folders = ", nor below ".join(map(os.fsdecode, source.roots))
    found = "found 0 images: " if len(missing) == num_tried else ""
    raise NoImagesError(
        f"{place}: {found}{len(missing):,} of the first {num_tried:,} files of the list are not "
        f"there, such as {os.fsdecode(path)}: it is not below {folders}; write whole paths, or "
        "run from the folder that they are relative to (is what they lie on mounted?)"
    )


def _require_one_path(source: Source, place: str, path: bytes) -> None:
    """Refuse a line of a table, with a file's path in it and something else."""
    for separator in (b"\t", b",", b";", b" "):
        parts = [*path.partition(separator)[::2], *path.rpartition(separator)[::2]]
        for part in parts if separator in path else ():
            one = part.strip(b" \t\"'")
            if one and os.path.isfile(os.path.join(source.root, source.locate(one))):
                raise UsageError(
                    f"{place}: found {path[:300]!r}, of which only {one!r} is there; a list has "
                    "nothing but one path a line; with more to say it is .jsonl: "
                    '{"path": "cats/1.jpg", "label": "cat"}'
                )


def _require_selected(source: Source) -> None:
    if next(iter(Paths(source)), None) is not None:
        return
    others = list(islice(walk(source, Omissions()), MAX_SURVEYED))
    told = describe_others(source.names, os.fsdecode(source.root), others)
    raise NoImagesError(f"input: {source.spec}: found 0 images: no file matches; {told}")
