"""Images inside of files: tar and zip archives, Parquet, listed and read without unpacking them.

One module per kind finds members and reads them again by their location (location.py), which is
plain bytes, since it stands in the frozen listing. All work over `Ranges`, so in a bucket as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, Final

from batchclf.images.archives.listing import Archive, being_listed, why_unlistable
from batchclf.images.archives.location import (
    FAILED,
    File,
    Location,
    failed,
    failure_in,
    located,
    parse,
    short,
)
from batchclf.images.archives.members import Damage, Found, Limits, Log, Member, Ranges, Rows
from batchclf.images.archives.names import archive_kind, tidy
from batchclf.images.archives.passage import Refused
from batchclf.images.omissions import Omissions
from batchclf.results.records import Entry, Failure, Stretch
from batchclf.system.alive import alive
from batchclf.system.paths import reason, refusal

if TYPE_CHECKING:
    from batchclf.images.archives.parquet_list import RowLister

MODULES: Final = {b"range": "tar", b"stream": "stream", b"zip": "zips", b"row": "parquet"}
"""Where each kind of location is read: in the module of which it is the `KIND`. These modules are
imported when there is one to read, so that a start without archives does not wait for them."""
ROW: Final = b"row"
_IN_PASSING: Final = (b"stream", ROW)
"""Kinds that are read in passing: `span_of` tells which units a member takes."""
ANEW = "give another output, or --overwrite, to list it anew"


class Archives:
    """Lists the images in the archives of one source; what is no archive is an image itself."""

    def __init__(self, files: Ranges, rows: Rows | None, log: Log) -> None:
        """`rows`: all of them are Parquet files, whatever their names promise."""
        self._files = files
        self._given_rows = rows
        self._log = log
        self._is_warned = False
        self.left_out = Omissions()

    @cached_property
    def _rows(self) -> "RowLister":
        from batchclf.images.archives.parquet_list import RowLister

        return RowLister(self._files, self._given_rows or Rows())

    def entries(self, file: File) -> Iterator[Entry]:
        """The images in one file, each under `archive/name`.

        Raises:
            UsageError: this machine cannot read such an archive, or the job must say more.
            EnvironmentFailed: the disk fails.
        """
        with self._opened(file) as (archive, opened):
            if isinstance(opened, Failure):
                yield Entry(file.path, located(failed(opened), file))
            elif opened is None:
                yield self._itself(file)  # where it cannot be opened, reading it records why
            elif self._kind(file) == "parquet":
                yield from self._rows.entries(archive, opened)
            else:
                from batchclf.images.archives.index import Index

                index = Index()
                for found in self._scan(file, opened):
                    alive()  # of a million members, none is yielded for a while
                    index.add(found)
                if not len(index) and not index.damages:
                    self._log(f"{_shown(file.path)}: an archive without files")
                yield from index.entries(archive)
                self.left_out += index.left_out

    def glimpse(self, file: File) -> Iterator[Entry]:
        """The same, the first of which comes sooner; with those that `entries` leaves out.

        Raises:
            UsageError, EnvironmentFailed: as `entries`.
        """
        with self._opened(file) as (archive, opened):
            if isinstance(opened, Failure):
                yield Entry(file.path, located(failed(opened), file))
            elif opened is None:
                yield self._itself(file)
            elif self._kind(file) == "parquet":
                yield from self._rows.entries(archive, opened)
            else:
                for found in self._scan(file, opened):
                    alive()
                    if isinstance(found, Member):
                        name = b"%s/%s" % (file.path, tidy(found.name))
                        yield Entry(name, located(found.fields, archive))
                    elif isinstance(found, Damage):
                        yield Entry(file.path, located(failed(found.failure), archive))

    def _itself(self, file: File) -> Entry:
        return Entry(file.path, b"" if file.place == file.path else file.place)

    @contextmanager
    def _opened(self, file: File) -> Iterator[tuple[File, BinaryIO | Failure | None]]:
        """An archive of a certain version; None: it is none, or cannot be opened.

        A failure: it is not to be listed.
        """
        try:
            if self._kind(file) is None:
                yield file, None
                return
            this = Archive(self._files, self._given_rows, file)
            if (why := why_unlistable(this)) is not None:
                yield file, why
                return
            # Asked first: of an archive that changes while it is listed, no member is read.
            version = self._files.version(file.place)
            opened = version if isinstance(version, Failure) else self._files.open(file.place)
            if isinstance(version, Failure) or isinstance(opened, Failure):
                yield file, None
                return
            with being_listed(this), opened:
                yield file._replace(version=short(version)), opened
        except OSError as error:
            raise refusal("input", _shown(file.path), error) from error

    def _kind(self, file: File) -> str | None:
        return "parquet" if self._given_rows is not None else archive_kind(file.path)

    def _scan(self, file: File, opened: BinaryIO) -> Iterator[Found]:
        kind = self._kind(file)
        if kind == "zip":
            from batchclf.images.archives import zips

            return zips.scan(opened, self._files, file.place)
        from batchclf.images.archives import stream, tar

        if kind == "tar":
            return tar.scan(tar.PlainFile(opened))
        if not self._is_warned:
            self._is_warned = True
            self._log(
                f"{_shown(file.path)}: a compressed tar archive is read through from its "
                "beginning, to list it and again to resume; a plain .tar or a .zip is faster"
            )
        return tar.scan(stream.Inflated(opened, file.place))


def read_member(files: Ranges, location: bytes, limits: Limits) -> bytes | Failure:
    """The whole content of a member, or why it cannot be read."""
    where = parse(location)
    if where.kind == FAILED:
        return failure_in(where)
    found = _read(files, where, limits)
    # Asked afterwards: an archive that is the listed one still, was so while it was read.
    return _refused_version(files, where) or found


def is_changed(files: Ranges, location: bytes) -> bool:
    """Whether the archive of a member is there, and not the one that was listed."""
    where = parse(location)
    refused = None if where.kind == FAILED else _refused_version(files, where)
    return refused is not None and refused.code == "changed"


def archive_of(location: bytes) -> bytes:
    """The file that a member lies in."""
    return parse(location).archive


def _refused_version(files: Ranges, where: Location) -> Failure | None:
    version = files.version(where.archive)
    if isinstance(version, Failure):
        return version
    if short(version) == where.version:
        return None
    return Failure("changed", f"its archive was written to after it was listed; {ANEW}")


def _read(files: Ranges, where: Location, limits: Limits) -> bytes | Failure:
    try:
        read: Callable[[Ranges, Location, Limits], bytes | Failure] = _module(where.kind).read
        return read(files, where, limits)
    except Refused as refused:
        return refused.failure
    except OSError as error:
        return Failure("io_error", f"{_shown(where.archive)}: {reason(error)}")
    except MemoryError:
        return Failure("oom", f"{_shown(where.archive)}: out of memory while reading")


def failure_of(location: bytes) -> Failure | None:
    """Why what is located so cannot be read, where its listing found that already."""
    return failure_in(parse(location)) if location.startswith(FAILED) else None


def stretch_of(location: bytes) -> Stretch | None:
    """Where a member lies that is read in passing through its archive; None: it is not."""
    where = parse(location)
    if where.kind not in _IN_PASSING:
        return None
    span_of: Callable[[Location], tuple[int, int]] = _module(where.kind).span_of
    return Stretch(b"%s:%s" % (where.version, where.archive), *span_of(where))


def row_of(location: bytes) -> bytes | None:
    """`file/row`, which no other image is named; None: it lies in no Parquet file."""
    if not location.startswith(ROW):
        return None
    from batchclf.images.archives import parquet

    return parquet.row_of(parse(location))


def _module(kind: bytes) -> ModuleType:
    return import_module(f"{__name__}.{MODULES[kind]}")


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
