"""A job's images in a folder per label: linked, or copied.

Names of folders are those of the labels, without what file systems and shells take for more than a
name, and with the class's index where that changed them, or where two would be the same.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from batchclf.commands.convert.target import mark
from batchclf.errors import UsageError
from batchclf.images.formats import SUFFIXES, content_format, suffix_format
from batchclf.images.local import MAX_FILE_BYTES
from batchclf.images.store import Store
from batchclf.results.records import Failure, ImageRef

Way = Literal["symlinks", "hard links", "copies"]
UNSURE, FAILED = "_unsure", "_failed"
_OUTSIDE = "outside_root"
"""Code of a link that leads out of the input: no link leads on to there."""
_DANGEROUS = ("decoder_crash", "timeout", "oom")
"""Codes of what, in an archive, ended or held up a process that read it."""
MAX_NAME_BYTES = 200
"""Of a file or a folder; file systems take 255."""
_SUFFIX_OF = {name: suffix for suffix, name in reversed(SUFFIXES.items())}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to become of the images."""

    way: Way = "symlinks"
    """Those inside archives or on other machines are copied in any case."""
    min_score: float | None = None
    """Images whose top score is lower go to a folder of their own."""


@dataclass(slots=True)
class Placed:
    """What became of the images."""

    num_of: Counter[str] = field(default_factory=Counter)
    """By their folders."""
    num_written_out: int = 0
    """Of those, copied since no link could lead to them."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why, for those that could not be had."""


def write_folders(
    root: Path, lines: Iterator[tuple[ImageRef, dict[str, Any]]], store: Store, choice: Choice
) -> Placed:
    """Put each image into the folder of its label.

    Raises:
        UsageError: there are to be hard links, and the images lie on another file system.
        EnvironmentFailed: the whole input has gone.
        OSError: disk full, I/O error.
    """
    root.mkdir()
    mark(root)
    placing = _Placing(root, store, choice)
    for ref, line in lines:
        placing.place(ref, line)
    return placing.placed


@dataclass(frozen=True, slots=True)
class _File:
    """An image that a link can lead to."""

    path: bytes


@dataclass(slots=True)
class _Placing:
    root: Path
    store: Store
    choice: Choice
    placed: Placed = field(default_factory=Placed)
    names: dict[int, str] = field(default_factory=dict)
    """Of the folders, by the index of the class."""

    def place(self, ref: ImageRef, line: dict[str, Any]) -> None:
        """Put the image of a record into its folder."""
        own = self.store.local_file(ref)
        image = self._image(ref, own, line)
        if isinstance(image, Failure):
            self.placed.left_out[image.code] += 1
            return
        folder = self._folder_of(line)
        if folder not in self.placed.num_of:
            (self.root / folder).mkdir()
        self.placed.num_of[folder] += 1
        self.placed.num_written_out += own is None
        path = os.path.join(os.fsencode(self.root / folder), _file_name(ref, image))
        for target in _targets(path, ref.index):
            try:
                _make(target, image, self.choice.way)
            except FileExistsError:
                continue
            return

    def _image(
        self, ref: ImageRef, own: bytes | None, line: dict[str, Any]
    ) -> bytes | _File | Failure:
        """What is to be written or linked, or why that cannot be."""
        known = Failure(**line["error"]) if line["status"] != "ok" else None
        refused = (_OUTSIDE, *(_DANGEROUS if own is None else ()))
        if known is not None and known.code in refused:
            return known
        if own is not None and self.choice.way != "copies":
            gone = known or Failure("vanished", "it was there")
            return _File(own) if os.path.exists(own) else gone
        return self.store.read(ref, MAX_FILE_BYTES)

    def _folder_of(self, line: dict[str, Any]) -> str:
        if line["status"] != "ok":
            return FAILED
        top = line["predictions"][0]
        if self.choice.min_score is not None and top["score"] < self.choice.min_score:
            return UNSURE
        index = top["index"]
        if index not in self.names:
            taken = {UNSURE, FAILED, *map(str.casefold, self.names.values())}
            self.names[index] = folder_name(top["label"], index, taken)
        return self.names[index]


def _make(target: bytes, image: bytes | _File, way: Way) -> None:
    if isinstance(image, bytes):
        with open(target, "xb") as file:
            file.write(image)
    elif way == "symlinks":
        _symlink(image.path, target)
    else:
        _hard_link(os.path.realpath(image.path), target)


def _symlink(source: bytes, target: bytes) -> None:
    try:
        os.symlink(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise UsageError(
            f"-o: {os.fsdecode(target)} cannot be a link: {error.strerror}, as on file systems "
            "without links; give a path on another one, or --copy"
        ) from error


def _hard_link(source: bytes, target: bytes) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        raise UsageError(
            f"--hard-links: {os.fsdecode(source)} cannot have one here: {error.strerror}; give a "
            "path on its own file system, leave --hard-links out, or --copy"
        ) from error


def _targets(path: bytes, number: int) -> Iterator[bytes]:
    """Names for an image, the first of which is its own: others may have the same."""
    yield path
    stem, suffix = os.path.splitext(path)
    yield b"%s-%d%s" % (stem, number, suffix)
    again = 2
    while True:
        yield b"%s-%d-%d%s" % (stem, number, again, suffix)
        again += 1


def _file_name(ref: ImageRef, image: bytes | _File) -> bytes:
    """An image's own name; what lies in archives may have any, or none."""
    name = ref.path.rpartition(b"/")[2]
    stem, suffix = os.path.splitext(name)
    if isinstance(image, bytes) and suffix_format(name) is None:
        stem, suffix = name, _SUFFIX_OF.get(content_format(image) or "", b"")
    suffix = suffix[: MAX_NAME_BYTES // 2]
    stem = stem[: MAX_NAME_BYTES - len(suffix)] if stem.strip(b".") else b"image-%d" % ref.index
    return stem + suffix


def folder_name(label: str, index: int, taken: set[str]) -> str:
    """A name for a class's folder that is no other's, on any file system."""
    name = re.sub(r"[^\w .,()&+'-]", "_", label.strip()).strip(" .-")
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(" .")
    found = name if name and name == label else f"{name or 'class'}-{index}"
    while found.casefold() in taken:
        found += f"-{index}"
    return found
