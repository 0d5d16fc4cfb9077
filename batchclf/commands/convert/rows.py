"""A record's columns, which CSV and Parquet share."""

import base64
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a record says beside its predictions, as text that is UTF-8."""

    path: str
    path_b64: str | None
    status: str
    error_code: str | None
    error_message: str | None
    warnings: list[str]


def outcome_of(line: dict[str, Any]) -> Outcome:
    """The columns of a record; in a name that is not UTF-8, `\\xff` stands for the byte ff."""
    encoded, error = line.get("path_b64"), line.get("error") or {}
    path = line["path"]
    if encoded is not None:
        path = base64.b64decode(encoded).decode(errors="backslashreplace")
    return Outcome(
        path,
        encoded,
        line["status"],
        error.get("code"),
        error.get("message"),
        line.get("warnings", []),
    )
