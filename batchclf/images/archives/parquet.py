"""Parquet files with an image in each row, as Hugging Face datasets, Spark and Ray write them.

A location is a row of a file, counted from 0, and the column with its image. Rows are read from the
beginning of their row group on (passage.py), some at once as far as that takes little memory: only
a row that was read tells how large it is, and a value that many rows have is counted once by the
file. What is in memory at least is a page, compressed and inflated: 1 MB, unless its writer took
all rows of a row group for one.

Which rows there are, parquet_list.py finds; both see the files through parquet_file.py.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

from batchclf.images.archives.location import Location
from batchclf.images.archives.members import Limits, Ranges, too_large
from batchclf.images.archives.parquet_file import (
    BUFFER_BYTES,
    Unreadable,
    batches,
    can_hold_images,
    is_struct,
    num_bytes_of,
    open_parquet,
    reading,
    shared_bytes_of,
)
from batchclf.images.archives.passage import (
    BEHIND_ALL,
    Chunk,
    Refused,
    cursor_at,
    required,
)
from batchclf.results.records import Failure
from batchclf.system.alive import Place

KIND = b"row"
KEPT_BYTES = 2**21
MAX_ROWS = 16
"""Read at once, and"""
MANY_BYTES = 2**20
"""of so many together, by what is usual in their row group."""
MAX_SHARED_BYTES = 2**25
"""What as many copies of all that rows may share would take. A dictionary may hold most rows of its
group, each of them once: which, is seen only when they are read, and then it goes on by ones."""
MAX_WHOLE_BYTES = 2**24
"""A smaller column of a row group is read as a whole: then no room is made for what a damaged page
says it has, up to 2 GB."""


def row_of(location: Location) -> bytes:
    """`file/row`, which no other image is named."""
    row, _, *path = location.fields
    return b"%s/%s" % (path[0] if path else location.archive, row)


class _Images:
    """The images of a file, from a row group on."""

    kept_bytes = KEPT_BYTES

    def __init__(self, files: Ranges, path: bytes, column: str, *, one_by_one: bool) -> None:
        """
        Raises:
            Refused: it cannot be opened, or is damaged, or another one than when it was listed.
            OSError: the disk fails.
        """
        self._open = partial(files.open, path)
        with required(self._open()) as file, _required_intact():
            opened = open_parquet(file)
            self._metadata = opened.metadata
            self._columns = _leaves(opened.schema_arrow, column)
            groups = range(self._metadata.num_row_groups)
            self._counts = [self._metadata.row_group(group).num_rows for group in groups]
            sizes = map(partial(num_bytes_of, self._metadata, self._columns), groups)
            self._sizes = list(sizes)
            shared = map(partial(shared_bytes_of, self._metadata, self._columns), groups)
            self._shared = [MAX_SHARED_BYTES] * len(groups) if one_by_one else list(shared)
            largest = max(self._sizes, default=0)
            self._buffer_bytes = BUFFER_BYTES if largest > MAX_WHOLE_BYTES else 0
        self._starts: list[int] = [0, *accumulate(self._counts)]

    def span_of(self, unit: int) -> Place:
        """The first row of a row's group, and that of the next one."""
        group = bisect_right(self._starts, unit)
        stop = self._starts[group] if group < len(self._starts) else BEHIND_ALL
        return Place(self._starts[max(0, group - 1)], stop)

    def size_of(self, unit: int) -> int:
        """As `Passage`: what a row of its group takes on average."""
        group = bisect_right(self._starts, unit) - 1
        return self._sizes[group] // self._counts[group] if group < len(self._counts) else 0

    def begin(self, start: int) -> Iterator[Chunk[Any]]:
        """As `Passage`: Arrow arrays of some rows."""
        with required(self._open()) as file, _required_intact():
            opened = open_parquet(file, self._metadata, self._buffer_bytes)
            for group in range(bisect_right(self._starts, start) - 1, len(self._counts)):
                yield from self._group(opened, group)

    def _group(self, file: Any, group: int) -> Iterator[Chunk[Any]]:
        """One row group; where it is damaged, the rows before are had."""
        num_rows, at, why = self._counts[group], 0, "it ends too soon"
        size = self.size_of(self._starts[group])
        at_once = min(rows_at_once(size), MAX_SHARED_BYTES // max(1, self._shared[group]))
        for number in (at_once, 1) if at_once > 1 else (1,):
            if at == num_rows:
                break
            try:
                for chunk in self._chunks(file, group, number, at):
                    yield chunk
                    at += chunk.num_units
                    if chunk.num_bytes > 4 * MANY_BYTES and number > 1:
                        break  # they share what is large
                else:
                    break
            except Unreadable as error:
                why = str(error)
            except MemoryError:
                if number == 1:
                    raise
        if at < num_rows:
            failure = Failure("corrupt", f"damaged in its Parquet file: {why}")
            yield Chunk(num_rows - at, failure, 0)

    def _chunks(self, file: Any, group: int, number: int, start: int) -> Iterator[Chunk[Any]]:
        """The rows of a group from `start` on, of which so many are read at once.

        Raises:
            Unreadable, OSError, MemoryError: the next ones cannot be read.
        """
        at, num_rows = 0, self._counts[group]
        reader = batches(file, self._columns, number, group)
        with closing(reader):
            for batch in reader:
                rows = batch.slice(max(0, start - at), num_rows - at)
                at += batch.num_rows
                if at >= num_rows:
                    break
                if rows.num_rows:
                    yield Chunk(rows.num_rows, rows.column(0), rows.nbytes)
            else:
                return
        # What read the group is closed before its last rows are handed out: they may wait long.
        yield Chunk(rows.num_rows, rows.column(0), rows.nbytes)


def rows_at_once(size: int) -> int:
    """How many rows of such a usual size, in bytes, are read at once."""
    return max(1, min(MAX_ROWS, MANY_BYTES // max(1, size)))


def _leaves(schema: Any, column: str) -> list[str]:
    """The columns, as Parquet has them, of an image's bytes and path.

    Raises:
        Unreadable: they are not there.
    """
    if column not in schema.names or not can_hold_images(schema.field(column)):
        raise Unreadable(f"it has no images in a column {column!r}")
    field = schema.field(column)
    inner = [child.name for child in field.type] if is_struct(field) else []
    return [f"{column}.{name}" for name in ("bytes", "path") if name in inner] or [column]


@contextmanager
def _required_intact() -> Iterator[None]:
    try:
        with reading():
            yield
    except Unreadable as error:
        raise Refused(Failure("corrupt", f"its Parquet file is damaged: {error}")) from error


def span_of(location: Location) -> tuple[int, int]:
    """Its row, and the next one."""
    row = int(location.fields[0])
    return row, row + 1


def read(files: Ranges, location: Location, limits: Limits) -> bytes | Failure:
    """The image in a row, or why it cannot be read; nothing, where the row holds none.

    Raises:
        OSError, Refused: the disk fails, or the file cannot be opened or read at all.
    """
    number, column_ = location.fields[:2]
    row, column = int(number), column_.decode()
    one_by_one = limits.pace != "many"
    cursor = cursor_at(
        (files, location.archive, location.version, column, one_by_one),
        lambda: _Images(files, location.archive, column, one_by_one=one_by_one),
    )
    size = cursor.size_of(row)
    limits.claim(size)
    found = cursor.read(row, row + 1)
    if limits.pace == "tried":
        for other in range(row + 1, row + rows_at_once(size)):
            cursor.read(other, other + 1)
    if not found:
        return Failure("changed", "its Parquet file has fewer rows than it had when listed")
    ((at, chunk),) = found
    if isinstance(chunk.payload, Failure):
        return chunk.payload
    value = chunk.payload[row - at]
    names = [field.name for field in value.type] if is_struct(value) else []
    content = value["bytes"] if names else value
    if content.is_valid:
        if refused := too_large(content.as_buffer().size, limits.max_bytes):
            return refused
        return bytes(content.as_py())
    return _without_bytes(value["path"]) if "path" in names else b""


def _without_bytes(path: Any) -> bytes | Failure:
    """Of a row that has none; `path`: what it names instead, as Arrow has it."""
    if not path.is_valid:
        return b""
    shown = path.as_buffer().to_pybytes()[:200].decode(errors="backslashreplace")
    return Failure(
        "not_found",
        f"the row only names {shown!r}, its bytes are not in the Parquet file; embed them, or "
        "give the folder of the image files as input",
    )
