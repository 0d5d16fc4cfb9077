"""Paths that a user named: what is there, or why that cannot even be looked at."""

import errno
import os
import shutil
import stat
from dataclasses import dataclass
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


def reason(error: OSError) -> str:
    """The system's words for an error, and its name."""
    code = errno.errorcode.get(error.errno, "") if error.errno else ""
    return f"{error.strerror} ({code})" if code else str(error)
