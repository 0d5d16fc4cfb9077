"""Where images lie: what an input holds, in a fixed order, and the content of each image.

Files, of this machine (local.py) or of a bucket (remote.py), are listed, opened and read in ranges;
a store lists their images, those inside of archives as well, and reads an image that it listed.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from batchclf.errors import NoImagesError
from batchclf.images.archives import Ranges, is_archive, list_members, read_member
from batchclf.images.formats import looks_like_image, suffix_format
from batchclf.images.lists import mark_repeated
from batchclf.images.local import MAX_FILE_BYTES, LocalFiles
from batchclf.images.remote import ListedFiles, RemoteFiles
from batchclf.images.source import AnySource, Source, Sources, source_of
from batchclf.results.records import Entry, Failure, ImageRef
from batchclf.spec.job import JobSpec


class Paths(Protocol):
    """Paths in a fixed order; each iteration looks anew."""

    @property
    def num_left_out(self) -> int:
        """Hidden or repeated ones, seen by the last iteration."""

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


class Entries(Protocol):
    """What an input holds, in a fixed order; each iteration looks anew."""

    @property
    def num_left_out(self) -> int:
        """Hidden or repeated entries, seen by the last iteration."""

    @property
    def located(self) -> bool:
        """Whether an entry may have a location."""

    def __iter__(self) -> Iterator[Entry]: ...


class Store(Protocol):
    """Images, wherever they lie; plain data, so that it can be sent to other processes."""

    @property
    def source(self) -> AnySource:
        """The input as data."""

    def entries(self) -> Entries:
        """The images, as they are to be listed."""

    @property
    def is_far(self) -> bool:
        """Whether reading an image takes so long that it had better begin before it is wanted."""

    def require_images(self) -> None:
        """Refuse an input in which nothing looks like an image, by suffix or by first bytes.

        Raises:
            NoImagesError: naming the place and what was found instead.
        """

    def require_listed(self, entries: Iterable[Entry]) -> None:
        """Refuse an input that an earlier run listed, and that is not there now.

        `entries`: its first ones. A list is not looked at again: some of its files may be gone.

        Raises:
            NoImagesError: naming the place and what was found instead.
        """

    def read(self, ref: ImageRef, max_bytes: int) -> bytes | Failure:
        """The whole content of one listed image, or why it cannot be read.

        Raises:
            EnvironmentFailed: the whole input has gone, or this process can open no more files.
        """


def open_input(job: JobSpec) -> Store:
    """The store of a job's images, of which there is at least one.

    Raises:
        NoImagesError: nothing is there, or nothing looks like an image.
        BatchclfError: as `source_of`.
    """
    store = open_store(source_of(job))
    store.require_images()
    return store


def open_store(source: AnySource) -> Store:
    """What lists and reads the images of a source."""
    if isinstance(source, Sources):
        return SeveralStores(source, tuple(map(FileStore, source.parts)))
    return FileStore(source)


# ---- one place -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileStore:
    """Files that are images, or archives of images."""

    source: Source

    @property
    def files(self) -> Files:
        """The files of its source."""
        if self.source.is_remote:
            return RemoteFiles(self.source)
        return ListedFiles(self.source) if self.source.kind == "list" else LocalFiles(self.source)

    @property
    def is_far(self) -> bool:
        """As `Store`."""
        files = self.files
        return isinstance(files, RemoteFiles) or (
            isinstance(files, ListedFiles) and files.are_far()
        )

    def entries(self) -> "FileEntries":
        """As `Store`."""
        return FileEntries(self.source, self.files)

    def require_images(self) -> None:
        """As `Store`."""
        files = self.files
        if any(map(suffix_format, files.glimpse())):
            return
        files.require_some()
        num_files = 0
        for entry in self.entries():
            num_files += 1
            if suffix_format(entry.path) or looks_like_image(self._head(entry)):
                return
        found = f"{num_files:,} files, none of them an image" if num_files else "no files"
        raise NoImagesError(
            f"input: {self.source.spec}: found 0 images ({found}); check the job's `input`"
        )

    def require_listed(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        if self.source.kind != "list":
            self.require_images()
            return
        files = [_file_of(*entry) for entry in entries]
        tried = [os.path.join(self.source.root, path) for path in files if path is not None]
        if tried and len(tried) == len(files) and not any(map(os.path.lexists, tried)):
            raise NoImagesError(
                f"input: {self.source.spec}: the first {len(tried):,} files of the list are no "
                f"longer there, such as {os.fsdecode(tried[0])}; is what they lie on mounted?"
            )

    def _head(self, entry: Entry) -> bytes:
        if (path := _file_of(*entry)) is not None:
            return self.files.head(path)
        found = read_member(self.files, entry.location, MAX_FILE_BYTES)
        return b"" if isinstance(found, Failure) else found

    def read(self, ref: ImageRef, max_bytes: int) -> bytes | Failure:
        """As `Store`."""
        if (path := _file_of(ref.path, ref.location)) is not None:
            return self.files.read(path, max_bytes)
        return read_member(self.files, ref.location, max_bytes)


def _file_of(path: bytes, location: bytes) -> bytes | None:
    """The file that an entry is; None: it lies in an archive."""
    if location.startswith(b"/"):  # a list named it otherwise
        return location
    return None if location else path


class FileEntries:
    """The images of one source; those of an archive come where the archive would."""

    def __init__(self, source: Source, files: Files) -> None:
        self.located = source.opens_archives
        self._source = source
        self._files = files
        self._paths = files.paths()

    @property
    def num_left_out(self) -> int:
        return self._paths.num_left_out

    def __iter__(self) -> Iterator[Entry]:
        if not self.located:
            return map(Entry, self._paths)
        return self._unpacked()

    def _unpacked(self) -> Iterator[Entry]:
        for path in self._paths:
            place = self._source.locate(path)
            if is_archive(path):
                for member in list_members(self._files, place):
                    yield member._replace(path=path + member.path.removeprefix(place))
            else:
                yield Entry(path, b"" if place == path else place)


# ---- several places ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeveralStores:
    """The images of several sources, one after the other."""

    source: Sources
    parts: tuple[FileStore, ...]

    def entries(self) -> "SeveralEntries":
        """As `Store`; a location is the number of the part, and `:location` or `/path` in it."""
        return SeveralEntries(self.source.prefixes, [part.entries() for part in self.parts])

    @property
    def is_far(self) -> bool:
        """As `Store`."""
        return any(part.is_far for part in self.parts)

    def require_images(self) -> None:
        """As `Store`: of each part, since one without images is a mistake."""
        for part in self.parts:
            part.require_images()

    def require_listed(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        own: list[list[Entry]] = [[] for _ in self.parts]
        for entry in entries:
            number, inner = _in_part(entry)
            own[number].append(inner)
        for part, some in zip(self.parts, own, strict=True):
            part.require_listed(some)

    def read(self, ref: ImageRef, max_bytes: int) -> bytes | Failure:
        """As `Store`."""
        number, entry = _in_part(Entry(ref.path, ref.location))
        return self.parts[number].read(ImageRef(ref.index, *entry), max_bytes)


def _in_part(entry: Entry) -> tuple[int, Entry]:
    """The number of an entry's part, and the entry as that part listed it."""
    digits, sign, rest = re.split(rb"([:/])", entry.location, maxsplit=1)
    return int(digits), Entry(entry.path, rest) if sign == b":" else Entry(rest)


class SeveralEntries:
    """The images of several sources; what two of them hold is listed once."""

    located = True

    def __init__(self, prefixes: tuple[bytes, ...], parts: list[FileEntries]) -> None:
        self._prefixes = prefixes
        self._parts = parts
        self._num_repeated = 0

    @property
    def num_left_out(self) -> int:
        return self._num_repeated + sum(part.num_left_out for part in self._parts)

    def __iter__(self) -> Iterator[Entry]:
        self._num_repeated = 0
        for entries, is_repeated in mark_repeated(self._all(), lambda entry: entry.path):
            self._num_repeated += int(is_repeated.sum())
            yield from compress(entries, ~is_repeated)

    def _all(self) -> Iterator[Entry]:
        for number, (prefix, part) in enumerate(zip(self._prefixes, self._parts, strict=True)):
            for path, location in part:
                place = b":" + location if location else b"/" + path
                yield Entry(prefix + path, b"%d%s" % (number, place))
