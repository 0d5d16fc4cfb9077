"""The rows of Parquet files, listed: in which column their images are, their names and labels."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from batchclf.errors import UsageError
from batchclf.images.archives.location import File, failed, fields_of, located
from batchclf.images.archives.members import Ranges, Rows
from batchclf.images.archives.parquet import KIND
from batchclf.images.archives.parquet_file import (
    Unreadable,
    batches,
    can_be_label,
    can_hold_images,
    is_binary,
    is_struct,
    is_tensor,
    num_bytes_of,
    open_parquet,
    plain,
    reading,
    values_of,
)
from batchclf.images.formats import looks_like_image
from batchclf.results.records import Entry, Failure

LIST_ROWS = 16_384
LIST_BYTES = 2**24
"""Of names and labels at once, if each were as long as all those of a row group together."""
MAX_TEXT_BYTES = 4096
"""Of a name or a label; a longer one is none."""
MAX_NAMED = 20
"""Columns that a message lists."""
TRUTH_COLUMNS = ("label", "cls", "class", "target")


@dataclass(frozen=True, slots=True)
class Columns:
    """Those that are read of each row."""

    image: str
    path: str | None
    """What names the row: a column, or the image's own `path`; None: nothing does."""
    truth: str | None


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
            with reading():
                columns = self._columns(open_parquet(opened), file.path)
                yield from _rows(open_parquet(opened, buffer_bytes=0), columns, file)
        except Unreadable as error:
            yield _failed(file, "damaged_archive", f"no Parquet file, or a damaged one: {error}")
        except MemoryError as error:
            yield _failed(file, "oom", f"out of memory while its rows are listed: {error}")

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


def _failed(file: File, code: str, message: str) -> Entry:
    return Entry(file.path, located(failed(Failure(code, message)), file))


def _columns_of(schema: Any, column: str, id_: str | None) -> Columns:
    image = schema.field(column)
    fields = [field.name for field in image.type] if is_struct(image) else []
    path = id_ or (f"{column}.path" if "path" in fields else None)
    labels = [
        field.name for field in schema if field.name in TRUTH_COLUMNS and can_be_label(field.type)
    ]
    return Columns(column, path, labels[0] if len(labels) == 1 else None)


def _the_only_candidate(file: Any, where: str) -> str:
    """The one column that holds images.

    Raises:
        UsageError: there is none, or there are several.
    """
    schema = file.schema_arrow
    found = [field.name for field in schema if can_hold_images(field)]
    if len(found) > 1:
        found = [name for name in found if _begins_with_image(file, schema.field(name))]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise UsageError(
            f"{where}: several columns hold images: {_named(found)}; "
            "choose one: input: {parquet: ..., column: NAME}"
        )
    tensors = [field.name for field in schema if is_tensor(field)]
    if tensors:
        _require_images(schema.field(tensors[0]), where)
    raise UsageError(
        f"{where}: no column holds images (encoded, as bytes, or as a struct of bytes and path); "
        f"found {_named([f'{field.name} ({field.type})' for field in schema])}"
    )


def _begins_with_image(file: Any, field: Any) -> bool:
    """Whether the first value of a column that is not null looks like an image."""
    name = f"{field.name}.bytes" if is_struct(field) else field.name
    for batch in batches(file, [name], 1):
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
    if can_hold_images(field):
        return
    what = "pixels, not encoded images" if is_tensor(field) else f"{field.type}, not bytes"
    raise UsageError(
        f"{where}: the column {field.name!r} holds {what}; write the bytes of the image files, "
        "such as JPEG, or a struct of bytes and path"
    )


def _require_names(field: Any, where: str) -> None:
    """Refuse a column whose values cannot be paths of records.

    Raises:
        UsageError: saying what it holds.
    """
    if not (can_be_label(field.type) or is_binary(plain(field.type))):
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
        largest = max(map(partial(num_bytes_of, opened.metadata, wanted), groups), default=0)
        at_once = min(LIST_ROWS, max(1, LIST_BYTES // max(1, largest)))
        for batch in batches(opened, wanted, at_once):
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
    if name is None:
        return [b""] * int(batch.num_rows)
    return list(map(_bytes, values_of(batch, name)))


def _bytes(value: object) -> bytes:
    """A name or a label; empty: it is none."""
    if isinstance(value, bytes):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        text = b"%d" % value
    else:
        text = b""
    return b"" if b"\0" in text or len(text) > MAX_TEXT_BYTES else text
