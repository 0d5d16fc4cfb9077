"""True labels: a folder per class, a table, or what stands beside the images in the input."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchclf.errors import UsageError
from batchclf.images.entries import truth_of
from batchclf.results.output import Output
from batchclf.results.records import Entry
from batchclf.scoring.classes import Name
from batchclf.scoring.tables import Row, read_table
from batchclf.system.paths import kind_of, refusal

INPUT = "input"
"""The truth that stands beside the images in the input."""
LOOKED_UP = 4096
"""Images at once."""
_NONE, _SEVERAL = -1, -2
_Item = TypeVar("_Item")

Missing = Literal["none", "several"]
"""Why an image has no true label: nothing tells it, or several things might."""


def chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Some items at a time."""
    iterator = iter(items)
    while some := list(islice(iterator, LOOKED_UP)):
        yield some


class Truth(Protocol):
    """Tells the true labels of images."""

    @property
    def told(self) -> str:
        """Where they are from, and how images are found there, in words."""

    def of(self, entries: Sequence[Entry]) -> Sequence[Name | Missing]:
        """The true label of each image."""


def open_truth(given: str, output: Output) -> Truth:
    """The true labels that `--truth` names, for the images of a job.

    Raises:
        UsageError: nothing of the kind is there, or it is not what it should be.
        EnvironmentFailed: it cannot be read.
    """
    if given == INPUT:
        return _Beside()
    path = Path(given)
    kind = kind_of(path, "truth")
    if kind == "folder":
        return _in_folder(path, output)
    if kind == "file":
        rows, columns = read_table(path)
        return _in_rows(rows, f"{path}, {columns}", output)
    found = "found nothing there" if kind == "nothing" else "is no regular file"
    raise UsageError(
        f"truth: {path}: {found}; give a folder with a folder per class, a .csv, .tsv or .jsonl "
        f"file, or `{INPUT}` for what stands beside the images in the input (WebDataset, Parquet)"
    )


class _Beside:
    """What the listing found beside the images of archives."""

    told = "beside the images in the input"

    def of(self, entries: Sequence[Entry]) -> Sequence[Name | Missing]:
        """As `Truth`."""
        return [_beside(entry.location) for entry in entries]


def _beside(location: bytes) -> Name | Missing:
    text = truth_of(location) if location else None
    return "none" if text is None else Name(text.decode(errors="backslashreplace").strip())


# ---- a folder per class --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Folder:
    """Images that lie at the same paths in a folder per class; nothing is kept of each."""

    folder: bytes
    classes: dict[bytes, Name]
    told: str

    def of(self, entries: Sequence[Entry]) -> Sequence[Name | Missing]:
        """As `Truth`."""
        return list(map(self._of, entries))

    def _of(self, entry: Entry) -> Name | Missing:
        name = self.classes.get(entry.path.partition(b"/")[0])
        if name is not None and os.path.lexists(os.path.join(self.folder, entry.path)):
            return name
        return "none"


def _in_folder(path: Path, output: Output) -> Truth:
    folder = os.fsencode(path)
    try:
        found = sorted(one.name for one in os.scandir(folder) if one.is_dir())
    except OSError as error:
        raise refusal("truth", path, error) from error
    if not found:
        raise UsageError(
            f"truth: {path}: holds no folder; give one with a folder per class, named for "
            "it, or a .csv file with `path` and `label`"
        )
    classes = {name: Name(name.decode(errors="backslashreplace")) for name in found}
    by_path = _Folder(folder, classes, f"{path}, a folder per class, by path")
    if _finds_any(by_path, output):
        return by_path
    rows = (
        Row(file, classes[name])
        for name in found
        for _, _, files in os.walk(os.path.join(folder, name), followlinks=True)
        for file in files
    )
    return _Rows(rows).by_file_name(f"{path}, a folder per class", output)


def _finds_any(truth: Truth, output: Output) -> bool:
    return any(name != "none" for some in chunks(output.entries()) for name in truth.of(some))


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Sorted hashes, and the number of the label of each."""

    keys: NDArray[np.int64]
    codes: NDArray[np.int32]
    names: Sequence[Name]
    key_of: Callable[[bytes], bytes]
    told: str

    def of(self, entries: Sequence[Entry]) -> Sequence[Name | Missing]:
        """As `Truth`."""
        if not len(self.keys):
            return ["none"] * len(entries)
        own = np.fromiter((hash(self.key_of(entry.path)) for entry in entries), np.int64)
        places = np.minimum(np.searchsorted(self.keys, own), len(self.keys) - 1)
        codes = np.where(self.keys[places] == own, self.codes[places], _NONE).tolist()
        return [
            self.names[code] if code >= 0 else "none" if code == _NONE else "several"
            for code in codes
        ]


def _in_rows(rows: Iterable[Row], told: str, output: Output) -> Truth:
    found = _Rows(rows)
    by_path = found.by_path(told)
    return by_path if _finds_any(by_path, output) else found.by_file_name(told, output)


class _Rows:
    """Rows by the hashes of their paths and of their file names: 20 bytes each.

    Two of a million paths have the same hash, of 64 bits, in one of 10^7 tables.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        numbers: dict[Name, int] = {}
        paths, files, codes = array("q"), array("q"), array("i")
        for row in rows:
            paths.append(hash(row.path))
            files.append(hash(_file_name(row.path)))
            codes.append(numbers.setdefault(row.name, len(numbers)))
        self._names = tuple(numbers)
        self._paths, self._files = np.array(paths, np.int64), np.array(files, np.int64)
        self._codes = np.array(codes, np.int32)

    def by_path(self, told: str) -> _Lookup:
        """What rows say of a path; several labels for one are none."""
        order = np.argsort(self._paths, kind="stable")
        keys, codes = self._paths[order], self._codes[order]
        differs = keys[1:][(keys[1:] == keys[:-1]) & (codes[1:] != codes[:-1])]
        codes = np.where(np.isin(keys, differs), _SEVERAL, codes)
        keys, first = np.unique(keys, return_index=True)
        return _Lookup(keys, codes[first], self._names, bytes, f"{told}, by path")

    def by_file_name(self, told: str, output: Output) -> _Lookup:
        """What rows say of a file's name; one that several rows or images have tells nothing."""
        images = (hash(_file_name(entry.path)) for entry in output.entries())
        own, num_own = np.unique(np.fromiter(images, np.int64), return_counts=True)
        keys, first, counts = np.unique(self._files, return_index=True, return_counts=True)
        tells_nothing = (counts > 1) | np.isin(keys, own[num_own > 1])
        codes = np.where(tells_nothing, _SEVERAL, self._codes[first])
        told = f"{told}, by file name (no image has a path in it)"
        return _Lookup(keys, codes, self._names, _file_name, told)


def _file_name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]
