"""List files: the paths that the lines of a .txt or .jsonl file name."""

import base64
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import orjson

from batchclf.errors import UsageError
from batchclf.system.paths import refusal

MAX_LINE_BYTES = 65536
"""Of a list: a path of 4,096 bytes, each escaped as JSON has it, and other keys beside it."""


def read_list(spec: Path) -> Iterator[bytes]:
    """The paths in a list, line by line, as often as they stand there.

    Raises:
        UsageError: a line holds no path.
        EnvironmentFailed: the list cannot be read.
    """
    is_jsonl = spec.suffix.lower() == ".jsonl"
    for number, raw in enumerate(_lines(spec), start=1):
        if len(raw) > MAX_LINE_BYTES:
            raise UsageError(
                f"input: {spec}:{number}: longer than {MAX_LINE_BYTES:,} bytes; "
                "a list has one path a line"
            )
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        line = line.rstrip(b"\r\n")
        if not line.strip():
            continue
        path = _jsonl_path(line, f"input: {spec}:{number}") if is_jsonl else line
        if not path or b"\0" in path:
            raise UsageError(f"input: {spec}:{number}: found no usable path: {path[:80]!r}")
        yield path


def _lines(spec: Path) -> Iterator[bytes]:
    """The lines of a list; of one that is too long, the beginning."""
    try:
        with spec.open("rb") as file:
            yield from iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    except OSError as error:
        raise refusal("input", spec, error) from error


def _jsonl_path(line: bytes, where: str) -> bytes:
    """The path in one line: a JSON string, or an object with `path` (and `path_b64`)."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b'"path_b64"' not in line:
            raise UsageError(f"{where}: not a line of JSON: {error}") from None
        # A name that is not UTF-8 is written with escapes that strict parsers refuse.
        match = re.search(rb'"path_b64":\s*"([^"]*)"', line)
        value = {"path_b64": match[1].decode("ascii", "replace") if match else ""}
    if isinstance(value, dict) and isinstance(value.get("path_b64"), str):
        try:
            return base64.b64decode(value["path_b64"], validate=True)
        except ValueError:  # not base64, or not even ASCII
            raise UsageError(f"{where}: `path_b64` is not base64") from None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise UsageError(
            f'{where}: found no path; write {{"path": "cats/1.jpg"}} or "cats/1.jpg", one a line'
        )
    return os.fsencode(path)
