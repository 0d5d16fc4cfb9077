"""Folders of this machine: every file below one, in a fixed order.

They are walked depth first with the names of each folder sorted by bytes. Nothing is filtered by
suffix: what a file is, its content tells (decode.py). Left out, and counted, is only what systems
leave there (clutter.py); a glob selects further.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from batchclf.images.clutter import clutter_kind, is_apple_double
from batchclf.images.disk import LASTING, head, insist, is_inside
from batchclf.images.formats import looks_like_image, suffix_format
from batchclf.images.omissions import Omissions
from batchclf.images.source import Source, require_still_there, selector
from batchclf.system.paths import refusal


def glimpse(source: Source) -> Iterator[bytes]:
    """Paths in no order and not all, the first of which comes sooner than that of `walk`."""
    selected = selector(source)
    prefixes = [] if source.kind in ("list", "file") else [b""]
    while prefixes:
        prefix = prefixes.pop()
        with suppress(OSError), os.scandir(os.path.join(source.root, prefix)) as entries:
            for entry in entries:
                path = prefix + entry.name
                if clutter_kind(entry.name, is_folder := entry.is_dir()):
                    continue
                if is_folder:
                    if not entry.is_symlink():
                        prefixes.append(path + b"/")
                elif selected(path):
                    yield path


def walk(source: Source, left_out: Omissions) -> Iterator[bytes]:
    """Every entry below the root but folders themselves, and clutter, which is counted.

    A folder that cannot be entered (no permission, a link that leads to a folder around it or out
    of the root) is yielded as an entry of its own, so that reading it records why.

    Raises:
        EnvironmentFailed: a folder cannot be listed for a cause that may pass, such as EIO, or the
            whole input has gone. The listing is frozen: to go on without the folder would lose its
            images for good.
    """
    top = _insisting(source, b"", partial(_enter, source, left_out, b"", frozenset()))
    stack = [top] if top else []
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        path, is_link, around = entry
        if is_link is None or (is_link and _is_refused(source, path)):
            yield path
        elif below := _insisting(source, path, partial(_enter, source, left_out, path, around)):
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
        return insist(enter)
    except OSError as error:
        if path and error.errno in LASTING:
            require_still_there(source)
            return None
        raise refusal("input", os.fsdecode(os.path.join(source.root, path)), error) from error


def _is_refused(source: Source, path: bytes) -> bool:
    if not source.confined:
        return False
    target = os.path.realpath(os.path.join(source.root, path))
    return not is_inside(target, os.path.realpath(source.root))


def _enter(
    source: Source, left_out: Omissions, path: bytes, around: _Identities
) -> _Entries | None:
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
    clutter: dict[bytes, str] = {}
    with os.scandir(full) as entries:
        for entry in entries:
            name = entry.name
            is_folder = _is_folder(entry)
            if kind := clutter_kind(name, is_folder):
                clutter[name] = kind
                continue
            if is_folder:
                folders[name] = entry.is_symlink()
            names.append(name)
    for photo in _photos_named_as_apple_doubles(full, clutter, names):
        del clutter[photo]
        names.append(photo)
    for name in sorted(clutter):
        left_out.add(clutter[name], name)
    names.sort()
    prefix = path + b"/" if path else b""
    inside = around | {identity}
    return ((prefix + name, folders.get(name), inside) for name in names)


def _photos_named_as_apple_doubles(
    folder: bytes, clutter: Iterable[bytes], names: list[bytes]
) -> list[bytes]:
    """Files named `._x.jpg` that are none of macOS's, beside no `x.jpg`: only these are opened."""
    doubles = [name for name in clutter if is_apple_double(name) and suffix_format(name)]
    if not doubles:
        return []
    beside = set(names)
    return [
        name
        for name in doubles
        if name.removeprefix(b"._") not in beside
        and looks_like_image(head(os.path.join(folder, name)))
    ]


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in LASTING:  # a link that cannot be followed
            return False
        raise
