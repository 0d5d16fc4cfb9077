"""Files of other machines: those of a bucket are listed, and read, as if they lay in a folder here.

A bucket lists its keys by their bytes, `a-b/1` before `a/1`; a folder of this machine has `a/1`
first. The order is to be the same wherever images lie, so all keys are taken, and sorted, at some
100 bytes of memory for each: asking folder by folder would cost a request for each folder.
"""

import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from typing import BinaryIO

from batchclf.errors import NoImagesError
from batchclf.images.addresses import (
    RemoteFile,
    bucket_at,
    file_at,
    split_address,
    unreadable,
)
from batchclf.images.archives.passage import Refused as ArchiveRefused
from batchclf.images.attempts import CHANGED, OPENING_S, Content, Patience, Refused, insist
from batchclf.images.buckets import Bucket, Object
from batchclf.images.clutter import clutter_kind
from batchclf.images.dialect import is_far
from batchclf.images.disk import OUT_OF_MEMORY
from batchclf.images.formats import suffix_format
from batchclf.images.globs import describe_others
from batchclf.images.health import health_of
from batchclf.images.local import MAX_FILE_BYTES, MAX_SURVEYED, LocalFiles, Paths
from batchclf.images.omissions import Omissions
from batchclf.images.room import this_claim
from batchclf.images.source import Source, selector
from batchclf.results.records import Failure
from batchclf.system.alive import alive

