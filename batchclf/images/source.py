"""What to classify, in which order: folder, glob, .txt or .jsonl list, to a stream of paths.

Folders are walked depth first with the names of each folder sorted by bytes. Nothing is filtered
by suffix: what a file is, its content tells (decode.py). Left out, and counted, are only hidden
folders and hidden files without an image suffix (`.git/`, `.DS_Store`); a glob selects further.
"""

import base64
import errno
import fnmatch
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import orjson

from batchclf.errors import EnvironmentFailed, NoImagesError, UsageError
from batchclf.images.formats import looks_like_image, suffix_format
from batchclf.results.records import Failure

MAX_PATH_BYTES = 4095
"""Longest path that Linux opens (PATH_MAX less its NUL)."""
MAX_FILE_BYTES = 2**31
"""A larger file is no photo: reading it would only cost the memory. The default."""
RETRY_AFTER_S = (0.05, 0.2)
"""What a disk or a file server refuses is asked for again after these pauses."""
NUM_TRIES = 1 + len(RETRY_AFTER_S)
OUT_OF_MEMORY = "out of memory while reading"
LIST_SUFFIXES = (".txt", ".jsonl")
MAX_LINE_BYTES = 65536
"""Of a list: a path of 4,096 bytes, each escaped as JSON has it, and other keys beside it."""
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV),
)
"""Errors that say what is wrong with a path: trying again would not help."""
_Found = TypeVar("_Found")


@dataclass(slots=True)
class Source:
    """An input: the folder its paths are relative to, and the paths themselves."""

    root: bytes
    confined: bool
    """Whether links that lead out of `root` are refused; lists name their files themselves."""
    paths: Callable[[], Iterator[bytes]]
    glimpse: Callable[[], Iterator[bytes]] = field(default=lambda: iter(()))
    """Paths in no order and not all, where the first comes sooner than that of `paths()`."""
    num_left_out: int = field(default=0)
    """Hidden files and folders, or duplicate lines of a list, seen by the last `paths()`."""


def open_source(spec: Path, *, allow_outside_links: bool = False) -> Source:
    """The source that the job's `input` names.

    Raises:
        NoImagesError: nothing is there.
        UsageError: the input is neither a folder, a glob nor a list.
    """
    text = os.fspath(spec)
    confined = not allow_outside_links
    if spec.is_dir():
        return _folder(os.fsencode(spec), confined, lambda path: True)
    if spec.is_file():
        if spec.suffix.lower() in LIST_SUFFIXES:
            return _list(spec)
        raise UsageError(
            f"input: {text}: found a single file; "
            "give a folder, a glob such as photos/*.jpg, or a .txt or .jsonl list of paths"
        )
    root, parts = _split_glob(spec)
    if not parts:
        raise NoImagesError(f"input: {text}: found 0 images: no such folder or file")
    if not root.is_dir():
        raise NoImagesError(f"input: {text}: found 0 images: {root} is not a folder")
    return _folder(os.fsencode(root), confined, _glob(parts))


def would_list(spec: Path, path: Path) -> bool:
    """Whether the listing of `spec`, a folder or a glob, would hold a file at `path`."""
    if spec.is_dir():
        return path.is_relative_to(spec)
    root, parts = _split_glob(spec)
    if not parts or not path.is_relative_to(root):
        return False
    return _glob(parts)(os.fsencode(path.relative_to(root)))


def require_images(source: Source) -> None:
    """Refuse an input in which nothing looks like an image, by suffix or by first bytes.

    Raises:
        NoImagesError: naming the folder and what was found instead.
    """
    if any(map(suffix_format, source.glimpse())):
        return
    num_files = 0
    for path in source.paths():
        num_files += 1
        if suffix_format(path) or looks_like_image(_head(os.path.join(source.root, path))):
            return
    where = os.fsdecode(source.root)
    found = f"{num_files:,} files, none of them an image" if num_files else "no files"
    raise NoImagesError(f"input: {where}: found 0 images ({found}); check the job's `input`")


# ---- folders and globs ---------------------------------------------------------------------------


def _folder(root: bytes, confined: bool, selected: Callable[[bytes], bool]) -> Source:
    source = Source(root, confined, paths=lambda: iter(()))

    def paths() -> Iterator[bytes]:
        source.num_left_out = 0
        for path in _walk(source):
            if selected(path):
                yield path

    def glimpse() -> Iterator[bytes]:
        prefixes = [b""]
        while prefixes:
            prefix = prefixes.pop()
            with suppress(OSError), os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if entry.is_dir():
                        if not entry.is_symlink() and not entry.name.startswith(b"."):
                            prefixes.append(path + b"/")
                    elif selected(path):
                        yield path

    source.paths, source.glimpse = paths, glimpse
    return source


