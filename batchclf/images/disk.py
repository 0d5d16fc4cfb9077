"""One file of this machine: opened without blocking, read whole or in part, or why it cannot be.

What a disk or a file server refuses is asked for again, since it may pass.
"""

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from batchclf.errors import EnvironmentFailed
from batchclf.images.source import Source, require_still_there
from batchclf.results.records import Failure
from batchclf.system.paths import reason, refusal

MAX_PATH_BYTES = 4095
"""Longest path that Linux opens (PATH_MAX less its NUL)."""
RETRY_AFTER_S = (0.05, 0.2)
"""What a disk or a file server refuses is asked for again after these pauses."""
NUM_TRIES = 1 + len(RETRY_AFTER_S)
OPENED_BYTES = 2**13
"""Of an opened file at once: it is an archive, of which headers are read; between them lie photos.
"""
OUT_OF_MEMORY = "out of memory while reading"
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV),
)
"""Errors that say what is wrong with a path: trying again would not help."""
_Found = TypeVar("_Found")


def insist(action: Callable[[], _Found]) -> _Found:
    """What `action` returns, tried again after errors that may pass (EIO, ESTALE, timeouts)."""
    for pause_s in RETRY_AFTER_S:
        try:
            return action()
        except OSError as error:
            if error.errno in LASTING:
                raise
        time.sleep(pause_s)
    return action()


class InsistingFile(io.FileIO):
    """A file of which each range is asked for again as a whole file is."""

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        """As `io.RawIOBase`, but for what cannot be read at once: that is an error."""
        return insist(lambda: os.readv(self.fileno(), [buffer]))

    def readall(self) -> bytes:
        """As `io.RawIOBase`; the base's own loses what it read before it fails."""
        rest = bytearray()
        some = bytearray(OPENED_BYTES)
        while num_bytes := self.readinto(some):
            rest += memoryview(some)[:num_bytes]
        return bytes(rest)


def read_file(source: Source, full: bytes, max_bytes: int) -> bytes | Failure:
    """The whole content of one file.

    Raises:
        OSError: as the system says it.
    """
    descriptor = open_regular(source, full)
    if isinstance(descriptor, Failure):
        return descriptor
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        return _read_whole(descriptor, max_bytes)


def read_range(source: Source, full: bytes, start: int, length: int) -> bytes | Failure:
    """So many bytes of one file.

    Raises:
        OSError: as the system says it.
    """
    descriptor = open_regular(source, full)
    if isinstance(descriptor, Failure):
        return descriptor
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        data = os.pread(descriptor, length, start)
    if len(data) < length:
        return Failure("changed", f"ends before byte {start + length:,}; it did not when listed")
    return data


def version(_: Source, full: bytes) -> bytes:
    """Size and time of writing of one file.

    Raises:
        OSError: as the system says it.
    """
    found = os.stat(full)
    return b"%d,%d" % (found.st_size, found.st_mtime_ns)


def state(_: Source, full: bytes) -> bytes:
    """As `version`, but another one, too, where another file as large and as old is there now.

    It is of this place only: a copy has another one, and so has a file that was only renamed.

    Raises:
        OSError: as the system says it.
    """
    found = os.stat(full)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return b"%d,%d,%d,%d" % (found.st_size, *times, found.st_ino)


def open_regular(source: Source, full: bytes) -> int | Failure:
    """A descriptor of a regular file; opening never blocks (a FIFO named x.jpg would).

    Raises:
        OSError: as the system says it.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(full, flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(full):
            raise
        if refused := _refuse_link(source, full):
            return refused
        descriptor = os.open(full, flags)
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        os.close(descriptor)
        raise
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        # Listed only because it could not be walked.
        if len(full) >= MAX_PATH_BYTES:
            return Failure("path_too_long", f"a folder whose path has {len(full):,} bytes")
        if not os.access(full, os.R_OK | os.X_OK):
            return Failure("permission_denied", "a folder that may not be entered")
    return Failure("not_regular_file", f"found a {_kind(mode)}, not a regular file")


def _refuse_link(source: Source, full: bytes) -> Failure | None:
    target = os.path.realpath(full, strict=True)
    if os.path.isdir(target) and is_inside(os.path.realpath(os.path.dirname(full)), target):
        return Failure("symlink_loop", "a link to a folder around it")
    if source.confined and not is_inside(target, os.path.realpath(source.root)):
        return Failure(
            "outside_root",
            "a link that leads out of the input folder; "
            "set loader.allow_outside_links: true to follow it",
        )
    return None


def is_inside(real_path: bytes, real_root: bytes) -> bool:
    """Whether a path is a folder or lies below it, both without links."""
    return real_path == real_root or real_path.startswith(real_root.rstrip(b"/") + b"/")


def failure_of(source: Source, error: OSError, full: bytes) -> Failure:
    """Why a file cannot be read, as its record says it.

    Raises:
        EnvironmentFailed: the whole input has gone, or no descriptor is left to open it with.
    """
    require_still_there(source)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return _missing(source, os.path.islink(full))
        case errno.ELOOP:
            return Failure("symlink_loop", "a link that leads back to itself")
        case errno.EACCES | errno.EPERM:
            return Failure("permission_denied", f"may not be read: {reason(error)}")
        case errno.ENAMETOOLONG:
            return Failure("path_too_long", f"the path has {len(full):,} bytes, too many to open")
        case errno.ENXIO | errno.ENODEV | errno.EISDIR:
            return Failure("not_regular_file", "not a regular file")
        case errno.ENOMEM:
            return Failure("oom", OUT_OF_MEMORY)
        case errno.ENOTCONN:  # of a file in a list, which may lie anywhere
            raise refusal("input", os.fsdecode(full), error) from error
        case errno.EMFILE | errno.ENFILE:
            raise EnvironmentFailed(
                f"input: {os.fsdecode(full)}: cannot be opened: {reason(error)}; raise the limit "
                "(`ulimit -n`) or choose fewer loader.workers, and run again to resume"
            ) from error
    return Failure("io_error", f"tried {NUM_TRIES} times: {reason(error)}")


def _missing(source: Source, is_link: bool) -> Failure:
    if source.kind == "list":  # what it names was not looked up
        what = "a link to a file that is not there" if is_link else "not there"
        return Failure("not_found", f"{what}; the list names it")
    if is_link:
        return Failure("vanished", "a link to a file that is not there")
    return Failure("vanished", "no longer there; it was when the input was listed")


def _read_whole(descriptor: int, max_bytes: int) -> bytes | Failure:
    before = os.fstat(descriptor)
    if before.st_size > max_bytes:
        return Failure(
            "too_large_bytes", f"{before.st_size:,} bytes; loader.max_bytes allows {max_bytes:,}"
        )
    chunks: list[bytes] = []
    # One byte more than the size: a file that grows is seen without another call.
    while chunk := os.read(descriptor, max(before.st_size + 1, 65536)):
        chunks.append(chunk)
        if len(chunk) == before.st_size:
            break
    data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    after = os.fstat(descriptor)
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return Failure("changed", "changed while it was read")
    return data


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def head(full: bytes) -> bytes:
    """The first bytes of a regular file; empty where it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(full).st_mode):
            return b""
        with open(full, "rb") as file:
            return file.read(32)
    except OSError:
        return b""
