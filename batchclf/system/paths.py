"""Paths that a user named: what is there, or why that cannot even be looked at."""

import difflib
import errno
import os
import shutil
import stat
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from batchclf.errors import EnvironmentFailed, UsageError

PathKind = Literal["folder", "file", "other", "nothing"]
_MISTAKES = {
    errno.ENAMETOOLONG: "no path can be so long; give a shorter one",
    errno.ELOOP: "its links lead back to themselves; give what they should lead to",
}
GIT_LFS_POINTER = b"version https://git-lfs"
"""How what Git LFS leaves in the place of a file that it has not fetched begins."""
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_MAX_NAMES = 1_000
"""Of a folder are looked through for one that is spelt much as another: for milliseconds."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a file system."""

    total: int
    free: int


def disk_of(path: Path) -> tuple[Path, Usage]:
    """The nearest folder that is there, of a path that may not be, and its file system's bytes.

    Raises:
        OSError: it cannot be looked at.
    """
    place = next(one for one in (path, *path.absolute().parents) if one.exists())
    found = shutil.disk_usage(place)
    return place, Usage(found.total, found.free)


def kind_of(path: Path, key: str) -> PathKind:
    """What is at a path that the job names under `key`, links followed.

    Raises:
        UsageError: no machine could tell: the path is too long, or its links lead in a circle.
        EnvironmentFailed: this machine cannot tell: it is forbidden, or what it lies on is dead.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        raise refusal(key, path, error, "looked at") from error
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def require_readable(path: Path, key: str) -> None:
    """Refuse a file that is there but cannot be opened; what is not there, others tell.

    Raises:
        UsageError, EnvironmentFailed: as `kind_of`; a file that this user may not read as well.
    """
    if kind_of(path, key) == "file":
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise refusal(key, path, error) from error


def refusal(
    key: str, path: str | os.PathLike[str], error: OSError, deed: str = "read"
) -> UsageError | EnvironmentFailed:
    """The error for what the job names under `key` and the system does not give; `deed`: what for.

    A path that no machine could open is the user's mistake; the rest, this machine's failure.
    """
    advice = _MISTAKES.get(error.errno or 0)
    text = f"{key}: {os.fspath(path)}: cannot be {deed}: {reason(error)}; "
    if advice is not None:
        return UsageError(text + advice)
    if error.errno in _FORBIDDEN:
        return EnvironmentFailed(f"{text}let this user read it, and enter the folders above it")
    return EnvironmentFailed(f"{text}mend what it lies on, and run again")


def unread(path: Path, error: OSError) -> str:
    """Why a file that the job names is not read, and what to do about it; no sentence of its own.

    As in `{key}: {path}: cannot be read: {unread(path, error)}`.
    """
    match error.errno:
        case errno.ENOENT:
            advice = f"name one that is there{nearest(path)}"
        case errno.EISDIR:
            advice = "it is a folder: name the file in it"
        case errno.ENOTDIR:
            advice = "what its path leads through is a file"
        case errno.EACCES | errno.EPERM:
            advice = "let this user read it, and enter the folders above it"
        case _:
            advice = "mend what it lies on, and run again"
    return f"{error.strerror or error}; {advice}"


def reason(error: OSError) -> str:
    """The system's words for an error, and its name."""
    code = errno.errorcode.get(error.errno, "") if error.errno else ""
    return f"{error.strerror} ({code})" if code else str(error)


def nearest(path: Path) -> str:
    """`; did you mean PATH?`: what is there and is spelt most like what is not; else nothing."""
    try:
        with os.scandir(path.parent) as entries:
            seen = (entry.name for entry in islice(entries, _MAX_NAMES))
            names = [name for name in seen if name != path.name]
    except OSError:  # the folder is not there either: that is what the caller tells
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""
