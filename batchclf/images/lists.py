"""List files: the paths that the lines of a .txt or .jsonl file name."""

import codecs
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from batchclf.errors import UsageError
from batchclf.images.dialect import Dialect, find_dialect
from batchclf.images.omissions import Omissions
from batchclf.system.paths import refusal

NUM_TRIED = 100
"""Files of a list that are looked for before a job begins: they show how it writes its paths."""

MAX_LINE_BYTES = 65536
"""Of a list: a path of 4,096 bytes, each escaped as JSON has it, and other keys beside it."""
CHUNK_PATHS = 16_384
"""Of a list, looked up at once among those before; fewer at first, so that the first come soon."""
_MARKS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)
"""Byte order marks; that of UTF-32 begins as UTF-16's does."""
NUM_SHELVES = 16
_DIGEST_BYTES = 16
_Item = TypeVar("_Item")
_Digests = NDArray[np.bytes_]
"""16 bytes each, however long the path; two of a million are equal in one of 10^26 lists."""
_FIRST_OF_SHELF = np.array([bytes([256 // NUM_SHELVES * n]) for n in range(1, NUM_SHELVES)], "S16")


class ListedPaths:
    """The paths that a list names, as often as they stand there; each iteration reads anew.

    Raises:
        UsageError: while it is iterated: a line holds no path.
        EnvironmentFailed: while it is iterated: the list cannot be read.
    """

    def __init__(self, spec: Path, dialect: Dialect, left_out: Omissions) -> None:
        """`left_out` is told of comments."""
        self._spec = spec
        self._left_out = left_out
        self._dialect = dialect
        self.line_number = 0
        """Of the last path, from 1."""

    @property
    def place(self) -> str:
        """The line of the last path, for messages."""
        return f"input: {self._spec}:{self.line_number}"

    def __iter__(self) -> Iterator[bytes]:
        for number, line in enumerate(_lines(self._spec, self._dialect.encoding), start=1):
            self.line_number = number
            if len(line) > MAX_LINE_BYTES:
                raise UsageError(
                    f"{self.place}: longer than {MAX_LINE_BYTES:,} bytes; a list has one path a "
                    "line"
                )
            if not line.strip():
                continue
            path = self._dialect.path_in(line, self.place)
            if self._dialect.is_comment(line, path, os.path.lexists):
                self._left_out.add("in comments", line)
            else:
                yield path


def dialect_of(spec: Path, roots: Sequence[bytes]) -> Dialect:
    """How a list writes its paths, which may be relative to any of `roots`.

    Raises:
        UsageError: its encoding is not what its first bytes say.
        EnvironmentFailed: the list cannot be read.
    """
    encoding = _encoding_of(spec)
    head = list(islice(filter(bytes.strip, _lines(spec, encoding)), NUM_TRIED))
    return find_dialect(head, roots, encoding, True if spec.suffix.lower() == ".jsonl" else None)


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


def _encoding_of(spec: Path) -> str | None:
    """The encoding that a list's byte order mark says; None: it is read as bytes."""
    try:
        with spec.open("rb") as file:
            first = file.read(4)
    except OSError as error:
        raise refusal("input", spec, error) from error
    return next((encoding for mark, encoding in _MARKS if first.startswith(mark)), None)


def _lines(spec: Path, encoding: str | None) -> Iterator[bytes]:
    """The lines of a list without their ends; of one that is too long, the beginning."""
    try:
        if encoding is None:
            with spec.open("rb") as file:
                first = file.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
                lines = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
                for line in chain([first], lines):
                    yield line.rstrip(b"\r\n")
        else:
            with spec.open(encoding=encoding) as text:
                for told in iter(partial(text.readline, MAX_LINE_BYTES + 1), ""):
                    yield os.fsencode(told.rstrip("\r\n"))
    except OSError as error:
        raise refusal("input", spec, error) from error
    except UnicodeError as error:
        raise UsageError(
            f"input: {spec}: its first bytes say that it is {encoding} text, and it is not: "
            f"{error}; save the list as UTF-8"
        ) from error
