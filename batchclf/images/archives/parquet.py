"""Parquet files with an image in each row, as Hugging Face datasets, Spark and Ray write them.

A location is a row of a file, counted from 0, and the column with its image. Rows are read one by
one from the beginning of their row group on (passage.py), since only a row that was read tells how
large it is: a value that many rows have is counted once by the file. What is in memory at least is
a page, compressed and inflated: 1 MB, unless its writer took all rows of a row group for one.
"""

import difflib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from types import ModuleType
from typing import Any, BinaryIO

from batchclf.errors import UsageError
from batchclf.images.archives.location import File, Location, failed, fields_of, located
from batchclf.images.archives.members import Ranges, Rows, too_large
from batchclf.images.archives.passage import Chunk, Refused, cursor_at, required
from batchclf.images.formats import looks_like_image
from batchclf.results.records import Entry, Failure

KIND = b"row"
CHUNK_BYTES = 2**22
"""Rows are passed on together when they have so many bytes."""
MAX_CHUNK_ROWS = 256
LIST_ROWS = 16_384
LIST_BYTES = 2**24
"""Of names and labels at once, if each were as long as all those of a row group together."""
MAX_TEXT_BYTES = 4096
"""Of a name or a label; a longer one is none."""
BUFFER_BYTES = 2**20
"""Of what is read of a file at once; 0: a whole column of a row group."""
MAX_WHOLE_BYTES = 2**26
"""A smaller column of a row group is read as a whole: then no room is made for what a damaged page
says it has, up to 2 GB."""
MAX_NAMED = 20
"""Columns that a message lists."""
TRUTH_COLUMNS = ("label", "cls", "class", "target")


class Unreadable(Exception):
    """A file is no Parquet file, or a damaged one; the message says how."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Those that are read of each row."""

    image: str
    path: str | None
    """What names the row: a column, or the image's own `path`; None: nothing does."""
    truth: str | None


# ---- what pyarrow gives --------------------------------------------------------------------------


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet, which take a fifth of a second to import."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            "input: Parquet files need pyarrow: pip install 'batchclf[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _damage() -> Iterator[None]:
    """What pyarrow raises for a damaged file, as one error.

    Raises:
        Unreadable: it is damaged.
        OSError: the disk fails.
    """
    pyarrow, _ = _pyarrow()
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise Unreadable(_short(error)) from error
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise Unreadable(_short(error)) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _opened(file: BinaryIO, metadata: Any = None, buffer_bytes: int = BUFFER_BYTES) -> Any:
    _, parquet = _pyarrow()
    with _damage():
        return parquet.ParquetFile(
            file, metadata=metadata, buffer_size=buffer_bytes, pre_buffer=False
        )


def _batches(
    file: Any, columns: Sequence[str], num_rows: int, group: int | None = None
) -> Iterator[Any]:
    """Record batches of some columns.

    Raises:
        Unreadable, OSError: as `_damage`.
    """
    groups = None if group is None else [group]
    with _damage():
        batches = file.iter_batches(
            num_rows, row_groups=groups, columns=list(columns), use_threads=False
        )
    while True:
        with _damage():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


# ---- listing -------------------------------------------------------------------------------------


class RowLister:
    """Lists the rows of files; the first one that can be read settles in which column they are."""

    def __init__(self, files: Ranges, rows: Rows) -> None:
        self._files = files
        self._rows = rows
        self._column = rows.column

    def entries(self, file: File, opened: BinaryIO) -> Iterator[Entry]:
        """The rows of one file.

        Raises:
            UsageError: the job names no column that is there, or could mean several.
            OSError: the disk fails.
        """
        try:
            with _damage():
                columns = self._columns(_opened(opened), file.path)
                yield from _rows(_opened(opened, buffer_bytes=0), columns, file)
        except (Unreadable, MemoryError) as error:
            failure = Failure("damaged_archive", f"no Parquet file, or a damaged one: {error}")
            yield Entry(file.path, located(failed(failure), file))

    def _columns(self, file: Any, path: bytes) -> Columns:
        schema = file.schema_arrow
        where = f"input: {path.decode(errors='backslashreplace')}"
        is_first = self._column is None or self._column == self._rows.column
        if self._column is None:
            self._column = _the_only_candidate(file, where)
        if self._column not in schema.names:
            if not is_first:
                raise Unreadable(f"it has no column {self._column!r}, which other files have")
            raise UsageError(_no_column(where, self._column, schema.names))
        _require_images(schema.field(self._column), where)
        if self._rows.id is not None and self._rows.id not in schema.names:
            raise UsageError(_no_column(where, self._rows.id, schema.names))
        if self._rows.id is not None:
            _require_names(schema.field(self._rows.id), where)
        return _columns_of(schema, self._column, self._rows.id)


