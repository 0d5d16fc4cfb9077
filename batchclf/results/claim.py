"""What is done to a lease's file in a process apart (system/apart.py). Imports little."""

import json
import os
from contextlib import suppress
from pathlib import Path


def look(lease: Path, token: str) -> bool:
    """Whether the lease is still `token`'s.

    Raises:
        FileNotFoundError: there is not even its folder.
        OSError: the file system fails.
    """
    if is_ours(lease, token):
        return True
    os.stat(lease.parent)
    return False


def renew(lease: Path, token: str) -> bool:
    """Touch the lease, if it is still `token`'s: whether it is.

    Raises:
        FileNotFoundError: there is not even its folder.
        OSError: the file system fails.
    """
    if not look(lease, token):
        return False
    os.utime(lease)
    return True


def is_ours(lease: Path, token: str) -> bool:
    """Whether a lease is `token`'s."""
    try:
        found = json.loads(lease.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found.get("token") == token


def give_back(lease: Path, token: str) -> None:
    """Remove a lease of `token`'s. Where it stays, the lock tells that it is stale."""
    with suppress(OSError):
        if is_ours(lease, token):
            lease.unlink()


def remove_if_unused(lock: Path) -> None:
    """Leave no folder of our own making behind a run that wrote nothing, or left nothing in it."""
    with suppress(OSError):  # somebody was faster
        if {entry.name for entry in lock.parent.iterdir()} <= {lock.name}:
            lock.unlink(missing_ok=True)
            lock.parent.rmdir()
