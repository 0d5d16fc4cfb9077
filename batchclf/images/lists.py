"""List files: the paths that the lines of a .txt or .jsonl file name."""

import base64
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from batchclf.errors import UsageError
from batchclf.system.paths import refusal

MAX_LINE_BYTES = 65536
"""Of a list: a path of 4,096 bytes, each escaped as JSON has it, and other keys beside it."""
CHUNK_PATHS = 16_384
"""Of a list, looked up at once among those before; fewer at first, so that the first come soon."""
NUM_SHELVES = 16
_DIGEST_BYTES = 16
_Item = TypeVar("_Item")
_Digests = NDArray[np.bytes_]
"""16 bytes each, however long the path; two of a million are equal in one of 10^26 lists."""
_FIRST_OF_SHELF = np.array([bytes([256 // NUM_SHELVES * n]) for n in range(1, NUM_SHELVES)], "S16")


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


def mark_repeated(
    items: Iterable[_Item], path_of: Callable[[_Item], bytes]
) -> Iterator[tuple[list[_Item], NDArray[np.bool_]]]:
    """The items in the same order, some at a time, and of each whether its path came before.

    Costs 16 bytes of memory per path, and hardly more.
    """
    shelves: list[list[_Digests]] = [[] for _ in range(NUM_SHELVES)]
    iterator = iter(items)
    num_paths = 1
    while chunk := list(islice(iterator, num_paths)):
        num_paths = min(2 * num_paths, CHUNK_PATHS)
        digests = b"".join(
            blake2b(path, digest_size=_DIGEST_BYTES).digest() for path in map(path_of, chunk)
        )
        # Sorted, with the place of the first of each. All have 16 bytes, so that NumPy, to which
        # NUL bytes at the end of a text are nothing, compares them right.
        unique, first = np.unique(np.frombuffer(digests, "S16"), return_index=True)
        is_repeated = np.ones(len(chunk), np.bool_)
        borders = np.searchsorted(unique, _FIRST_OF_SHELF)
        for shelf, some, places in zip(
            shelves, np.split(unique, borders), np.split(first, borders), strict=True
        ):
            is_new = _put(shelf, some)
            is_repeated[places[is_new]] = False
        yield chunk, is_repeated


def _put(shelf: list[_Digests], digests: _Digests) -> NDArray[np.bool_]:
    """Put sorted digests on a shelf; returns which of them were not there.

    A shelf is of sorted arrays, each more than twice as long as the next: they are few, and each
    digest is merged into a longer one a few times only.
    """
    is_new = np.ones(len(digests), np.bool_)
    for known in shelf:
        places = np.searchsorted(known, digests)
        is_new &= known[np.minimum(places, len(known) - 1)] != digests
    merged = digests[is_new]
    while shelf and len(shelf[-1]) <= 2 * len(merged):
        merged = np.concatenate((shelf.pop(), merged))
        merged.sort(kind="stable")
    if len(merged):
        shelf.append(merged)
    return is_new


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
