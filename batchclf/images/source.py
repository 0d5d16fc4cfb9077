"""The input as data: which folder, glob, list or archive, and what it selects.

A folder is walked, a glob selects among what a walk finds, a .txt or .jsonl list names its files.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import orjson

from batchclf.errors import EnvironmentFailed, NoImagesError, UsageError
from batchclf.images.addresses import kind_at, split_address_glob, split_file
from batchclf.images.archives.members import Rows
from batchclf.images.archives.names import archive_kind, is_archive
from batchclf.images.dialect import Dialect
from batchclf.images.globs import Selects, expand, selects, split_glob
from batchclf.images.lists import dialect_of
from batchclf.spec.input import ParquetSpec, Place, places_of
from batchclf.spec.job import JobSpec
from batchclf.system.paths import kind_of, nearest, reason, refusal

LIST_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True, slots=True)
class Source:
    """One place with images, as plain data that can be sent to other processes."""

    spec: Place
    """As the job gives it."""
    kind: Literal["folder", "glob", "list", "file"]
    root: bytes
    """The folder, or the address, that its paths are relative to."""
    confined: bool
    """Whether links that lead out of `root` are refused; lists name their files themselves."""
    names: tuple[str, ...] = ()
    """Of a glob: the names below `root`, from the first with a wildcard on; of a file, its own."""
    roots: tuple[bytes, ...] = ()
    """Of a list: the folders in which its files were looked for; `root` is the list's own."""
    dialect: Dialect | None = None
    """Of a list: how it writes its paths, and which of `roots` they are relative to."""
    rows: Rows | None = None
    """Of Parquet files: whatever it selects is one; None: what a file is, its name tells."""
    max_seconds: float = 60.0
    """Of files on other machines: what reading and decoding one may take."""
    identity: tuple[int, int] | None = None
    """Device and number (inode) of the folder that `root` was when the source was opened; None: it
    was not there, which only a job that needs no more images survives."""

    @property
    def is_remote(self) -> bool:
        """Whether it lies on another machine."""
        return isinstance(self.spec, str)

    @property
    def opens_archives(self) -> bool:
        """Whether files with an archive's suffix are opened: where the job, or a list, names them.

        One that merely lies in a folder of photos is not meant to be unpacked.
        """
        if self.rows is not None:
            return True
        if self.kind in ("file", "glob"):
            return any(is_archive(os.fsencode(name)) for name in self._own_names)
        return self.kind == "list"

    @property
    def around(self) -> bytes:
        """The folder that the paths of its records are relative to."""
        return self.root if self.dialect is None else self.dialect.root

    def locate(self, path: bytes) -> bytes:
        """Where the file lies that one of its paths names: the path itself, or a whole one.

        What is listed keeps it, so that a list need not be understood again to go on.
        """
        if self.dialect is None or (self.dialect.root == self.root and self.dialect.form is None):
            return path
        return self.dialect.locate(path)

    def remarks(self) -> Iterator[str]:
        """What was understood of it that a user should know."""
        if self.dialect is None:
            return
        if self.around != self.root:
            folder = os.fsdecode(self.around)
            yield f"input: {self.spec}: its paths are relative to {folder}, not to its own folder"
        for remark in self.dialect.remarks():
            yield f"input: {self.spec}: {remark}"

    @property
    def may_hold_rows(self) -> bool:
        """Whether there may be Parquet files, of which two rows may have the same path."""
        if self.rows is not None or self.kind == "list":
            return True
        names = map(os.fsencode, self._own_names)
        return any(archive_kind(name) == "parquet" for name in names)

    @property
    def _own_names(self) -> Sequence[str]:
        """Of a glob or a file: how the paths may end that it selects."""
        return expand(self.names) if self.kind == "glob" else self.names


@dataclass(frozen=True, slots=True)
class Sources:
    """Several places, one after the other."""

    parts: tuple[Source, ...]
    prefixes: tuple[bytes, ...]
    """What comes before the paths of each, so that they are relative to one folder for all."""

    def remarks(self) -> Iterator[str]:
        """As of each `Source`."""
        return chain.from_iterable(part.remarks() for part in self.parts)


AnySource = Source | Sources


def source_of(job: JobSpec) -> AnySource:
    """The source that a job's `input` names.

    Raises:
        NoImagesError: nothing is there.
        UsageError: no machine could look it up.
        EnvironmentFailed: what is there cannot be looked at.
    """
    given = job.input
    rows = Rows(given.column, given.id) if isinstance(given, ParquetSpec) else None
    confined = not job.loader.allow_outside_links
    found = (_open_place(place, confined) for place in places_of(given))
    parts = tuple(
        replace(one, rows=rows or one.rows, max_seconds=job.loader.max_seconds) for one in found
    )
    return parts[0] if len(parts) == 1 else together(parts)


