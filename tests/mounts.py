"""A mount that is dead, for real: that of a FUSE server which has gone."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DETACHED = 2
"""MNT_DETACH of umount2(2)."""


@contextmanager
def dead_mount(folder: Path) -> Iterator[None]:
    """Within, whatever is asked of this folder, or of what is below it, fails with ENOTCONN."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    failed = libc.mount(b"dead", os.fsencode(folder), b"fuse", 0, options)
    os.close(server)
    if failed:
        pytest.skip(f"not allowed to mount: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(os.fsencode(folder), DETACHED)
