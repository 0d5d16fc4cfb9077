"""The files of a job's output folder, and how one is replaced: whole, durably, or not at all."""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from batchclf.errors import EnvironmentFailed
from batchclf.results.records import Shard
from batchclf.system.rename import UNSUPPORTED, rename_noreplace

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EROFS: "mount it for writing, or give another output",
    errno.ENOTDIR: "give another output, since what its path leads through is a file",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "let this user write there, or give another output"
    ),
    errno.ENOTSUP: "give an output on a local disk, on NFS or in a bucket (s3://...)",
}
_IN_USE = (errno.ENOTEMPTY, errno.EBUSY)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one shard in an output folder."""

    folder: Path
    shard: Shard = field(default_factory=Shard)
    address: str | None = None
    """Of a bucket, where the output is to be; the folder then is where it is made."""

    def shown(self, path: Path) -> str:
        """A file of the output, as people find it."""
        return str(path) if self.address is None else f"{self.address.rstrip('/')}/{path.name}"

    @property
    def predictions(self) -> Path:
        return self.folder / f"predictions{self.shard.suffix}.jsonl"

    @property
    def stats(self) -> Path:
        return self.folder / f"stats{self.shard.suffix}.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / f"run{self.shard.suffix}.json"

    @property
    def retry(self) -> Path:
        """New records of failed images, until they take the old ones' places."""
        return self.folder / f".retry{self.shard.suffix}.jsonl"

    @property
    def lock(self) -> Path:
        return self.folder / f".lock{self.shard.suffix}"

    @property
    def lease(self) -> Path:
        """Who holds the lock, for people and for other machines."""
        return self.folder / f".lease{self.shard.suffix}.json"

    @property
    def listing(self) -> Path:
        """The frozen listing, shared by all shards: paths, each ended by a NUL byte."""
        return self.folder / "listing.nul"

    def new_draft(self) -> Path:
        """Where a listing is written before it is placed: a name that nobody else has."""
        return self.folder / f".listing{self.shard.suffix}.{secrets.token_hex(4)}.tmp"

    @property
    def parts(self) -> Path:
        """Folder of committed ranges of the listing, where several processes make them."""
        return self.folder / f"parts{self.shard.suffix}"

    def new_drafts(self) -> Path:
        """Where ranges are written before they are committed: a name that nobody else has."""
        return self.folder / f".drafts{self.shard.suffix}.{secrets.token_hex(8)}"

    def old_drafts(self) -> Iterator[Path]:
        """Such folders of runs of this shard, and what `remove_folder` did not end with."""
        for name in (".drafts", ".parts"):
            yield from self.folder.glob(f"{name}{self.shard.suffix}.*")

    def leftovers(self) -> Iterator[Path]:
        """What a run of this shard that was killed may have left half-written."""
        for path in (self.predictions, self.run):
            yield temporary_of(path)
        yield from self.folder.glob(f".listing{self.shard.suffix}.*.tmp")

    def of_others(self) -> Iterator["RunFiles"]:
        """The files of the other shards, and of the whole job, that have begun here."""
        for path in sorted(self.folder.glob("run*.json")):
            if path != self.run and (shard := _shard_of(path)) is not None:
                yield RunFiles(self.folder, shard)


def _shard_of(run: Path) -> Shard | None:
    """The shard whose run.json has this name; None: no shard's has."""
    found = re.fullmatch(r"run(?:-(\d{5})-of-(\d{5}))?\.json", run.name)
    if found is None:
        return None
    return Shard() if found[1] is None else Shard(int(found[1]), int(found[2]))


def replace_file(path: Path, data: bytes, *, must_last: bool = True) -> None:
    """Replace a file whole, durably, or leave it as it is. A file has one writer at a time.

    `must_last`: whether it is an error where a power loss may bring the old one back.

    Raises:
        EnvironmentFailed: disk full, I/O error.
    """
    try:
        with open_temporary(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        move_into_place(path, must_last=must_last)
    except OSError as error:
        with suppress(OSError):
            temporary_of(path).unlink(missing_ok=True)
        raise output_failed(path, error) from error


def temporary_of(path: Path) -> Path:
    """Where a file's next content is written: always the same, so a kill leaves one at most."""
    return path.with_name(f".{path.name}.tmp")


def open_temporary(path: Path) -> BinaryIO:
    """A new file of our own beside `path`; a link that somebody put there is not followed."""
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    return open(temporary, "xb")  # O_EXCL


def move_into_place(path: Path, *, must_last: bool = True) -> None:
    """Make the temporary file the file, also after a power loss if it must last."""
    os.replace(temporary_of(path), path)
    try:
        sync_folder(path.parent)
    except OSError:
        if must_last:
            raise


def place_first(draft: Path, path: Path) -> None:
    """Give a file another name that nothing has yet; file systems know one way or the other.

    Raises:
        FileExistsError: something has it.
        OSError: there is no way that is sure to replace nothing, or the disk fails.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            rename_noreplace(draft, path)
        except OSError as lacking:
            if lacking.errno not in UNSUPPORTED:
                raise
            told = "its file system has neither hard links nor renaming that replaces nothing"
            raise OSError(errno.ENOTSUP, told, os.fspath(path)) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        EnvironmentFailed: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise output_failed(path, error) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours with all that is in it, if it is there.

    It loses its name first: from then on nobody puts a file into it, or takes one out of it. What
    NFS keeps in it of files that others have open, as `.nfs...`, goes with the next start's call.

    Raises:
        EnvironmentFailed: it cannot be removed.
    """
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(4)}.tmp")
    try:
        with suppress(FileNotFoundError):
            os.rename(folder, doomed)
            try:
                shutil.rmtree(doomed)
            except OSError as error:
                if error.errno not in _IN_USE:
                    raise
                shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        raise output_failed(folder, error) from error


def read_bytes(path: Path) -> bytes | None:
    """A file's content; None when there is no file.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    with reading(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None when there is no file, or nothing of the kind in it.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    try:
        value = json.loads(read_bytes(path) or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[bytes]:
    """A file's lines, read as they are asked for; none where there is no file.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    with reading(path), suppress(FileNotFoundError), path.open("rb") as file:
        yield from file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An output file that cannot be read, as what it is.

    Raises:
        EnvironmentFailed: permission denied, I/O error.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFailed(
            f"output: {path}: cannot be read: {error.strerror or error}; "
            "mend it and run the same command to resume"
        ) from error


def output_failed(path: Path, error: OSError) -> EnvironmentFailed:
    """The error for an output that cannot be written: the path, the cause, the space left."""
    left = ""
    if error.errno in _FULL:
        with suppress(OSError):
            left = f" ({shutil.disk_usage(path.parent).free:,} bytes free)"
    advice = _ADVICE.get(error.errno or 0, "mend it")
    return EnvironmentFailed(
        f"output: {path}: cannot be written: {error.strerror or error}{left}; {advice}, and run "
        "the same command to resume: what is written stays"
    )
