"""Files of this machine: walked, selected by a glob or named by a list, and read.

Folders are walked depth first with the names of each folder sorted by bytes. Nothing is filtered
by suffix: what a file is, its content tells (decode.py). Left out, and counted, is only what
systems leave there (clutter.py); a glob selects further.
"""

import errno
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from batchclf.errors import EnvironmentFailed, NoImagesError, UsageError
from batchclf.images.archives.names import archive_around
from batchclf.images.clutter import is_apple_double, is_clutter
from batchclf.images.dialect import is_far
from batchclf.images.formats import looks_like_image, suffix_format
from batchclf.images.globs import describe_others
from batchclf.images.lists import NUM_TRIED, ListedPaths, mark_repeated
from batchclf.images.source import Source, require_still_there, selector
from batchclf.results.records import Failure
from batchclf.system.paths import reason, refusal

MAX_PATH_BYTES = 4095
"""Longest path that Linux opens (PATH_MAX less its NUL)."""
MAX_FILE_BYTES = 2**31
"""A larger file is no photo: reading it would only cost the memory. The default."""
RETRY_AFTER_S = (0.05, 0.2)
"""What a disk or a file server refuses is asked for again after these pauses."""
NUM_TRIES = 1 + len(RETRY_AFTER_S)
OPENED_BYTES = 2**13
"""Of an opened file at once: it is an archive, of which headers are read; between them lie photos.
"""
MAX_SURVEYED = 100_000
"""Files that are looked at to tell what a glob does not select."""
OUT_OF_MEMORY = "out of memory while reading"
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV),
)
"""Errors that say what is wrong with a path: trying again would not help."""
_Found = TypeVar("_Found")


class Paths:
    """The paths of an input, relative to its root, in a fixed order; each iteration looks anew."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.num_left_out = 0
        """What systems leave, or comments and repeated lines of a list, seen by the last iteration.
        """

    def __iter__(self) -> Iterator[bytes]:
        self.num_left_out = 0
        if self.source.kind == "file":
            return iter([os.fsencode(self.source.names[0])])
        return self._listed() if self.source.kind == "list" else self._walked()

    def _listed(self) -> Iterator[bytes]:
        listed = _lines_of(self.source)
        num_repeated = 0
        for paths, is_repeated in mark_repeated(listed, bytes):
            num_repeated += int(is_repeated.sum())
            self.num_left_out = num_repeated + listed.num_comments
            yield from compress(paths, ~is_repeated)
        self.num_left_out = num_repeated + listed.num_comments

    def _walked(self) -> Iterator[bytes]:
        return filter(selector(self.source), _walk(self))


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of an input on this machine."""

    source: Source

    def paths(self) -> Paths:
        """What the input holds, as an iterable.

        Raises:
            UsageError: while it is iterated: a line of a list holds no path.
            EnvironmentFailed: while it is iterated: a list or a folder cannot be read.
        """
        return Paths(self.source)

    def glimpse(self) -> Iterator[bytes]:
        """Paths in no order and not all, the first of which comes sooner than that of `paths`."""
        return _glimpse(self.source)

    def require_some(self) -> None:
        """Refuse a list of whose first files the most are missing, and a glob that selects nothing.

        Raises:
            NoImagesError: naming a file of the list and where it was looked for, or what is there
                that the glob does not select.
            UsageError: a line of the list holds no path, or more than that.
        """
        if self.source.kind == "list":
            _require_some(self.source)
        elif self.source.kind == "glob":
            _require_selected(self.source)

    def head(self, path: bytes) -> bytes:
        """The first bytes of a regular file; empty where it cannot be read."""
        return _head(os.path.join(self.source.root, path))

    def open(self, path: bytes) -> BinaryIO | Failure:
        """One listed file, opened to be read and sought in; or why that cannot be.

        Raises:
            EnvironmentFailed: as `read`.
        """
        opened = self._insisting(path, _open_regular)
        if isinstance(opened, Failure):
            return opened
        return io.BufferedReader(_InsistingFile(opened), OPENED_BYTES)

    def read(self, path: bytes, max_bytes: int = MAX_FILE_BYTES) -> bytes | Failure:
        """The whole content of one listed file, or why it cannot be read.

        Nothing but a regular file is read, and opening never blocks (a FIFO named x.jpg would).

        Raises:
            EnvironmentFailed: the whole input has gone, or no descriptor is left to open it with.
        """
        return self._insisting(path, partial(_read_file, max_bytes=max_bytes))

    def read_range(self, path: bytes, start: int, length: int) -> bytes | Failure:
        """So many bytes of one listed file, or why they cannot be read.

        Raises:
            EnvironmentFailed: as `read`.
        """
        return self._insisting(path, partial(_read_range, start=start, length=length))

    def version(self, path: bytes) -> bytes | Failure:
        """Size and time of writing of one listed file, or why they cannot be told.

        Raises:
            EnvironmentFailed: as `read`.
        """
        return self._insisting(path, _version)

    def _insisting(
        self, path: bytes, action: Callable[[Source, bytes], _Found]
    ) -> _Found | Failure:
        full = os.path.join(self.source.root, path)
        try:
            return _insist(lambda: action(self.source, full))
        except MemoryError:
            return Failure("oom", OUT_OF_MEMORY)
        except OSError as error:
            return _failure(self.source, error, full)