def _columns_of(schema: Any, column: str, id_: str | None) -> Columns:
    pyarrow, _ = _pyarrow()
    type_ = schema.field(column).type
    is_struct = pyarrow.types.is_struct(type_)
    fields = [field.name for field in type_] if is_struct else []
    path = id_ or (f"{column}.path" if "path" in fields else None)
    labels = [
        field.name for field in schema if field.name in TRUTH_COLUMNS and _can_be_label(field.type)
    ]
    return Columns(column, path, labels[0] if len(labels) == 1 else None)


def _the_only_candidate(file: Any, where: str) -> str:
    """The one column that holds images.

    Raises:
        UsageError: there is none, or there are several.
    """
    schema = file.schema_arrow
    found = [field.name for field in schema if _can_hold_images(field)]
    if len(found) > 1:
        found = [name for name in found if _begins_with_image(file, schema.field(name))]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise UsageError(
            f"{where}: several columns hold images: {_named(found)}; "
            "choose one: input: {parquet: ..., column: NAME}"
        )
    tensors = [field.name for field in schema if _is_tensor(field)]
    if tensors:
        _require_images(schema.field(tensors[0]), where)
    raise UsageError(
        f"{where}: no column holds images (encoded, as bytes, or as a struct of bytes and path); "
        f"found {_named([f'{field.name} ({field.type})' for field in schema])}"
    )


def _begins_with_image(file: Any, field: Any) -> bool:
    """Whether the first value of a column that is not null looks like an image."""
    name = f"{field.name}.bytes" if _is_struct(field) else field.name
    for batch in _batches(file, [name], 1):
        value = batch.column(0)[0].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is not None:
            return looks_like_image(content[:1024])
    return False


def _require_images(field: Any, where: str) -> None:
    """Refuse a column that cannot hold encoded images.

    Raises:
        UsageError: saying what it holds.
    """
    if _can_hold_images(field):
        return
    what = "pixels, not encoded images" if _is_tensor(field) else f"{field.type}, not bytes"
    raise UsageError(
        f"{where}: the column {field.name!r} holds {what}; write the bytes of the image files, "
        "such as JPEG, or a struct of bytes and path"
    )


def _require_names(field: Any, where: str) -> None:
    """Refuse a column whose values cannot be paths of records.

    Raises:
        UsageError: saying what it holds.
    """
    if not (_can_be_label(field.type) or _is_binary(_plain(field.type))):
        raise UsageError(
            f"{where}: the column {field.name!r} (id) holds {field.type}, neither text nor whole "
            "numbers; name another one, or none: rows are then named for their file and number"
        )


def _no_column(where: str, name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}: there is no column {name!r}{hint} (found: {_named(names)})"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _can_hold_images(field: Any) -> bool:
    if _is_tensor(field):
        return False
    if _is_struct(field):
        return any(child.name == "bytes" and _is_binary(child.type) for child in field.type)
    return _is_binary(field.type)


def _is_struct(field: Any) -> bool:
    pyarrow, _ = _pyarrow()
    return bool(pyarrow.types.is_struct(field.type))


def _is_tensor(field: Any) -> bool:
    """Whether a column is of arrays, as Ray and NumPy users write them."""
    pyarrow, _ = _pyarrow()
    types, type_ = pyarrow.types, field.type
    is_extension = b"ARROW:extension:name" in (field.metadata or {})
    is_extension = is_extension or isinstance(type_, pyarrow.BaseExtensionType)
    if types.is_struct(type_):
        return {child.name for child in type_} >= {"data", "shape"}
    return (
        is_extension
        or types.is_list(type_)
        or types.is_large_list(type_)
        or (types.is_fixed_size_list(type_))
    )


