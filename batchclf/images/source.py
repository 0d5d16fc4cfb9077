"""The input as data: which folder, glob or list, and what it selects; where it lies is store.py's.

A folder is walked, a glob selects among what a walk finds, a .txt or .jsonl list names its files.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from batchclf.errors import EnvironmentFailed, NoImagesError, UsageError
from batchclf.system.paths import kind_of, reason, refusal

LIST_SUFFIXES = (".txt", ".jsonl")
Selects = Callable[[bytes], bool]
"""Whether a path, relative to an input's root, is one of its images."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input, as plain data that can be sent to other processes."""

    spec: Path
    """The job's `input`, as given."""
    kind: Literal["folder", "glob", "list"]
    root: bytes
    """The folder that its paths are relative to."""
    confined: bool
    """Whether links that lead out of `root` are refused; lists name their files themselves."""
    names: tuple[str, ...] = ()
    """Of a glob: the names below `root`, from the first with a wildcard on."""
    identity: tuple[int, int] | None = None
    """Device and number (inode) of the folder that `root` was when the source was opened; None: it
    was not there, which only a job that needs no more images survives."""


def open_source(spec: Path, *, allow_outside_links: bool = False) -> Source:
    """The source that the job's `input` names.

    Raises:
        NoImagesError: nothing is there.
        UsageError: the input is neither a folder, a glob nor a list.
        EnvironmentFailed: what is there cannot be looked at.
    """
    confined = not allow_outside_links
    kind = kind_of(spec, "input")
    if kind == "folder":
        return _identified(Source(spec, "folder", os.fsencode(spec), confined))
    if kind == "file":
        if spec.suffix.lower() in LIST_SUFFIXES:
            return _identified(Source(spec, "list", os.fsencode(spec.parent), confined=False))
        raise UsageError(
            f"input: {spec}: found a single file; "
            "give a folder, a glob such as photos/*.jpg, or a .txt or .jsonl list of paths"
        )
    root, names = _split_glob(spec)
    if not names:
        raise NoImagesError(f"input: {spec}: found 0 images: no such folder or file")
    if kind_of(root, "input") != "folder":
        raise NoImagesError(f"input: {spec}: found 0 images: {root} is not a folder")
    return _identified(Source(spec, "glob", os.fsencode(root), confined, names))


def require_still_there(source: Source) -> None:
    """Refuse to take an image for missing where its whole input has gone, or another is there.

    Raises:
        EnvironmentFailed: the input is not the folder that was opened.
    """
    try:
        now = _identity(source)
        why = "another folder is there now"
    except OSError as error:
        now, why = None, reason(error)
    if now is None or now != source.identity:
        raise EnvironmentFailed(
            f"input: {os.fsdecode(source.root)}: is no longer the folder that the job began with: "
            f"{why}; put it back (is it mounted?) and run the same command to resume"
        )


def would_list(spec: Path, path: Path) -> bool:
    """Whether the listing of `spec`, a folder or a glob, would hold a file at `path`.

    Raises:
        UsageError, EnvironmentFailed: as `open_source`, but where nothing is there.
    """
    if kind_of(spec, "input") == "folder":
        return path.is_relative_to(spec)
    root, names = _split_glob(spec)
    if not names or not path.is_relative_to(root):
        return False
    return _glob(names)(os.fsencode(path.relative_to(root)))


def selector(source: Source) -> Selects:
    """Which of the paths below its root a folder or a glob selects."""
    return _glob(source.names) if source.kind == "glob" else lambda path: True


def _identified(source: Source) -> Source:
    try:
        return replace(source, identity=_identity(source))
    except OSError as error:
        raise refusal("input", os.fsdecode(source.root), error, "looked at") from error


def _identity(source: Source) -> tuple[int, int]:
    found = os.stat(source.root)
    return found.st_dev, found.st_ino


def _split_glob(spec: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder above the first name with a wildcard, and the names from there on."""
    parts = spec.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:first]), parts[first:]


def _glob(names: Sequence[str]) -> Selects:
    """`**` is any number of folders, the rest as in `fnmatch`, per name."""
    patterns = [None if name == "**" else re.compile(fnmatch.translate(name)) for name in names]

    def matches(patterns: Sequence[re.Pattern[str] | None], names: Sequence[str]) -> bool:
        if not patterns:
            return not names
        if patterns[0] is None:
            return any(matches(patterns[1:], names[at:]) for at in range(len(names) + 1))
        return bool(names and patterns[0].match(names[0]) and matches(patterns[1:], names[1:]))

    return lambda path: matches(patterns, os.fsdecode(path).split("/"))
