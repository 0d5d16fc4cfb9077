"""A file that one process holds at a time; the kernel lets go of it when the process ends."""

import fcntl
import os
import time
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

POLL_S = 0.05
_NO_FLOCK = (ENOSYS, EOPNOTSUPP, ENOLCK)


def lock_file(path: Path, seconds: float) -> int | None:
    """A lock held until this descriptor is closed; None: the file system has none (flock(2)).

    Raises:
        TimeoutError: another process still holds it after so many seconds.
        OSError: the file cannot be written.
    """
    ends_at = time.monotonic() + seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):  # held, or its holder has just removed it
            pass
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _NO_FLOCK:
                return None
            raise
        os.close(descriptor)
        if time.monotonic() > ends_at:
            raise TimeoutError
        time.sleep(POLL_S)
