"""Records as CSV: a row for each image, the classes of its top k in columns.

A spreadsheet takes a cell that begins with one of =+-@ for a formula, which may run programs or
send data away, and names of images and labels are whatever others chose. Text that begins with one
of these (full-width ones and those behind blanks as well), with a tab, a line break or an
apostrophe, gets an apostrophe before it, so that it is text to a spreadsheet. No other text begins
with one: taking a leading apostrophe away gives back what was there. All text stands in quotes, so
that no separator in it begins another cell.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from batchclf.commands.convert.rows import outcome_of

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20'")
CACHED = 16_384
"""Texts, as they stand in cells."""
_BLANKS = ("\t", "\r", "\n")


def write_csv(path: Path, lines: Iterable[dict[str, Any]], top_k: int) -> None:
    """Write records as CSV, UTF-8, with a header.

    Raises:
        OSError: disk full, I/O error.
    """
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(",".join(map(_cell, _header(top_k))) + "\n")
        for line in lines:
            file.write(",".join(map(_cell, _row(line, top_k))) + "\n")


def _header(top_k: int) -> list[str]:
    ranked = (f"{name}_{n}" for n in range(1, top_k + 1) for name in ("label", "index", "score"))
    return ["path", "path_b64", "status", *ranked, "error_code", "error_message", "warnings"]


def _row(line: dict[str, Any], top_k: int) -> Iterator[str | int | float | None]:
    found, predictions = outcome_of(line), line.get("predictions", ())
    yield from (found.path, found.path_b64, found.status)
    for one in predictions:
        yield from (one["label"], one["index"], one["score"])
    yield from [None] * (3 * (top_k - len(predictions)))
    yield from (found.error_code, found.error_message, " ".join(found.warnings) or None)


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return _quoted(value) if isinstance(value, str) else repr(value)


@lru_cache(CACHED)  # labels, above all
def _quoted(text: str) -> str:
    return '"' + harmless(text).replace('"', '""') + '"'


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula, as the top of this file says."""
    is_harmful = text.startswith(_BLANKS) or text.lstrip().startswith(_FORMULA)
    return f"'{text}" if is_harmful else text
