"""What an input holds, in a fixed order: its images, those inside of archives as well.

Each is an entry: the path of its record, and its location, where that does not say where it lies.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, compress
from typing import Protocol

from batchclf.images.archives import Archives, row_of
from batchclf.images.archives.location import File
from batchclf.images.archives.location import truth_of as truth_in
from batchclf.images.archives.members import Log
from batchclf.images.archives.names import archive_kind
from batchclf.images.files import Files
from batchclf.images.lists import mark_repeated
from batchclf.images.omissions import Omissions
from batchclf.images.source import Source
from batchclf.results.records import Entry


class Entries(Protocol):
    """What an input holds, in a fixed order; each iteration looks anew."""

    @property
    def left_out(self) -> Omissions:
        """What is not listed, seen by the last iteration."""

    @property
    def num_left_out(self) -> int:
        """How much that is."""

    @property
    def located(self) -> bool:
        """Whether an entry may have a location."""

    def __iter__(self) -> Iterator[Entry]: ...

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        """The entries of an earlier listing, and behind them those that it lacks."""


def truth_of(location: bytes) -> bytes | None:
    """The true label that the listing found beside an image in its archive, if there is one."""
    if location[:1].isdigit():
        location = in_part(Entry(b"", location))[1].location
    return None if file_of(b"", location) is not None else truth_in(location)


def file_of(path: bytes, location: bytes) -> bytes | None:
    """The file that an entry is; None: it lies in an archive."""
    if location.startswith(b"/"):  # a list named it otherwise
        return location
    return None if location else path


def in_part(entry: Entry) -> tuple[int, Entry]:
    """The number of an entry's part, and the entry as that part listed it."""
    digits, sign, rest = re.split(rb"([:/])", entry.location, maxsplit=1)
    return int(digits), Entry(entry.path, rest) if sign == b":" else Entry(rest)


class _Named:
    """Entries, each under a path of its own."""

    has_rows: bool
    """Whether there may be rows of Parquet files, which name themselves."""
    _log: Log

    def __iter__(self) -> Iterator[Entry]:
        return self._named(self.found())

    @property
    def left_out(self) -> Omissions:
        """What is not listed, seen by the last iteration."""
        raise NotImplementedError

    @property
    def num_left_out(self) -> int:
        """How much that is."""
        return self.left_out.num

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        """The entries of an earlier listing, and behind them those that it lacks."""
        some = mark_repeated(chain(listed, self.found()), self._identity)
        return self._named(
            chain.from_iterable(compress(entries, ~is_repeated) for entries, is_repeated in some)
        )

    def found(self) -> Iterator[Entry]:
        """The entries as they name themselves."""
        raise NotImplementedError

    def _row_of(self, entry: Entry) -> bytes | None:
        """File and row; None: it is no row of a Parquet file."""
        raise NotImplementedError

    def _identity(self, entry: Entry) -> bytes:
        """Of rows the path does not tell whether they are the same."""
        return self._row_of(entry) or entry.path

    def _named(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        return _each_named_once(entries, self._row_of, self._log) if self.has_rows else entries


class FileEntries(_Named):
    """The images of one source; those of an archive come where the archive would."""

    def __init__(self, source: Source, files: Files, log: Log) -> None:
        self.located = source.opens_archives
        self.has_rows = self.located and source.may_hold_rows
        self._source = source
        self._paths = files.paths()
        self._begin = partial(Archives, files, source.rows, log)
        self._archives = self._begin()
        self._log = log
        self._others = Omissions()

    @property
    def left_out(self) -> Omissions:
        return self._paths.left_out + self._archives.left_out + self._others

    def found(self) -> Iterator[Entry]:
        if not self.located:
            return map(Entry, self._paths)
        self._archives = self._begin()
        return chain.from_iterable(map(self._archives.entries, self._candidates()))

    def _row_of(self, entry: Entry) -> bytes | None:
        return row_of(entry.location)

    def glimpse(self) -> Iterator[Entry]:
        """The same, the first of which comes sooner; with those that archives do not list."""
        if not self.located:
            return map(Entry, self._paths)
        return chain.from_iterable(map(self._begin().glimpse, self._candidates()))

    def _candidates(self) -> Iterator[File]:
        """Of a folder of Parquet files, those without what the programs that write it put beside.

        Raises:
            BatchclfError: as the paths.
        """
        self._others = Omissions()
        is_folder_of_rows = self._source.kind == "folder" and self._source.rows is not None
        for path in self._paths:
            if is_folder_of_rows and not _holds_rows(path):
                self._others.add("not Parquet", path)
            else:
                yield File(path, self._source.locate(path))


def _holds_rows(path: bytes) -> bool:
    is_hidden = any(part.startswith((b"_", b".")) for part in path.split(b"/"))
    return not is_hidden and archive_kind(path) == "parquet"


def _each_named_once(
    entries: Iterator[Entry], row_of: Callable[[Entry], bytes | None], log: Log
) -> Iterator[Entry]:
    """The entries; rows of Parquet files with the path of another are named for file and row."""
    num_renamed = 0
    for some, is_repeated in mark_repeated(entries, lambda entry: entry.path):
        for entry, is_another in zip(some, is_repeated.tolist(), strict=True):
            row = row_of(entry) if is_another else None
            num_renamed += row not in (None, entry.path)
            yield entry if row is None else Entry(row, entry.location)
    if num_renamed:
        log(
            f"input: {num_renamed:,} rows have the path of another row, so their records are named "
            "for their file and row"
        )


class SeveralEntries(_Named):
    """The images of several sources; what two of them hold is listed once."""

    located = True

    def __init__(self, prefixes: tuple[bytes, ...], parts: Sequence[FileEntries], log: Log) -> None:
        self._prefixes = prefixes
        self._parts = parts
        self._log = log
        self.has_rows = any(part.has_rows for part in parts)
        self._repeated = Omissions()

    @property
    def left_out(self) -> Omissions:
        return sum((part.left_out for part in self._parts), self._repeated)

    def found(self) -> Iterator[Entry]:
        """Each image once."""
        self._repeated = Omissions()
        for entries, is_repeated in mark_repeated(self._all(), self._identity):
            if is_repeated.any():
                first = entries[is_repeated.argmax()]
                self._repeated.add("repeated", first.path, int(is_repeated.sum()))
            yield from compress(entries, ~is_repeated)

    def _row_of(self, entry: Entry) -> bytes | None:
        number, inner = in_part(entry)
        row = row_of(inner.location)
        return None if row is None else self._prefixes[number] + row

    def _all(self) -> Iterator[Entry]:
        for number, (prefix, part) in enumerate(zip(self._prefixes, self._parts, strict=True)):
            for path, location in part.found():
                place = b":" + location if location else b"/" + path
                yield Entry(prefix + path, b"%d%s" % (number, place))