def _lines_of(source: Source) -> ListedPaths:
    assert source.dialect is not None, "a list has one"
    return ListedPaths(Path(source.spec), source.dialect)


def _require_some(source: Source) -> None:
    lines = _lines_of(source)
    num_tried, missing = 0, []
    for path in islice(lines, NUM_TRIED):
        num_tried += 1
        if not is_far(path) and not os.path.lexists(os.path.join(source.root, source.locate(path))):
            missing.append((lines.place, path))
    if 2 * len(missing) <= num_tried:
        return
    for place, path in missing:
        _require_one_path(source, place, path)
    for place, path in missing:
        if archive := archive_around(path):
            raise NoImagesError(
                f"{place}: found {os.fsdecode(path)}: an image inside of an archive, which a list "
                f"cannot name; give the archive as input, or in the list: {os.fsdecode(archive)}"
            )
    place, path = missing[0]
    folders = ", nor below ".join(map(os.fsdecode, source.roots))
    found = "found 0 images: " if len(missing) == num_tried else ""
    raise NoImagesError(
        f"{place}: {found}{len(missing):,} of the first {num_tried:,} files of the list are not "
        f"there, such as {os.fsdecode(path)}: it is not below {folders}; write whole paths, or "
        "run from the folder that they are relative to (is what they lie on mounted?)"
    )


def _require_one_path(source: Source, place: str, path: bytes) -> None:
    """Refuse a line of a table, with a file's path in it and something else."""
    for separator in (b"\t", b",", b";", b" "):
        parts = [*path.partition(separator)[::2], *path.rpartition(separator)[::2]]
        for part in parts if separator in path else ():
            one = part.strip(b" \t\"'")
            if one and os.path.isfile(os.path.join(source.root, source.locate(one))):
                raise UsageError(
                    f"{place}: found {path[:300]!r}, of which only {one!r} is there; a list has "
                    "nothing but one path a line; with more to say it is .jsonl: "
                    '{"path": "cats/1.jpg", "label": "cat"}'
                )


def _require_selected(source: Source) -> None:
    if next(iter(Paths(source)), None) is not None:
        return
    others = list(islice(_walk(Paths(source)), MAX_SURVEYED))
    told = describe_others(source.names, os.fsdecode(source.root), others)
    raise NoImagesError(f"input: {source.spec}: found 0 images: no file matches; {told}")


# ---- folders and globs ---------------------------------------------------------------------------


def _glimpse(source: Source) -> Iterator[bytes]:
    selected = selector(source)
    prefixes = [] if source.kind in ("list", "file") else [b""]
    while prefixes:
        prefix = prefixes.pop()
        with suppress(OSError), os.scandir(os.path.join(source.root, prefix)) as entries:
            for entry in entries:
                path = prefix + entry.name
                if is_clutter(entry.name, is_folder := entry.is_dir()):
                    continue
                if is_folder:
                    if not entry.is_symlink():
                        prefixes.append(path + b"/")
                elif selected(path):
                    yield path


def _walk(paths: Paths) -> Iterator[bytes]:
    """Every entry below the root but folders themselves.

    A folder that cannot be entered (no permission, a link that leads to a folder around it or out
    of the root) is yielded as an entry of its own, so that reading it records why.

    Raises:
        EnvironmentFailed: a folder cannot be listed for a cause that may pass, such as EIO, or the
            whole input has gone. The listing is frozen: to go on without the folder would lose its
            images for good.
    """
    top = _insisting(paths.source, b"", partial(_enter, paths, b"", frozenset()))
    stack = [top] if top else []
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        path, is_link, around = entry
        if is_link is None or (is_link and _is_refused(paths.source, path)):
            yield path
        elif below := _insisting(paths.source, path, partial(_enter, paths, path, around)):
            stack.append(below)
        else:
            yield path


_Identities = frozenset[tuple[int, int]]
_Entries = Iterator[tuple[bytes, bool | None, _Identities]]
"""Of each entry: its path, whether it is a link where it is a folder (else None), folders around.
"""


