"""The frozen listing: the order of a job's images, placed once, shared by all of its shards.

listing.nul holds the paths, each ended by a NUL byte, and behind the last one a line of JSON: whose
listing it is, how many paths it has, and their digest. Where the input holds archives, each path is
followed by where its bytes lie, ended by a NUL byte as well. It is written under a private name and
put in its place whole, so that of several shards that list at once the first wins.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

from batchclf.errors import ResumeRefused
from batchclf.results.files import RunFiles, output_failed, place_first, reading, sync_folder
from batchclf.results.identity import Extent, Identity, Strict, as_written
from batchclf.results.records import Entry, ImageRef, refs_of

READ_BYTES = 1 << 16
"""Of the listing at once; its paths as objects take several times as much."""
WRITE_PATHS = 4096
MAX_TRAILER_BYTES = 1 << 17
FileIdentity = tuple[int, int, int]
"""Device, number (inode) and time of writing: the number of a file that is gone is given again."""


@dataclass(frozen=True, kw_only=True)
class _Trailer(Strict):
    """What stands behind the paths."""

    format_version: Literal[1] = 1
    extent: Extent
    extends: tuple[Extent, ...] = ()
    num_left_out: int
    located: bool = False
    job: Identity


class Mark(NamedTuple):
    """Where an entry of a listing stands in its file."""

    number: int
    offset: int
    """In bytes."""


BEGINNING = Mark(0, 0)


@dataclass(frozen=True, slots=True)
class Listing:
    """A listing as it stands in a file; plain data."""

    path: Path
    extent: Extent
    num_left_out: int
    """Hidden or repeated entries of the input, seen when it was listed."""
    job: Identity
    """Whose listing it is: what all shards must have in common."""
    extends: tuple[Extent, ...] = ()
    """What it was before it was extended, as far as run records may tell of; it begins so."""
    located: bool = False
    """Whether each path is followed by where its bytes lie."""
    file: FileIdentity | None = field(default=None, compare=False)
    """The file that it stands in."""

    @property
    def num_images(self) -> int:
        return self.extent.num_images

    def refs(
        self, start: int = 0, stop: int | None = None, near: Mark = BEGINNING
    ) -> Iterator[ImageRef]:
        """The entries `start` to `stop`, read as they are asked for.

        `near`: a place before them to begin reading at, here and below.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        return refs_of(self.entries(start, stop, near), start)

    def entries(
        self, start: int = 0, stop: int | None = None, near: Mark = BEGINNING
    ) -> Iterator[Entry]:
        """The entries `start` to `stop` as they were listed.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        if not self.located:
            return map(Entry, self.paths(start, stop, near))
        fields = self._fields(start, stop, near)
        return itertools.starmap(Entry, zip(fields, fields, strict=True))

    def paths(
        self, start: int = 0, stop: int | None = None, near: Mark = BEGINNING
    ) -> Iterator[bytes]:
        """The paths alone of the entries `start` to `stop`.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        return itertools.islice(self._fields(start, stop, near), 0, None, 2 if self.located else 1)

    def _fields(self, start: int, stop: int | None, near: Mark) -> Iterator[bytes]:
        each = 2 if self.located else 1
        count = None if stop is None else max(0, stop - start) * each
        num_skipped = (start - near.number) * each
        return itertools.islice(_nul_fields(self.path, near.offset, num_skipped), count)

    def mark(self, number: int, near: Mark = BEGINNING) -> Mark:
        """Where an entry begins; one that is not there begins behind the last.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        number = min(number, self.num_images)
        num_left = (number - near.number) * (2 if self.located else 1)
        offset = near.offset
        for chunk in _chunks(self.path, offset):
            if (num_there := chunk.count(b"\0")) < num_left:
                num_left -= num_there
                offset += len(chunk)
                continue
            end = 0
            for _ in range(num_left):
                end = chunk.index(b"\0", end) + 1
            return Mark(number, offset + end)
        return Mark(number, offset)

    def is_in_place(self, files: RunFiles) -> bool:
        """Whether the listing in an output folder is the file that it stands in.

        Raises:
            EnvironmentFailed: it cannot be looked at.
        """
        return self.file == file_of(files)

    def continues(self, extent: Extent) -> bool:
        """Whether it is that listing, or one that it was extended to."""
        return extent in (self.extent, *self.extends)


class Entries(Protocol):
    """What is to be listed, and how much of the input was left out, once it has been."""

    @property
    def num_left_out(self) -> int: ...

    @property
    def located(self) -> bool:
        """Whether an entry may have a location."""

    def __iter__(self) -> Iterator[Entry]: ...

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        """The entries of an earlier listing, and behind them those that it lacks."""


def open_listing(files: RunFiles) -> Listing | None:
    """The listing in an output folder; None: there is none.

    Raises:
        ResumeRefused: what is there is not a listing that this version writes.
        EnvironmentFailed: it cannot be read.
    """
    with reading(files.listing):
        try:
            with files.listing.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_TRAILER_BYTES))
                tail, found = file.read(), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
    try:
        trailer = as_written(_Trailer, json.loads(tail.rpartition(b"\0")[2]))
    except ValueError:  # no JSON, or none of this version
        raise ResumeRefused(
            f"output: {files.listing} is not a listing as this version of batchclf writes it; "
            "give another output, or --overwrite to start anew"
        ) from None
    return _as_listing(files.listing, trailer, found)


@contextmanager
def drafted(
    files: RunFiles,
    job: Identity,
    entries: Entries,
    *,
    limit: int | None = None,
    extends: Listing | None = None,
) -> Iterator[Listing]:
    """A listing of `entries` for `job`, or `extends` with those that it lacks, not yet in place.

    It has at most `limit` entries, and a name of its own within the block, unless `place` moved it.

    Raises:
        EnvironmentFailed: disk full, I/O error.
    """
    draft = files.new_draft()
    try:
        try:
            listing = _write(draft, job, entries, limit, extends)
        except OSError as error:
            raise output_failed(draft, error) from error
        yield listing
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def place(files: RunFiles, draft: Listing) -> Listing:
    """Put a draft in its place, unless another is there: then that one, which was first.

    A draft that extends the one in place takes its place; only a job without shards does that.

    Raises:
        ResumeRefused: what is there is not a listing that this version writes.
        EnvironmentFailed: the file system does not take it.
    """
    while True:
        try:
            if draft.extends:
                os.replace(draft.path, files.listing)
            else:
                place_first(draft.path, files.listing)
            sync_folder(files.folder)
        except FileExistsError:
            if (first := open_listing(files)) is not None:
                return first
            continue  # whoever placed it threw it away again
        except OSError as error:
            raise output_failed(files.listing, error) from error
        return replace(draft, path=files.listing)


def take_away(files: RunFiles, known: FileIdentity | None) -> bool:
    """Remove the listing, if it is still the file `known`; False: it is another, and stays.

    Raises:
        EnvironmentFailed: it cannot be removed.
    """
    taken = files.new_draft()
    try:
        try:
            os.rename(files.listing, taken)
        except FileNotFoundError:
            return True
        is_known = _identity(os.stat(taken)) == known
        if not is_known:
            with suppress(FileExistsError):  # a third one
                place_first(taken, files.listing)
        taken.unlink(missing_ok=True)
        return is_known
    except OSError as error:
        raise output_failed(files.listing, error) from error


def file_of(files: RunFiles) -> FileIdentity | None:
    """Which file the listing is, whatever is in it; None: there is none.

    Raises:
        EnvironmentFailed: it cannot be looked at.
    """
    with reading(files.listing):
        try:
            return _identity(os.stat(files.listing))
        except FileNotFoundError:
            return None


def _write(
    draft: Path,
    job: Identity,
    entries: Entries,
    limit: int | None,
    extends: Listing | None,
) -> Listing:
    before: tuple[Extent, ...] = ()
    if extends is None:
        listed = iter(entries)
    else:
        before = (*extends.extends, extends.extent)
        listed = entries.after(extends.entries())
    with open(draft, "xb") as file:
        extent = _write_entries(file, itertools.islice(listed, limit), entries.located)
        trailer = _Trailer(
            extent=extent,
            extends=before,
            num_left_out=entries.num_left_out,
            located=entries.located,
            job=job,
        )
        # json, not orjson: a path that is not UTF-8 is kept as escapes.
        file.write(json.dumps(asdict(trailer)).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
        return _as_listing(draft, trailer, os.fstat(file.fileno()))


def _write_entries(file: BinaryIO, entries: Iterator[Entry], located: bool) -> Extent:
    num_images, digest = 0, hashlib.sha256()
    while chunk := list(itertools.islice(entries, WRITE_PATHS)):
        fields = itertools.chain.from_iterable(chunk) if located else (one.path for one in chunk)
        data = b"\0".join(fields) + b"\0"
        file.write(data)
        digest.update(data)
        num_images += len(chunk)
    return Extent(num_images, digest.hexdigest())


def _as_listing(path: Path, trailer: _Trailer, found: os.stat_result) -> Listing:
    return Listing(
        path,
        trailer.extent,
        trailer.num_left_out,
        trailer.job,
        trailer.extends,
        trailer.located,
        _identity(found),
    )


def _identity(found: os.stat_result) -> FileIdentity:
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _nul_fields(listing: Path, offset: int, num_skipped: int) -> Iterator[bytes]:
    rest = b""
    num_left = num_skipped
    for chunk in _chunks(listing, offset):
        *fields, rest = (rest + chunk).split(b"\0")
        yield from fields[num_left:]
        num_left = max(0, num_left - len(fields))


def _chunks(listing: Path, offset: int) -> Iterator[bytes]:
    with reading(listing), listing.open("rb") as file:
        file.seek(offset)
        yield from iter(partial(file.read, READ_BYTES), b"")