def _is_binary(type_: Any) -> bool:
    pyarrow, _ = _pyarrow()
    types = pyarrow.types
    return bool(
        types.is_binary(type_)
        or types.is_large_binary(type_)
        or types.is_binary_view(type_)
        or types.is_fixed_size_binary(type_)
    )


def _is_text(type_: Any) -> bool:
    pyarrow, _ = _pyarrow()
    types = pyarrow.types
    return bool(
        types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    )


def _can_be_label(type_: Any) -> bool:
    pyarrow, _ = _pyarrow()
    return bool(pyarrow.types.is_integer(_plain(type_))) or _is_text(_plain(type_))


def _plain(type_: Any) -> Any:
    """The type of the values of a category of pandas; else the type itself."""
    pyarrow, _ = _pyarrow()
    return type_.value_type if pyarrow.types.is_dictionary(type_) else type_


def _rows(opened: Any, columns: Columns, file: File) -> Iterator[Entry]:
    """The rows of a file, of which only the names and the labels are read."""
    wanted = [name for name in (columns.path, columns.truth) if name is not None]
    groups = range(opened.metadata.num_row_groups)
    num_rows = sum(opened.metadata.row_group(group).num_rows for group in groups)
    # The path too, where it is not that of the place: rows without a name are named for it.
    same = (columns.image.encode(), *([file.path] if file.path != file.place else []))
    _require_sound_counts(opened.metadata, columns.image)
    row = 0
    if wanted:
        largest = max(map(partial(_num_bytes, opened.metadata, wanted), groups), default=0)
        at_once = min(LIST_ROWS, max(1, LIST_BYTES // max(1, largest)))
        for batch in _batches(opened, wanted, at_once):
            names = _texts(batch, columns.path)
            labels = _texts(batch, columns.truth)
            for name, label in zip(names, labels, strict=True):
                fields = fields_of(KIND, row, *same)
                yield Entry(name or b"%s/%d" % (file.path, row), located(fields, file, label))
                row += 1
    for number in range(row, num_rows):
        fields = fields_of(KIND, number, *same)
        yield Entry(b"%s/%d" % (file.path, number), located(fields, file))


def _require_sound_counts(metadata: Any, image: str) -> None:
    """Refuse a footer that contradicts itself: its number of rows is the number of records.

    Raises:
        Unreadable: it does.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            is_image = column.path_in_schema in (image, f"{image}.bytes")
            if is_image and column.num_values != group.num_rows:
                raise Unreadable(
                    f"row group {number} would have {group.num_rows:,} rows, but "
                    f"{column.num_values:,} images"
                )


def _texts(batch: Any, name: str | None) -> list[bytes]:
    """The names or the labels in a column, or in the `path` of one; empty: there is none."""
    pyarrow, _ = _pyarrow()
    types = pyarrow.types
    if name is None:
        return [b""] * int(batch.num_rows)
    is_inner = name not in batch.schema.names
    column = batch.column(name.removesuffix(".path") if is_inner else name)
    if is_inner:
        (column,) = column.flatten()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):  # which need not be UTF-8, whatever the file says
        column = column.cast(pyarrow.large_binary())
    return list(map(_bytes, column.to_pylist()))


def _bytes(value: object) -> bytes:
    """A name or a label; empty: it is none."""
    if isinstance(value, bytes):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        text = b"%d" % value
    else:
        text = b""
    return b"" if b"\0" in text or len(text) > MAX_TEXT_BYTES else text


def row_of(location: Location) -> bytes:
    """`file/row`, which no other image is named."""
    row, _, *path = location.fields
    return b"%s/%s" % (path[0] if path else location.archive, row)


# ---- reading -------------------------------------------------------------------------------------

_Value = bytes | Failure


class _Images:
    """The images of a file, from a row group on."""

    def __init__(self, files: Ranges, path: bytes, column: str) -> None:
        """
        Raises:
            Refused: it cannot be opened, or is damaged, or another one than when it was listed.
            OSError: the disk fails.
        """
        self._open = partial(files.open, path)
        with required(self._open()) as file, _required_intact():
            opened = _opened(file)
            self._metadata = opened.metadata
            self._columns = _leaves(opened.schema_arrow, column)
            groups = range(self._metadata.num_row_groups)
            self._counts = [self._metadata.row_group(group).num_rows for group in groups]
            sizes = map(partial(_num_bytes, self._metadata, self._columns), groups)
            largest = max(sizes, default=0)
            self._buffer_bytes = BUFFER_BYTES if largest > MAX_WHOLE_BYTES else 0
        self._starts = [0, *accumulate(self._counts)]

    def start_for(self, unit: int) -> int:
        """The first row of a row's group."""
        return int(self._starts[max(0, bisect_right(self._starts, unit) - 1)])

    def begin(self, start: int) -> Iterator[Chunk[list[Any]]]:
        """As `Passage`: Arrow arrays of one row."""
        with required(self._open()) as file, _required_intact():
            opened = _opened(file, self._metadata, self._buffer_bytes)
            for group in range(bisect_right(self._starts, start) - 1, len(self._counts)):
                yield from self._group(opened, group)

    def _group(self, file: Any, group: int) -> Iterator[Chunk[list[Any]]]:
        """One row group; where it is damaged, the rows before are had."""
        num_rows, at, why = self._counts[group], 0, "it ends too soon"
        rows: list[Any] = []
        num_bytes = 0
        try:
            for batch in islice(_batches(file, self._columns, 1, group), num_rows):
                rows.append(batch.column(0))
                num_bytes += batch.nbytes
                if num_bytes >= CHUNK_BYTES or len(rows) == MAX_CHUNK_ROWS:
                    at += len(rows)
                    yield Chunk(len(rows), rows, num_bytes)
                    rows, num_bytes = [], 0
        except Unreadable as error:
            why = str(error)
        if rows:
            at += len(rows)
            yield Chunk(len(rows), rows, num_bytes)
        if at < num_rows:
            failure = Failure("corrupt", f"damaged in its Parquet file: {why}")
            yield Chunk(num_rows - at, failure, 0)


def _num_bytes(metadata: Any, names: Sequence[str], group: int) -> int:
    """What some columns of a row group take, inflated."""
    found = metadata.row_group(group)
    columns = map(found.column, range(found.num_columns))
    return sum(
        max(one.total_uncompressed_size, one.total_compressed_size)
        for one in columns
        if one.path_in_schema in names
    )


def _leaves(schema: Any, column: str) -> list[str]:
    """The columns, as Parquet has them, of an image's bytes and path.

    Raises:
        Unreadable: they are not there.
    """
    if column not in schema.names or not _can_hold_images(schema.field(column)):
        raise Unreadable(f"it has no images in a column {column!r}")
    field = schema.field(column)
    inner = [child.name for child in field.type] if _is_struct(field) else []
    return [f"{column}.{name}" for name in ("bytes", "path") if name in inner] or [column]


@contextmanager
def _required_intact() -> Iterator[None]:
    try:
        with _damage():
            yield
    except Unreadable as error:
        raise Refused(Failure("corrupt", f"its Parquet file is damaged: {error}")) from error


def read(files: Ranges, location: Location, max_bytes: int) -> bytes | Failure:
    """The image in a row, or why it cannot be read; nothing, where the row holds none.

    Raises:
        OSError, Refused: the disk fails, or the file cannot be opened or read at all.
    """
    number, column_ = location.fields[:2]
    row, column = int(number), column_.decode()
    cursor = cursor_at(
        (files, location.archive, location.version, column),
        lambda: _Images(files, location.archive, column),
    )
    found = cursor.read(row, row + 1)
    if not found:
        return Failure("changed", "its Parquet file has fewer rows than it had when listed")
    at, chunk = found[0]
    if isinstance(chunk.payload, Failure):
        return chunk.payload
    (value,) = chunk.payload[row - at]
    names = [field.name for field in value.type] if _is_struct(value) else []
    content = value["bytes"] if names else value
    if content.is_valid:
        return too_large(content.as_buffer().size, max_bytes) or bytes(content.as_py())
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