PAGE_KEYS = 100
"""Of a listing at once, at least; where it fails, it goes on behind these."""
HEAD_BYTES = 32
CHUNK_BYTES = 4 << 20
"""Of an opened file at once: its members are listed from their headers, in between lie photos."""


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The files of an input that lies on another machine."""

    source: Source

    @property
    def _root(self) -> str:
        return os.fsdecode(self.source.root)

    @property
    def _patience(self) -> Patience:
        return Patience.within(self.source.max_seconds)

    def paths(self) -> "RemotePaths":
        """What the input holds, as an iterable.

        Raises:
            UsageError: while it is iterated: an object has a name that no path can be.
            EnvironmentFailed: while it is iterated: the bucket cannot be listed.
        """
        return RemotePaths(self.source)

    def glimpse(self) -> Iterator[bytes]:
        """Paths in no order and not all, the first of which comes sooner than that of `paths`.

        Raises:
            EnvironmentFailed: the place does not answer, or refuses.
        """
        if self.source.kind in ("folder", "glob"):
            yield from filter(selector(self.source), _visible(self.source))

    def require_some(self) -> None:
        """As `Files`; that the one file is there, was seen when it was opened.

        Raises:
            NoImagesError: a glob selects nothing; with what there is.
            EnvironmentFailed: as `glimpse`.
        """
        if self.source.kind == "glob" and next(self.glimpse(), None) is None:
            others = list(islice(_visible(self.source), MAX_SURVEYED))
            told = describe_others(self.source.names, self._root, others)
            raise NoImagesError(
                f"input: {self.source.spec}: found 0 images: no file matches; {told}"
            )

    def head(self, path: bytes) -> bytes:
        """The first bytes of a file; empty where it cannot be read."""
        found = self._insisting(path, lambda file: file.get((0, HEAD_BYTES)))
        return b"" if isinstance(found, Failure) else found.data

    def read(self, path: bytes, max_bytes: int = MAX_FILE_BYTES) -> bytes | Failure:
        """The whole content of one listed file, or why it cannot be read.

        Raises:
            EnvironmentFailed: nothing is to be read there any more.
            NoRoom: as what this thread claims room with.
        """
        claim = this_claim()
        found = self._insisting(path, lambda file: file.get_up_to(max_bytes, claim))
        if isinstance(found, Failure):
            return found
        if found.size > max_bytes:
            return Failure(
                "too_large_bytes", f"{found.size:,} bytes; loader.max_bytes allows {max_bytes:,}"
            )
        return found.data

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """So many bytes of one listed file, or why they cannot be read.

        Raises:
            EnvironmentFailed, NoRoom: as `read`.
        """
        this_claim()(length)
        return self._part(path, start, length)

    def _part(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """The same for what an archive is read by, which no image holds.

        All that this process reads of a file is of one and the same version.

        Raises:
            EnvironmentFailed: as `read`.
        """
        if length == 0:
            return b""
        address = self._address(path)
        span = (start, start + length)
        found = self._insisting(path, lambda file: _versions().get(address, file, span))
        if isinstance(found, Failure):
            return found
        if len(found.data) < length:
            return Failure("changed", f"ends before byte {span[1]:,}; it did not when listed")
        return found.data

    def version(self, path: bytes) -> bytes | Failure:
        """The version of one listed file that this process reads, or why it cannot be told.

        Raises:
            EnvironmentFailed: as `read`.
        """
        address = self._address(path)
        known = _versions().known(address)
        if known is not None:
            return known
        found = self._insisting(path, lambda file: _versions().get(address, file, (0, 1)))
        return found if isinstance(found, Failure) else version_of(found)

    def open(self, path: bytes) -> BinaryIO | Failure:
        """One listed file, opened to be read and sought in; or why that cannot be.

        Raises:
            EnvironmentFailed: as `read`; also while it is read.
            OSError: while it is read: it cannot be.
        """
        found = self._insisting(path, lambda file: file.get((0, 1)))
        if isinstance(found, Failure):
            return found
        return io.BufferedReader(_Opened(partial(self._part, path), path, found.size), CHUNK_BYTES)

    def _address(self, path: bytes) -> str:
        text = os.fsdecode(path)
        return text if is_far(path) else f"{self._root}/{text}"

    def _insisting(self, path: bytes, action: Callable[[RemoteFile], Content]) -> Content | Failure:
        address, patience = self._address(path), self._patience
        try:
            found = insist(lambda: action(file_at(address, patience)), patience.total_s)
        except MemoryError:
            return Failure("oom", OUT_OF_MEMORY)
        except Refused as refused:
            if refused.code == "no_parts":
                raise unreadable(address, refused) from refused
            health_of(self.source).require(address, refused)
            return Failure(self._code_of(refused), str(refused))
        health_of(self.source).answered(address)
        return found

    def _code_of(self, refused: Refused) -> str:
        is_unseen = self.source.kind == "list"  # what it names was not looked up
        return "not_found" if is_unseen and refused.code == "vanished" else refused.code


class _Lost(ArchiveRefused, OSError):
    """What cannot be read of an opened file: to who reads an image in it, that image's failure.

    To who lists it, a failing disk: to go on without it would lose its images for good.
    """

    def __init__(self, path: bytes, why: Failure) -> None:
        OSError.__init__(self, errno.EIO, why.message)
        self.failure = Failure(why.code, f"{os.fsdecode(path)}: {why.message}")


class _Opened(io.RawIOBase):
    """A file of another machine, of which ranges are read."""

    def __init__(self, part: Callable[[int, int], bytes | Failure], path: bytes, size: int) -> None:
        """`part`: reads so many bytes, the first of which is at the first number."""
        self._part = part
        self._path = path
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        """The rest in one request; otherwise it would come in many of 8 kB."""
        rest = bytearray(self._size - self._at)
        return bytes(rest[: self.readinto(memoryview(rest))])

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        data = self._part(self._at, length)
        if isinstance(data, Failure):
            raise _Lost(self._path, data)
        alive()  # a place of an archive may be many requests, each of which ends in time
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# ---- one version of each file --------------------------------------------------------------------


class _Versions:
    """Which version of each file was read first by this process."""

    def __init__(self) -> None:
        self._tags: dict[str, str] = {}
        self._known: dict[str, bytes] = {}

    def known(self, address: str) -> bytes | None:
        """That version, as `version_of`; None: nothing was read yet."""
        return self._known.get(address)

    def get(self, address: str, file: RemoteFile, span: tuple[int, int]) -> Content:
        """A range of the version that was read first.

        Raises:
            Refused: also where that is there no more.
        """
        found = file.get(span, self._tags.get(address))
        # Another thread may have read its first range meanwhile.
        if self._known.setdefault(address, version_of(found)) != version_of(found):
            raise Refused(CHANGED, "changed")
        if found.tag is not None:
            self._tags.setdefault(address, found.tag)
        return found


def version_of(content: Content) -> bytes:
    """What tells that a file is another: its tag; its size, where a server sends none."""
    return str(content.size if content.tag is None else content.tag).encode()


@cache
def _versions() -> _Versions:
    return _Versions()


# ---- listing -------------------------------------------------------------------------------------


class RemotePaths:
    """The paths of an input, relative to its root, in the order of a folder of this machine."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.left_out = Omissions()
        """Clutter, and what marks folders, seen by the last iteration."""

    def __iter__(self) -> Iterator[bytes]:
        self.left_out = Omissions()
        if self.source.kind == "file":
            return iter([os.fsencode(self.source.names[-1])])
        return filter(selector(self.source), self._sorted())

    def _sorted(self) -> Iterator[bytes]:
        places: set[bytes] = set()
        empty: set[bytes] = set()
        names: list[bytes] = []
        for path, size in _listed(self.source, Patience.within(self.source.max_seconds).total_s):
            if left_out := _left_out(path):
                place, kind = left_out
                if place not in places:
                    self.left_out.add(kind, place)
                    places.add(place)
                continue
            # NUL, which no name holds, comes before all others: so `a/1` does before `a-b/1`.
            names.append(path.replace(b"/", b"\0"))
            if size == 0:
                empty.add(names[-1])
        names.sort()
        following = chain(islice(names, 1, None), [b""])
        for name, next_name in zip(names, following, strict=True):
            if name in empty and self._marks_a_folder(name, next_name):
                continue
            yield name.replace(b"\0", b"/")

    def _marks_a_folder(self, name: bytes, next_name: bytes) -> bool:
        """Consoles leave an object without content for a folder; the library drops its slash."""
        if next_name.startswith(name + b"\0"):
            return True
        if suffix_format(name):
            return False
        self.left_out.add("empty", name.replace(b"\0", b"/"))  # perhaps a file without content
        return True


