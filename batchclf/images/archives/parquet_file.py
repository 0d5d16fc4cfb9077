"""What pyarrow gives of a Parquet file, and what it raises for a damaged one."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO

from batchclf.errors import UsageError

BUFFER_BYTES = 2**20
"""Of what is read of a file at once; 0: a whole column of a row group."""

_PLAIN = frozenset(("PLAIN", "RLE", "BIT_PACKED"))
_DICTIONARY = frozenset(("PLAIN_DICTIONARY", "RLE_DICTIONARY"))


class Unreadable(Exception):
    """A file is no Parquet file, or a damaged one; the message says how."""


def arrow() -> tuple[ModuleType, ModuleType]:
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
def reading() -> Iterator[None]:
    """What pyarrow raises for a damaged file, as one error.

    Raises:
        Unreadable: it is damaged.
        OSError: the disk fails.
    """
    pyarrow, _ = arrow()
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


def open_parquet(file: BinaryIO, metadata: Any = None, buffer_bytes: int = BUFFER_BYTES) -> Any:
    """A `pyarrow.parquet.ParquetFile`; `metadata`: its footer, which is not read again then.

    Raises:
        Unreadable, OSError: as `reading`.
    """
    _, parquet = arrow()
    with reading():
        return parquet.ParquetFile(
            file, metadata=metadata, buffer_size=buffer_bytes, pre_buffer=False
        )


def batches(
    file: Any, columns: Sequence[str], num_rows: int, group: int | None = None
) -> Generator[Any, None, None]:
    """Record batches of some columns.

    Raises:
        Unreadable, OSError: as `reading`.
    """
    groups = None if group is None else [group]
    with reading():  # what whoever takes a batch raises is not raised here
        yield from file.iter_batches(
            num_rows, row_groups=groups, columns=list(columns), use_threads=False
        )


def num_bytes_of(metadata: Any, names: Sequence[str], group: int) -> int:
    """What some columns of a row group take, inflated."""
    found = metadata.row_group(group)
    columns = map(found.column, range(found.num_columns))
    return sum(
        max(one.total_uncompressed_size, one.total_compressed_size)
        for one in columns
        if one.path_in_schema in names
    )


def shared_bytes_of(metadata: Any, names: Sequence[str], group: int) -> int:
    """At most so much of them is there once for many rows, inflated: a dictionary, common prefixes.

    Where a column hardly deflates, nor does its dictionary, whose place and end its footer tells.
    """
    found = metadata.row_group(group)
    return sum(
        _shared_bytes(one)
        for one in map(found.column, range(found.num_columns))
        if one.path_in_schema in names
    )


def _shared_bytes(column: Any) -> int:
    encodings = set(column.encodings)
    if encodings <= _PLAIN:
        return 0
    packed, size = column.total_compressed_size, column.total_uncompressed_size
    if encodings <= _PLAIN | _DICTIONARY and column.has_dictionary_page:
        dictionary = column.data_page_offset - column.dictionary_page_offset
        if 0 < dictionary <= packed:
            return int(dictionary + max(0, size - packed))
    return int(max(packed, size))


# ---- what a column holds -------------------------------------------------------------------------


def can_hold_images(field: Any) -> bool:
    """Whether a column is of bytes, or of structs with bytes."""
    if is_tensor(field):
        return False
    if is_struct(field):
        return any(child.name == "bytes" and is_binary(child.type) for child in field.type)
    return is_binary(field.type)


def is_struct(field: Any) -> bool:
    """Whether a column, or a value, is of structs."""
    pyarrow, _ = arrow()
    return bool(pyarrow.types.is_struct(field.type))


def is_tensor(field: Any) -> bool:
    """Whether a column is of arrays, as Ray and NumPy users write them."""
    pyarrow, _ = arrow()
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


def is_binary(type_: Any) -> bool:
    """Whether values are bytes."""
    pyarrow, _ = arrow()
    types = pyarrow.types
    return bool(
        types.is_binary(type_)
        or types.is_large_binary(type_)
        or types.is_binary_view(type_)
        or types.is_fixed_size_binary(type_)
    )


def _is_text(type_: Any) -> bool:
    pyarrow, _ = arrow()
    types = pyarrow.types
    return bool(
        types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    )


def can_be_label(type_: Any) -> bool:
    """Whether values are text or whole numbers, or categories of these."""
    pyarrow, _ = arrow()
    return bool(pyarrow.types.is_integer(plain(type_))) or _is_text(plain(type_))


def plain(type_: Any) -> Any:
    """The type of the values of a category of pandas; else the type itself."""
    pyarrow, _ = arrow()
    return type_.value_type if pyarrow.types.is_dictionary(type_) else type_


def values_of(batch: Any, name: str) -> list[Any]:
    """What a column of a record batch holds, or the `path` of one; text as bytes.

    Text need not be UTF-8, whatever the file says.
    """
    pyarrow, _ = arrow()
    is_inner = name not in batch.schema.names
    column = batch.column(name.removesuffix(".path") if is_inner else name)
    if is_inner:
        (column,) = column.flatten()
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pyarrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values
