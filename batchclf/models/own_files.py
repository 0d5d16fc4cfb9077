"""Files that a model's own text names: they are its own, or they are not opened.

Who reads a model resolves such names itself, and has been led out of the folder by them.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchclf.errors import ModelError
from batchclf.system.paths import unread


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file beside a model that holds weights of it."""

    location: str
    """As the model's text names it."""
    path: Path
    """Where it is: with `may_link`, what links lead to."""
    identity: tuple[int, int]
    """Its device and its number there, when it was looked at."""
    num_bytes: int
    """How long it was then."""
    is_link: bool
    """Whether a symbolic link leads there."""

    def open(self) -> BinaryIO:
        """The file that was looked at, for reading, and no other that is in its place by now.

        Raises:
            ModelError: it is another one.
            OSError: it cannot be opened.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != self.identity:
            os.close(descriptor)
            raise ModelError(f"{self.path}: was replaced while it was read; run again")
        return os.fdopen(descriptor, "rb")


def weights_file(folder: Path, name: str, said: str, *, may_link: bool = False) -> WeightsFile:
    """The file that a model in `folder` says holds its weights, once it is known to be its own.

    Args:
        said: the beginning of messages, see `says`.
        may_link: whether it may be a link, symbolic or hard, to anywhere.

    Raises:
        ModelError: it is no regular file in the folder, or below; without `may_link`, one of one
            name only.
    """
    parts = [part for part in name.split("/") if part != "." or not may_link]
    if "\0" in name or "\\" in name or not parts or {"", ".", ".."}.intersection(parts):
        raise ModelError(f"{said}, which is no file in the model's own folder")
    found = folder.joinpath(*parts)
    try:
        real = os.path.realpath(found)
        is_link = real != os.path.join(os.path.realpath(folder), *parts)
        status = os.stat(real)
    except OSError as error:
        missing = f"{error.strerror}; put it beside the model, under this name"
        why = missing if isinstance(error, FileNotFoundError) else unread(found, error)
        raise ModelError(f"{said}: {why}") from None
    if is_link and not may_link:
        raise ModelError(
            f"{said}, which is reached by a symbolic link; put the file itself beside the model"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{said}, which is no file")
    if status.st_nlink != 1 and not may_link:
        raise ModelError(
            f"{said}, which has {status.st_nlink} names (hard links), maybe outside the model's "
            "folder; put a copy of its own beside the model"
        )
    identity = (status.st_dev, status.st_ino)
    return WeightsFile(name, Path(real) if is_link else found, identity, status.st_size, is_link)


def own_file(folder: Path, name: str, said: str) -> None:
    """Refuse what is no file right in a folder, nor one of its repository in the hub's cache.

    There, `snapshots/REVISION` holds links to files in `blobs`.

    Raises:
        ModelError: it is none; `said` is the beginning of the message.
    """
    found = weights_file(folder, name, said, may_link=True)
    if "/" in name:
        raise ModelError(f"{said}; put the file right into the folder and name it alone")
    snapshot = Path(os.path.realpath(folder))
    is_blob = found.path.parent == snapshot.parent.parent / "blobs"
    if found.is_link and not (is_blob and snapshot.parent.name == "snapshots"):
        raise ModelError(
            f"{said}, which is a link to {found.path}; put the file itself into the folder"
        )


def own_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder whose names fit `patterns`, sorted.

    Raises:
        ModelError: one is none of the folder's own, see `own_file`.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    for path in files:
        own_file(folder, path.name, f"model.name: {folder}: holds {path.name!r}")
    return files


def says(what: str, name: str) -> str:
    """The beginning of a message on a file that a model's text names."""
    return f"{what}: its weights are said to be in {shortened(name)!r}"


def shortened(text: str) -> str:
    """A text of a model's, no longer than a message bears."""
    return text if len(text) <= 80 else f"{text[:77]}..."
