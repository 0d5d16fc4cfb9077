"""Records as Parquet: a row for each image; labels, indices and scores of its top k as lists."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from batchclf.commands.convert.rows import outcome_of
from batchclf.errors import UsageError

GROUP_ROWS = 32_768
"""Rows of a row group: so many are in memory at once."""


def require_pyarrow() -> None:
    """Refuse to begin where Parquet cannot be written.

    Raises:
        UsageError: pyarrow is not installed.
    """
    _arrow()


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            "--to parquet needs pyarrow: pip install 'batchclf[parquet]'; --to csv does not"
        ) from None
    return pyarrow, pyarrow.parquet


def write_parquet(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write records as Parquet, a row group at a time.

    Raises:
        OSError: disk full, I/O error.
    """
    arrow, parquet = _arrow()
    text = arrow.string()
    schema = arrow.schema(
        {
            "path": text,
            "path_b64": text,
            "status": text,
            "error_code": text,
            "error_message": text,
            "warnings": arrow.list_(text),
            "labels": arrow.list_(text),
            "indices": arrow.list_(arrow.int32()),
            "scores": arrow.list_(arrow.float64()),
        }
    )
    rows = map(_row, lines)
    with path.open("wb") as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while some := list(islice(rows, GROUP_ROWS)):
            columns = zip(*some, strict=True)
            arrays = [
                arrow.array(values, kind)
                for values, kind in zip(columns, schema.types, strict=True)
            ]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


def _row(line: dict[str, Any]) -> Sequence[Any]:
    found = map(_utf8, outcome_of(line))
    predictions = line.get("predictions")
    if predictions is None:
        return (*found, None, None, None)
    return (
        *found,
        [_utf8(one["label"]) for one in predictions],
        [one["index"] for one in predictions],
        [one["score"] for one in predictions],
    )


def _utf8(value: Any) -> Any:
    """Text without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="backslashreplace").decode()
    return value