def _visible(source: Source) -> Iterator[bytes]:
    """What lies below the root, in the bucket's order, but for what systems leave there.

    Raises:
        UsageError, EnvironmentFailed: as `_listed`.
    """
    return (path for path, _ in _listed(source, OPENING_S) if not _left_out(path))


def _listed(source: Source, total_s: float) -> Iterator[tuple[bytes, int]]:
    """The path and the size of each object, in the bucket's order.

    Raises:
        UsageError: an object has a name that no path can be.
        EnvironmentFailed: the bucket does not answer, or refuses.
    """
    root = os.fsdecode(source.root)
    prefix = split_address(root).key
    below = f"{prefix}/" if prefix else ""
    try:
        bucket = bucket_at(root, Patience.within(source.max_seconds))
        for page in _pages(bucket, prefix, total_s):
            for one in page:
                if one.key.startswith(below) and one.key != below:
                    yield os.fsencode(one.key.removeprefix(below)), one.size
    except Refused as refused:
        raise unreadable(str(source.spec), refused) from refused


def _pages(bucket: Bucket, prefix: str, total_s: float) -> Iterator[list[Object]]:
    """The pages of a listing; one that fails is asked for again, behind the last key."""
    after: str | None = None
    pages = bucket.pages(prefix, after, PAGE_KEYS)

    def next_page() -> list[Object]:
        nonlocal pages
        try:
            return next(pages, [])
        except Refused:
            pages = bucket.pages(prefix, after, PAGE_KEYS)
            raise

    while page := insist(next_page, total_s):
        yield page
        after = page[-1].key


def _left_out(path: bytes) -> tuple[bytes, str] | None:
    """The clutter that a path is, or the folder that it leads through; and of which kind it is."""
    *folders, name = path.split(b"/")
    for number, folder in enumerate(folders, start=1):
        if kind := clutter_kind(folder, is_folder=True):
            return b"/".join(folders[:number]), kind
    kind = clutter_kind(name, is_folder=False)
    return None if kind is None else (path, kind)


# ---- lists ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListedFiles:
    """The files that a list on this machine names: paths of this machine, or addresses."""

    source: Source

    def paths(self) -> Paths:
        """As `LocalFiles`."""
        return LocalFiles(self.source).paths()

    def glimpse(self) -> Iterator[bytes]:
        """As `LocalFiles`."""
        return LocalFiles(self.source).glimpse()

    def require_some(self) -> None:
        """As `LocalFiles`; an address is not looked up."""
        LocalFiles(self.source).require_some()

    def head(self, path: bytes) -> bytes:
        """As `Files`."""
        return self._that_have(path).head(path)

    def open(self, path: bytes) -> BinaryIO | Failure:
        """As `Files`."""
        return self._that_have(path).open(path)

    def read(self, path: bytes, max_bytes: int = MAX_FILE_BYTES) -> bytes | Failure:
        """As `Files`."""
        return self._that_have(path).read(path, max_bytes)

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """As `Files`."""
        return self._that_have(path).read_range(path, start, length)

    def version(self, path: bytes) -> bytes | Failure:
        """As `Files`."""
        return self._that_have(path).version(path)

    def are_far(self) -> bool:
        """Whether the list names an address, so that reading ahead is worth it."""
        return any(map(is_far, self.paths()))

    def _that_have(self, path: bytes) -> LocalFiles | RemoteFiles:
        return RemoteFiles(self.source) if is_far(path) else LocalFiles(self.source)
