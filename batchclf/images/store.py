"""Where images lie: what an input holds (entries.py), and the content of each image.

A store lists the images of files (files.py), those inside of archives as well, and reads an image
that it listed.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from batchclf.errors import NoImagesError, ResumeRefused
from batchclf.images.archives import (
    ANEW,
    archive_of,
    failure_of,
    is_changed,
    read_member,
    stretch_of,
)
from batchclf.images.archives.members import Limits, Log, Pace
from batchclf.images.archives.names import SUFFIXES, is_archive
from batchclf.images.dialect import is_far
from batchclf.images.entries import Entries, FileEntries, SeveralEntries, file_of, in_part
from batchclf.images.files import Files
from batchclf.images.formats import looks_like_image, suffix_format
from batchclf.images.local import LocalFiles
from batchclf.images.remote import ListedFiles, RemoteFiles
from batchclf.images.room import Claim, unclaimed
from batchclf.images.source import AnySource, Source, Sources, source_of
from batchclf.results.records import Entry, Failure, ImageRef, Stretch
from batchclf.spec.job import JobSpec

MAX_HEAD_BYTES = 2**26
"""Of a member that is read to see whether it is an image."""


def _say_nothing(text: str) -> None:
    pass


class Store(Protocol):
    """Images, wherever they lie; plain data, so that it can be sent to other processes."""

    @property
    def source(self) -> AnySource:
        """The input as data."""

    def entries(self, log: Log = _say_nothing) -> Entries:
        """The images, as they are to be listed; `log` is told what is odd about the archives."""

    @property
    def is_far(self) -> bool:
        """Whether there is an image of which `lies_far` is true."""

    def lies_far(self, ref: ImageRef) -> bool:
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

    def require_unchanged(self, entries: Iterable[Entry]) -> None:
        """Refuse archives in which these entries do not lie where they were listed any more.

        Raises:
            ResumeRefused: naming the archive.
        """

    def read(
        self, ref: ImageRef, max_bytes: int, claim: Claim = unclaimed, pace: Pace = "many"
    ) -> bytes | Failure:
        """The whole content of one listed image, or why it cannot be read.

        `claim`: called before a member of an archive is read, with the bytes that this will take.
        `pace`: how an archive is read in passing.

        Raises:
            EnvironmentFailed: the whole input has gone, or this process can open no more files.
        """

    def stretch_of(self, ref: ImageRef) -> Stretch | None:
        """Where an image lies that is read in passing through its archive; None: it is not.

        One process should do that for all.
        """

    def local_file(self, ref: ImageRef) -> bytes | None:
        """The file of this machine that is an image; None: it is elsewhere, or in an archive."""

    def version(self, ref: ImageRef) -> bytes | None:
        """Another one where an image's file may be another; None where that takes long to tell."""


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

    def lies_far(self, ref: ImageRef) -> bool:
        """As `Store`."""
        if self.source.kind != "list":
            return self.source.is_remote
        path = file_of(ref.path, ref.location)
        return is_far(archive_of(ref.location) if path is None else path)

    def entries(self, log: Log = _say_nothing) -> "FileEntries":
        """As `Store`."""
        return FileEntries(self.source, self.files, log)

    def require_images(self) -> None:
        """As `Store`."""
        files = self.files
        if not self.source.opens_archives and any(map(suffix_format, files.glimpse())):
            return
        files.require_some()
        seen = _Seen()
        for entry in self.entries().glimpse():
            if self._looks_like_image(entry):
                return
            seen.add(entry)
            if self.source.kind == "file" and not entry.location:
                seen.head = self._head(entry)
        raise NoImagesError(
            f"input: {self.source.spec}: found 0 images ({seen.told(self.source)}); "
            f"{seen.advice(self.source)}"
        )

    def require_listed(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        if self.source.kind != "list":
            self.require_images()
            return
        files = [file_of(*entry) for entry in entries]
        # Whether an address, or what an archive holds, is there is told by reading it.
        here = [path for path in files if path is not None and not is_far(path)]
        tried = [os.path.join(self.source.root, path) for path in here]
        if tried and len(tried) == len(files) and not any(map(os.path.lexists, tried)):
            raise NoImagesError(
                f"input: {self.source.spec}: the first {len(tried):,} files of the list are no "
                f"longer there, such as {os.fsdecode(tried[0])}; is what they lie on mounted?"
            )

    def require_unchanged(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        members = (one.location for one in entries if file_of(*one) is None)
        one_of_each = {archive_of(location): location for location in members}
        for archive, location in one_of_each.items():
            if is_changed(self.files, location):
                raise ResumeRefused(
                    f"input: {os.fsdecode(os.path.join(self.source.root, archive))} was written to "
                    f"after it was listed, and its images may lie elsewhere in it; {ANEW}"
                )

    def _looks_like_image(self, entry: Entry) -> bool:
        if failure_of(entry.location) is not None:
            return False
        return suffix_format(entry.path) is not None or looks_like_image(self._head(entry))

    def _head(self, entry: Entry) -> bytes:
        if (path := file_of(*entry)) is not None:
            return self.files.head(path)
        found = read_member(self.files, entry.location, Limits(MAX_HEAD_BYTES))
        return b"" if isinstance(found, Failure) else found

    def read(
        self, ref: ImageRef, max_bytes: int, claim: Claim = unclaimed, pace: Pace = "many"
    ) -> bytes | Failure:
        """As `Store`."""
        if (path := file_of(ref.path, ref.location)) is not None:
            return self.files.read(path, max_bytes)
        return read_member(self.files, ref.location, Limits(max_bytes, claim, pace))

    def stretch_of(self, ref: ImageRef) -> Stretch | None:
        """As `Store`."""
        return stretch_of(ref.location) if file_of(ref.path, ref.location) is None else None

    def local_file(self, ref: ImageRef) -> bytes | None:
        """As `Store`."""
        path = file_of(ref.path, ref.location)
        if path is None or self.lies_far(ref):
            return None
        return os.path.abspath(os.path.join(self.source.root, path))

    def version(self, ref: ImageRef) -> bytes | None:
        """As `Store`."""
        if self.lies_far(ref):
            return None
        path = file_of(ref.path, ref.location)
        found = LocalFiles(self.source).state(archive_of(ref.location) if path is None else path)
        return found.code.encode() if isinstance(found, Failure) else found


_KINDS = {
    b"PK": ", as zip archives do: name it *.zip",
    b"\x1f\x8b": ", as gzip does: name a compressed tar *.tar.gz",
    b"PAR1": ", as Parquet does: name it *.parquet",
    b"Rar!": ", as RAR archives do: unpack it",
    b"7z": ", as 7-Zip's archives do: unpack it",
}
"""What a file is that its name does not tell, by how it begins."""
_INPUTS = (
    "give an image, a folder, a .txt or .jsonl list of paths, or a .tar, .zip or .parquet of images"
)


class _Seen:
    """What an input without images holds instead."""

    def __init__(self) -> None:
        self._num = 0
        self._why = ""
        self._archive = b""
        self.head = b""
        """How the only file begins, where the input is one file."""

    def add(self, entry: Entry) -> None:
        """Note one of its entries."""
        self._num += 1
        failure = failure_of(entry.location)
        if failure is not None and not self._why:
            self._why = f"; {os.fsdecode(entry.path)}: {failure.message}"
        if not entry.location and not self._archive and is_archive(entry.path):
            self._archive = entry.path

    def told(self, source: Source) -> str:
        """In words."""
        what = "members" if source.opens_archives else "files"
        none = "no path in it" if source.kind == "list" else f"no {what}"
        return (f"{self._num:,} {what}, none of them an image" if self._num else none) + self._why

    def advice(self, source: Source) -> str:
        """What to do."""
        if self.head:
            kind = next((told for start, told in _KINDS.items() if self.head.startswith(start)), "")
            return f"it begins with {self.head[:12]!r}{kind}; {_INPUTS}"
        if not self._archive or source.kind not in ("folder", "glob"):
            return "check the job's `input`"
        folder, name = os.path.split(os.fsdecode(self._archive))
        suffix = next(one for one in SUFFIXES if name.lower().endswith(os.fsdecode(one)))
        top = source.spec if source.kind == "folder" else os.fsdecode(source.root)
        glob = os.path.join(top, folder, "*" + os.fsdecode(suffix))
        return f"to read the images in its archives, give them as input: {glob}"


# ---- several places ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeveralStores:
    """The images of several sources, one after the other."""

    source: Sources
    parts: tuple[FileStore, ...]

    def entries(self, log: Log = _say_nothing) -> "SeveralEntries":
        """As `Store`; a location is the number of the part, and `:location` or `/path` in it."""
        parts = [part.entries(log) for part in self.parts]
        return SeveralEntries(self.source.prefixes, parts, log)

    @property
    def is_far(self) -> bool:
        """As `Store`."""
        return any(part.is_far for part in self.parts)

    def lies_far(self, ref: ImageRef) -> bool:
        """As `Store`."""
        number, entry = in_part(Entry(ref.path, ref.location))
        return self.parts[number].lies_far(ImageRef(ref.index, *entry))

    def require_images(self) -> None:
        """As `Store`: of each part, since one without images is a mistake."""
        for part in self.parts:
            part.require_images()

    def require_listed(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        for part, some in zip(self.parts, self._of_parts(entries), strict=True):
            part.require_listed(some)

    def require_unchanged(self, entries: Iterable[Entry]) -> None:
        """As `Store`."""
        for part, some in zip(self.parts, self._of_parts(entries), strict=True):
            part.require_unchanged(some)

    def _of_parts(self, entries: Iterable[Entry]) -> list[list[Entry]]:
        own: list[list[Entry]] = [[] for _ in self.parts]
        for entry in entries:
            number, inner = in_part(entry)
            own[number].append(inner)
        return own

    def read(
        self, ref: ImageRef, max_bytes: int, claim: Claim = unclaimed, pace: Pace = "many"
    ) -> bytes | Failure:
        """As `Store`."""
        number, entry = in_part(Entry(ref.path, ref.location))
        return self.parts[number].read(ImageRef(ref.index, *entry), max_bytes, claim, pace)

    def stretch_of(self, ref: ImageRef) -> Stretch | None:
        """As `Store`."""
        number, entry = in_part(Entry(ref.path, ref.location))
        found = self.parts[number].stretch_of(ImageRef(ref.index, *entry))
        return found and found._replace(archive=b"%d:%s" % (number, found.archive))

    def local_file(self, ref: ImageRef) -> bytes | None:
        """As `Store`."""
        number, entry = in_part(Entry(ref.path, ref.location))
        return self.parts[number].local_file(ImageRef(ref.index, *entry))

    def version(self, ref: ImageRef) -> bytes | None:
        """As `Store`."""
        number, entry = in_part(Entry(ref.path, ref.location))
        return self.parts[number].version(ImageRef(ref.index, *entry))
