"""Names given to files and folders where another may be: never in its place, or for its own."""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
"""Of <fcntl.h> and <linux/fs.h>."""
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that cannot do either."""


def rename_noreplace(source: Path, target: Path) -> None:
    """Give `source` a name that nothing has yet.

    Raises:
        FileExistsError: something has it.
        OSError: the file system does not do it, or the disk fails.
    """
    _renameat2(source, target, _RENAME_NOREPLACE)


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders have each other's name, at once.

    Raises:
        OSError: the file system does not do it, or the disk fails.
    """
    _renameat2(one, other, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(source), _AT_FDCWD, os.fsencode(target))
    if libc.renameat2(_AT_FDCWD, *names, ctypes.c_uint(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(target))