def _open_place(place: Place, confined: bool) -> Source:
    if isinstance(place, str):
        return _open_address(place)
    return open_source(place, allow_outside_links=not confined)


def open_source(spec: Path, *, allow_outside_links: bool = False) -> Source:
    """The source at one path.

    Raises:
        NoImagesError: nothing is there.
        UsageError: no machine could look it up.
        EnvironmentFailed: what is there cannot be looked at.
    """
    confined = not allow_outside_links
    kind = kind_of(spec, "input")
    if kind == "folder":
        # Spark writes a folder of this name, with the files in it.
        rows = Rows() if archive_kind(os.fsencode(spec.name)) == "parquet" else None
        return _identified(Source(spec, "folder", os.fsencode(spec), confined, rows=rows))
    if kind != "nothing":
        if spec.suffix.lower() in LIST_SUFFIXES:
            return _identified(_open_list(spec))
        # The user named it, so a link may lead wherever it does.
        return _identified(Source(spec, "file", os.fsencode(spec.parent), False, (spec.name,)))
    root, names = split_glob(spec)
    if not names:
        raise NoImagesError(
            f"input: {spec}: found 0 images: no such folder or file; name one that is there"
            f"{nearest(spec)}"
        )
    if kind_of(root, "input") != "folder":
        raise NoImagesError(f"input: {spec}: found 0 images: {root} is not a folder")
    return _identified(Source(spec, "glob", os.fsencode(root), confined, names))


def _open_list(spec: Path) -> Source:
    own = os.path.abspath(os.fsencode(spec.parent))
    found = [own] if spec.suffix.lower() == ".txt" else [*_earlier_root(spec), own]
    with suppress(FileNotFoundError):  # this process's folder was removed
        found.append(os.getcwdb())
    roots = tuple(dict.fromkeys(found))
    return Source(spec, "list", own, False, roots=roots, dialect=dialect_of(spec, roots))


def _earlier_root(spec: Path) -> Iterator[bytes]:
    """The input folder of the job that wrote a list, where that is its predictions.jsonl."""
    named = re.fullmatch(r"predictions(.*)\.jsonl", spec.name)
    if named is None:
        return
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or none that says it
        job = orjson.loads(spec.with_name(f"run{named[1]}.json").read_bytes())["job"]
        given = job["input"] if isinstance(job["input"], list) else [job["input"]]
        yield os.path.commonpath([os.fsencode(_root_of(Path(one))) for one in given])


def _root_of(spec: Path) -> Path:
    """The folder that the paths of an input are relative to, as far as its own path says it."""
    if spec.is_dir():
        return spec
    return spec.parent if spec.exists() else split_glob(spec)[0]


def _open_address(address: str) -> Source:
    """The source at an address.

    Raises:
        NoImagesError: nothing is there.
        UsageError: what reads it is not installed, or it is a list.
        EnvironmentFailed: the server refuses, or does not answer.
    """
    root, names = split_address_glob(address)
    if names:
        return Source(address, "glob", os.fsencode(root), False, names)
    folder, name = split_file(root)
    if name.lower().endswith(LIST_SUFFIXES):
        raise UsageError(f"input: {address}: a list is read from this machine only; fetch it first")
    match kind_at(address):
        case "folder":
            return Source(address, "folder", os.fsencode(root), False)
        case "file":
            return Source(address, "file", os.fsencode(folder), False, (name,))
    raise NoImagesError(f"input: {address}: found 0 images: nothing lies there")


def together(parts: tuple[Source, ...]) -> Sources:
    """Several sources; the paths of local ones are relative to the folder around all of these."""
    roots = [os.path.abspath(part.around) for part in parts if not part.is_remote]
    around = os.path.commonpath(roots) if roots else b"/"
    prefixes = []
    for part in parts:
        own = part.around
        root = own if part.is_remote else os.path.relpath(os.path.abspath(own), around)
        prefixes.append(b"" if root == b"." else root.rstrip(b"/") + b"/")
    return Sources(parts, tuple(prefixes))


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
    root, names = split_glob(spec)
    if not names or not path.is_relative_to(root):
        return False
    return selects(names)(os.fsencode(path.relative_to(root)))


def selector(source: Source) -> Selects:
    """Which of the paths below its root a folder or a glob selects."""
    return selects(source.names) if source.kind == "glob" else lambda path: True


def _identified(source: Source) -> Source:
    try:
        return replace(source, identity=_identity(source))
    except OSError as error:
        raise refusal("input", os.fsdecode(source.root), error, "looked at") from error


def _identity(source: Source) -> tuple[int, int]:
    found = os.stat(source.root)
    return found.st_dev, found.st_ino