def _walk(source: Source) -> Iterator[bytes]:
    """Every entry below the root but folders themselves.

    A folder that cannot be entered (no permission, a link that leads to a folder around it or out
    of the root) is yielded as an entry of its own, so that reading it records why.

    Raises:
        EnvironmentFailed: a folder cannot be listed for a cause that may pass, such as EIO. The
            listing is frozen: to go on without the folder would lose its images for good.
    """
    top = _insisting(source, b"", partial(_enter, source, b"", frozenset()))
    stack = [top] if top else []
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        path, is_link, around = entry
        if is_link is None or (is_link and _is_refused(source, path)):
            yield path
        elif below := _insisting(source, path, partial(_enter, source, path, around)):
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
            return None
        raise _unreadable(os.fsdecode(os.path.join(source.root, path)), error) from error


def _is_refused(source: Source, path: bytes) -> bool:
    if not source.confined:
        return False
    target = os.path.realpath(os.path.join(source.root, path))
    return not _is_inside(target, os.path.realpath(source.root))


def _enter(source: Source, path: bytes, around: _Identities) -> _Entries | None:
    """One folder's entries, sorted by bytes; None for a folder that is not to be entered.

    A million files are held as their bare names: 80 bytes each.
    """
    full = os.path.join(source.root, path)
    found = os.stat(full)
    identity = (found.st_dev, found.st_ino)
    if identity in around or (path and not os.access(full, os.R_OK | os.X_OK)):
        return None
    names: list[bytes] = []
    folders: dict[bytes, bool] = {}
    num_left_out = 0
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            is_folder = _is_folder(entry)
            if name.startswith(b".") and (is_folder or not suffix_format(name)):
                num_left_out += 1
                continue
            if is_folder:
                folders[name] = entry.is_symlink()
            names.append(name)
    source.num_left_out += num_left_out
    names.sort()
    prefix = path + b"/" if path else b""
    inside = around | {identity}
    return ((prefix + name, folders.get(name), inside) for name in names)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LASTING:  # a link that cannot be followed
            return False
        raise


def _unreadable(name: str, error: OSError) -> EnvironmentFailed:
    return EnvironmentFailed(f"input: {name}: cannot be read: {_reason(error)}")


def _is_inside(real_path: bytes, real_root: bytes) -> bool:
    return real_path == real_root or real_path.startswith(real_root.rstrip(b"/") + b"/")


_Names = Sequence[str]


def _split_glob(spec: Path) -> tuple[Path, _Names]:
    """The folder above the first name with a wildcard, and the names from there on."""
    parts = spec.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:first]), parts[first:]


def _glob(parts: _Names) -> Callable[[bytes], bool]:
    """Whether a path matches: `**` is any number of folders, the rest as in `fnmatch`, per name."""
    patterns = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in parts]

    def matches(patterns: Sequence[re.Pattern[str] | None], names: _Names) -> bool:
        if not patterns:
            return not names
        if patterns[0] is None:
            return any(matches(patterns[1:], names[at:]) for at in range(len(names) + 1))
        return bool(names and patterns[0].match(names[0]) and matches(patterns[1:], names[1:]))

    return lambda path: matches(patterns, os.fsdecode(path).split("/"))


# ---- lists ---------------------------------------------------------------------------------------


