"""Where this program keeps what it can make again."""

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from batchclf.errors import EnvironmentFailed
from batchclf.system.lock import lock_file

VARIABLE = "BATCHCLF_CACHE_DIR"
LOCK_S = 5.0
"""A lock that nobody knows of yet is had at once, unless it is looked at just then."""
OLD_S = 86_400.0
"""Age from which another machine's folder, whose lock is free, counts as left behind."""


def cache_root() -> Path:
    """`BATCHCLF_CACHE_DIR`, or the user's cache folder."""
    base = os.environ.get(VARIABLE)
    return Path(base) if base else platformdirs.user_cache_path("batchclf")


def cache_failed(error: OSError) -> EnvironmentFailed:
    """The error for what cannot be written to the cache."""
    return EnvironmentFailed(
        f"{cache_root()}: cannot be written: {error.strerror or error}; set {VARIABLE} to a folder "
        "with room"
    )


@contextmanager
def passing_folder(kind: str) -> Iterator[Path]:
    """A folder of the cache for as long as the block lasts.

    First, those of this kind go whose process was killed: nobody holds their lock. Of other
    machines, old ones only: between them, not every file system tells who holds what.

    Raises:
        OSError: it cannot be made.
    """
    root = cache_root() / kind
    root.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for left in root.glob("*.lock"):
        with suppress(OSError):  # its process lives, or it is another user's
            is_old = time.time() - left.stat().st_mtime > OLD_S
            if not is_old and not left.name.startswith(f"{host}-"):
                continue
            if (lock := lock_file(left, 0.0)) is not None:  # without locks nobody knows
                _remove(left, lock)
    mark = root / f"{host}-{secrets.token_hex(8)}.lock"
    lock = lock_file(mark, LOCK_S)
    try:
        folder = mark.with_suffix("")
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(mark, lock)


def _remove(mark: Path, lock: int | None) -> None:
    """Remove a folder, and then what tells of it, so that what fails here is tried again."""
    try:
        with suppress(OSError):
            with suppress(FileNotFoundError):
                shutil.rmtree(mark.with_suffix(""))
            mark.unlink()
    finally:
        if lock is not None:
            os.close(lock)
