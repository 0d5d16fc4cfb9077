"""Tables of true labels: CSV and TSV, with a header or two columns, and JSON Lines."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import orjson

from batchclf.errors import UsageError
from batchclf.scoring.classes import Name
from batchclf.system.paths import refusal

PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path"),
    *("image", "image_path", "image_name", "image_file", "img"),
)
LABELS = ("label", "class", "class_name", "category", "target", "truth", "cls", "wnid", "synset")
INDICES = ("index", "class_index", "class_id", "class_idx", "label_index", "label_id")
"""Columns that are understood, whatever their case; the first that is there is taken."""
_FORMS = (
    "a header with `path` and `label` (or `index`), or two columns without a header: path and label"
)


class Row(NamedTuple):
    """One image of a table."""

    path: bytes
    name: Name


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where path and label stand in a row."""

    path: int
    label: int
    is_index: bool
    told: str


def read_table(path: Path) -> tuple[Iterator[Row], str]:
    """The rows of a table, read as they are asked for, and which columns they are of.

    Raises:
        UsageError: it is no such table; also while it is iterated, naming the line.
        EnvironmentFailed: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_rows(path), "a table"
    if suffix not in (".csv", ".tsv"):
        raise UsageError(
            f"truth: {path}: what it is, its suffix does not tell; give a .csv, .tsv or .jsonl file"
        )
    rows = _csv_rows(path)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"truth: {path}: is empty; give {_FORMS}")
    columns = _columns_of(first[1])
    if columns is not None:
        return _named(path, rows, columns), columns.told
    if len(first[1]) != 2:
        raise UsageError(
            f"truth: {path}: found {len(first[1])} columns, {', '.join(first[1])[:200]}; "
            f"give {_FORMS}"
        )
    columns = _Columns(0, 1, False, "two columns without a header")
    return _named(path, chain([first], rows), columns), columns.told


def _columns_of(header: Sequence[str]) -> _Columns | None:
    """The columns that a header names; None: it is none."""
    names = [cell.strip().casefold().replace(" ", "_").replace("-", "_") for cell in header]
    path = next((one for one in PATHS if one in names), None)
    label = next((one for one in (*LABELS, *INDICES) if one in names), None)
    if path is None or label is None:
        return None
    told = f"columns `{path}` and `{label}`"
    return _Columns(names.index(path), names.index(label), label in INDICES, told)


def _named(path: Path, rows: Iterator[tuple[int, list[str]]], columns: _Columns) -> Iterator[Row]:
    known: dict[str, Name] = {}
    for number, cells in rows:
        try:
            image, label = cells[columns.path], cells[columns.label]
        except IndexError:
            raise UsageError(
                f"truth: {path}:{number}: found {len(cells)} cells, and no path and label in them"
            ) from None
        if label not in known:
            known[label] = Name(label.strip(), columns.is_index)
        yield Row(_path(image), known[label])


def _path(text: str) -> bytes:
    return os.fsencode(text.removeprefix("./"))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(path, file), strict=True)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(f"truth: {path}:{reader.line_num}: is no CSV: {error}") from error
    except OSError as error:
        raise refusal("truth", path, error) from error


def _delimiter(path: Path, file: TextIO) -> str:
    """What separates the cells of the first line: a tab, a comma or a semicolon."""
    first = file.readline(65_536)
    file.seek(0)
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",\t;", key=first.count)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(line, f"truth: {path}:{number}")
    except OSError as error:
        raise refusal("truth", path, error) from error


def _json_row(line: bytes, where: str) -> Row:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{where}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: is no JSON object; give one a line, with `path` and `label`")
    image, label = _first_of(found, PATHS), _first_of(found, (*LABELS, *INDICES))
    if not isinstance(image, str) or isinstance(label, bool) or not isinstance(label, str | int):
        raise UsageError(
            f"{where}: found the keys {', '.join(found)[:200]}; give `path`, and `label` or `index`"
        )
    return Row(_path(image), Name(str(label).strip(), isinstance(label, int)))


def _first_of(found: Mapping[str, Any], keys: Sequence[str]) -> object:
    return next((found[key] for key in keys if key in found), None)