def _list(spec: Path) -> Source:
    source = Source(os.fsencode(spec.parent), confined=False, paths=lambda: iter(()))

    def paths() -> Iterator[bytes]:
        source.num_left_out = 0
        seen: set[bytes] = set()
        for number, raw in enumerate(_lines(spec), start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise UsageError(
                    f"input: {spec}:{number}: longer than {MAX_LINE_BYTES:,} bytes; "
                    "a list has one path a line"
                )
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            path = _jsonl_path(line, spec, number) if spec.suffix.lower() == ".jsonl" else line
            if not path or b"\0" in path:
                raise UsageError(f"input: {spec}:{number}: found no usable path: {path[:80]!r}")
            # 16 bytes, however long the path; two of a million are equal in one of 10^26 lists.
            digest = blake2b(path, digest_size=16).digest()
            if digest in seen:
                source.num_left_out += 1
                continue
            seen.add(digest)
            yield path

    source.paths = paths
    return source


def _lines(spec: Path) -> Iterator[bytes]:
    """The lines of a list; of one that is too long, the beginning."""
    try:
        with spec.open("rb") as file:
            yield from iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    except OSError as error:
        raise _unreadable(str(spec), error) from error


def _jsonl_path(line: bytes, spec: Path, number: int) -> bytes:
    """The path in one line: a JSON string, or an object with `path` (and `path_b64`)."""
    where = f"input: {spec}:{number}"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b'"path_b64"' not in line:
            raise UsageError(f"{where}: not a line of JSON: {error}") from None
        # A name that is not UTF-8 is written with escapes that strict parsers refuse.
        match = re.search(rb'"path_b64":\s*"([^"]*)"', line)
        value = {"path_b64": match[1].decode("ascii", "replace") if match else ""}
    if isinstance(value, dict) and isinstance(value.get("path_b64"), str):
        try:
            return base64.b64decode(value["path_b64"], validate=True)
        except ValueError:  # not base64, or not even ASCII
            raise UsageError(f"{where}: `path_b64` is not base64") from None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise UsageError(
            f'{where}: found no path; write {{"path": "cats/1.jpg"}} or "cats/1.jpg", one a line'
        )
    return os.fsencode(path)


# ---- reading -------------------------------------------------------------------------------------


def read_image_file(
    root: bytes, path: bytes, *, confined: bool, max_bytes: int = MAX_FILE_BYTES
) -> bytes | Failure:
    """The whole content of one listed file, or why it cannot be read.

    Nothing but a regular file is read, and opening never blocks (a FIFO named x.jpg would).

    Raises:
        EnvironmentFailed: this process, or the machine, has no descriptor left to open it with.
    """
    full = os.path.join(root, path)
    try:
        return _insist(lambda: _read_file(root, full, confined, max_bytes))
    except MemoryError:
        return Failure("oom", OUT_OF_MEMORY)
    except OSError as error:
        return _failure(error, full)


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


def _read_file(root: bytes, full: bytes, confined: bool, max_bytes: int) -> bytes | Failure:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(full, flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(full):
            raise
        if refused := _refuse_link(root, full, confined):
            return refused
        descriptor = os.open(full, flags)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        found = _read_regular(descriptor, max_bytes)
    if isinstance(found, Failure) and os.path.isdir(full):
        # Listed only because it could not be walked.
        if len(full) >= MAX_PATH_BYTES:
            return Failure("path_too_long", f"a folder whose path has {len(full):,} bytes")
        if not os.access(full, os.R_OK | os.X_OK):
            return Failure("permission_denied", "a folder that may not be entered")
    return found


def _refuse_link(root: bytes, full: bytes, confined: bool) -> Failure | None:
    target = os.path.realpath(full, strict=True)
    real_root = os.path.realpath(root)
    if os.path.isdir(target) and _is_inside(os.path.realpath(os.path.dirname(full)), target):
        return Failure("symlink_loop", "a link to a folder around it")
    if confined and not _is_inside(target, real_root):
        return Failure(
            "outside_root",
            "a link that leads out of the input folder; "
            "set loader.allow_outside_links: true to follow it",
        )
    return None


def _failure(error: OSError, full: bytes) -> Failure:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            if os.path.islink(full):
                return Failure("vanished", "a link to a file that is not there")
            return Failure("vanished", "no longer there; it was when the input was listed")
        case errno.ELOOP:
            return Failure("symlink_loop", "a link that leads back to itself")
        case errno.EACCES | errno.EPERM:
            return Failure("permission_denied", f"may not be read: {_reason(error)}")
        case errno.ENAMETOOLONG:
            return Failure("path_too_long", f"the path has {len(full):,} bytes, too many to open")
        case errno.ENXIO | errno.ENODEV | errno.EISDIR:
            return Failure("not_regular_file", "not a regular file")
        case errno.ENOMEM:
            return Failure("oom", OUT_OF_MEMORY)
        case errno.EMFILE | errno.ENFILE:
            raise EnvironmentFailed(
                f"input: {os.fsdecode(full)}: cannot be opened: {_reason(error)}; raise the limit "
                "(`ulimit -n`) or choose fewer loader.workers, and run again to resume"
            ) from error
    return Failure("io_error", f"tried {NUM_TRIES} times: {_reason(error)}")


def _read_regular(descriptor: int, max_bytes: int) -> bytes | Failure:
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        return Failure("not_regular_file", f"found a {_kind(before.st_mode)}, not a regular file")
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


def _reason(error: OSError) -> str:
    code = errno.errorcode.get(error.errno, "") if error.errno else ""
    return f"{error.strerror} ({code})" if code else str(error)
