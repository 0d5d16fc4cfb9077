"""Lists that can be read once only: stdin, a FIFO, what a shell makes of `<(...)`."""

import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from batchclf.errors import UsageError
from batchclf.spec.input import STDIN, Place
from batchclf.system.paths import refusal

READ_BYTES = 1 << 16
WAIT_MS = 100
_STDIN = (STDIN, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/")


def is_stream(place: Place) -> bool:
    """Whether a place is a list that cannot be read again."""
    text = os.fspath(place)
    if text in _STDIN or text.startswith(_DESCRIPTORS):
        return True
    try:
        return isinstance(place, Path) and stat.S_ISFIFO(os.stat(place).st_mode)
    except OSError:  # who opens it tells
        return False


def read_stream(place: Place, wait: Callable[[], None]) -> Iterator[bytes]:
    """Its content, piece by piece; `wait` is called before each, and while there is none yet.

    Raises:
        UsageError: stdin is closed.
        EnvironmentFailed: it cannot be read.
    """
    try:
        descriptor = _open(place)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            while True:
                wait()
                if not poll.poll(WAIT_MS):
                    continue
                with suppress(BlockingIOError):
                    if not (piece := os.read(descriptor, READ_BYTES)):
                        return
                    yield piece
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal("input", os.fspath(place), error) from error


def _open(place: Place) -> int:
    if os.fspath(place) not in _STDIN:
        # A FIFO that nobody writes to yet would block.
        return os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if sys.stdin is None:  # Python found it closed; another file may have the number by now
        raise UsageError(f"input: {place}: stdin is closed; give it a list, or name one")
    return os.dup(0)