def _insisting(
    source: Source, path: bytes, enter: Callable[[], _Entries | None]
) -> _Entries | None:
    try:
        return _insist(enter)
    except OSError as error:
        if path and error.errno in _LASTING:
            require_still_there(source)
            return None
        raise refusal("input", os.fsdecode(os.path.join(source.root, path)), error) from error


def _is_refused(source: Source, path: bytes) -> bool:
    if not source.confined:
        return False
    target = os.path.realpath(os.path.join(source.root, path))
    return not _is_inside(target, os.path.realpath(source.root))


def _enter(paths: Paths, path: bytes, around: _Identities) -> _Entries | None:
    """One folder's entries, sorted by bytes; None for a folder that is not to be entered.

    A million files are held as their bare names: 80 bytes each.
    """
    full = os.path.join(paths.source.root, path)
    found = os.stat(full)
    identity = (found.st_dev, found.st_ino)
    if identity in around or (path and not os.access(full, os.R_OK | os.X_OK)):
        return None
    names: list[bytes] = []
    folders: dict[bytes, bool] = {}
    left_out: list[bytes] = []
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            is_folder = _is_folder(entry)
            if is_clutter(name, is_folder):
                left_out.append(name)
                continue
            if is_folder:
                folders[name] = entry.is_symlink()
            names.append(name)
    photos = _photos_named_as_apple_doubles(full, left_out, names)
    paths.num_left_out += len(left_out) - len(photos)
    names += photos
    names.sort()
    prefix = path + b"/" if path else b""
    inside = around | {identity}
    return ((prefix + name, folders.get(name), inside) for name in names)


def _photos_named_as_apple_doubles(
    folder: bytes, left_out: list[bytes], names: list[bytes]
) -> list[bytes]:
    """Files named `._x.jpg` that are none of macOS's, beside no `x.jpg`: only these are opened."""
    doubles = [name for name in left_out if is_apple_double(name) and suffix_format(name)]
    if not doubles:
        return []
    beside = set(names)
    return [
        name
        for name in doubles
        if name.removeprefix(b"._") not in beside
        and looks_like_image(_head(os.path.join(folder, name)))
    ]


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LASTING:  # a link that cannot be followed
            return False
        raise


def _is_inside(real_path: bytes, real_root: bytes) -> bool:
    return real_path == real_root or real_path.startswith(real_root.rstrip(b"/") + b"/")


# ---- reading -------------------------------------------------------------------------------------


def _insist(action: Callable[[], _Found]) -> _Found:
    """What `action` returns, tried again after errors that may pass (EIO, ESTALE, timeouts)."""
    for pause_s in RETRY_AFTER_S:
        try:
            return action()
        except OSError as error:
            if error.errno in _LASTING:
                raise
        time.sleep(pause_s)
    return action()


class _InsistingFile(io.FileIO):
    """A file of which each range is asked for again as a whole file is."""

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        """As `io.RawIOBase`, but for what cannot be read at once: that is an error."""
        return _insist(lambda: os.readv(self.fileno(), [buffer]))

    def readall(self) -> bytes:
        """As `io.RawIOBase`; the base's own loses what it read before it fails."""
        rest = bytearray()
        some = bytearray(OPENED_BYTES)
        while num_bytes := self.readinto(some):
            rest += memoryview(some)[:num_bytes]
        return bytes(rest)


def _read_file(source: Source, full: bytes, max_bytes: int) -> bytes | Failure:
    descriptor = _open_regular(source, full)
    if isinstance(descriptor, Failure):
        return descriptor
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        return _read_whole(descriptor, max_bytes)


def _read_range(source: Source, full: bytes, start: int, length: int) -> bytes | Failure:
    descriptor = _open_regular(source, full)
    if isinstance(descriptor, Failure):
        return descriptor
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        data = os.pread(descriptor, length, start)
    if len(data) < length:
        return Failure("changed", f"ends before byte {start + length:,}; it did not when listed")
    return data


def _version(_: Source, full: bytes) -> bytes:
    found = os.stat(full)
    return b"%d,%d" % (found.st_size, found.st_mtime_ns)


def _open_regular(source: Source, full: bytes) -> int | Failure:
    """A descriptor of a regular file; opening never blocks."""
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
    if os.path.isdir(target) and _is_inside(os.path.realpath(os.path.dirname(full)), target):
        return Failure("symlink_loop", "a link to a folder around it")
    if source.confined and not _is_inside(target, os.path.realpath(source.root)):
        return Failure(
            "outside_root",
            "a link that leads out of the input folder; "
            "set loader.allow_outside_links: true to follow it",
        )
    return None


def _failure(source: Source, error: OSError, full: bytes) -> Failure:
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


def _head(full: bytes) -> bytes:
    """The first bytes of a regular file; empty where it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(full).st_mode):
            return b""
        with open(full, "rb") as file:
            return file.read(32)
    except OSError:
        return b""
