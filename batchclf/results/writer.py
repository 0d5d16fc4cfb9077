"""predictions.jsonl and stats.jsonl, written while a job runs.

Records are written in the order of the frozen listing, so what is done is a prefix. They survive a
kill of the process as soon as they are written, and a power loss once they are synced: run.json
notes up to where that is (`Durable` in run_record.py), always after the fact.
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from errno import EIO
from pathlib import Path
from types import TracebackType

import orjson

from batchclf.errors import EnvironmentFailed
from batchclf.results.files import (
    RunFiles,
    move_into_place,
    open_temporary,
    output_failed,
    read_lines,
    reading,
    remove,
    remove_folder,
    sync_folder,
    temporary_of,
)
from batchclf.results.identity import as_written
from batchclf.results.lines import Lines, failure_code
from batchclf.results.records import ImageRef
from batchclf.results.stats import RunStats, Summary

Timed = Callable[[float], None]
"""Told the seconds of each write and sync."""
COPY_BYTES = 1 << 20


def untimed(seconds: float) -> None:
    """A `Timed` where nobody asks."""


class RecordWriter:
    """Appends records to a file cut back to `num_bytes_kept`; use as a context manager.

    What lies between `num_bytes_durable` and there is written once more: after an fsync that
    failed, the kernel takes pages for written that are not (PostgreSQL wiki, Fsync Errors).
    """

    def __init__(
        self,
        path: Path,
        num_bytes_kept: int = 0,
        timed: Timed = untimed,
        num_bytes_durable: int = 0,
    ) -> None:
        self._path = path
        self._timed = timed
        self.num_bytes = num_bytes_kept
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(self._descriptor, num_bytes_kept)
                self._write_again(min(num_bytes_durable, num_bytes_kept))
                # What somebody else cuts off is then missing at the end, where it is looked for.
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_APPEND)
                sync_folder(path.parent)
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise output_failed(path, error) from error

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.sync()
            else:  # half of a batch may stand there
                self._sync()
        finally:
            os.close(self._descriptor)

    def write(self, lines: Lines) -> None:
        """Write some records; they survive a kill of this process from here on.

        Raises:
            EnvironmentFailed: disk full, quota, I/O error.
        """
        started = time.perf_counter()
        self._append(lines.data)
        self._timed(time.perf_counter() - started)

    def copy(self, path: Path, num_bytes: int) -> None:
        """Append the first `num_bytes` of a file of records, which is not changed.

        Raises:
            EnvironmentFailed: it cannot be read, or not be written here.
        """
        started = time.perf_counter()
        num_left = num_bytes
        with reading(path):
            source = path.open("rb")
        with source:
            while num_left:
                with reading(path):
                    chunk = source.read(min(COPY_BYTES, num_left))
                if not chunk:
                    raise _changed(path, f"ends {num_left:,} bytes early")
                self._append(chunk)
                num_left -= len(chunk)
        self._timed(time.perf_counter() - started)

    def _append(self, data: bytes) -> None:
        try:
            self._write(data)
        except OSError as error:
            raise output_failed(self._path, error) from error
        self.num_bytes += len(data)

    def _write_again(self, start: int) -> None:
        os.lseek(self._descriptor, start, os.SEEK_SET)
        while chunk := os.pread(self._descriptor, COPY_BYTES, start):
            self._write(chunk)
            start += len(chunk)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            num_written = os.write(self._descriptor, view)
            if num_written == 0:
                raise OSError(EIO, "the disk takes no more bytes")
            view = view[num_written:]

    def sync(self) -> None:
        """Make what is written survive a power loss, in the file that has the name.

        Raises:
            EnvironmentFailed: the disk does not take it, or somebody else changed the file.
        """
        self._sync()
        require_unchanged(self._path, os.fstat(self._descriptor), self.num_bytes)

    def _sync(self) -> None:
        started = time.perf_counter()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise output_failed(self._path, error) from error
        self._timed(time.perf_counter() - started)


def require_unchanged(path: Path, ours: os.stat_result, num_bytes: int) -> None:
    """Refuse to go on with a file that was moved away, replaced, cut or added to.

    `ours` is what it was, and `num_bytes` how long it is to be.

    Raises:
        EnvironmentFailed: somebody else changed it, or it cannot be looked at.
    """
    found = None
    try:
        with suppress(FileNotFoundError):
            found = os.stat(path)
    except OSError as error:
        raise output_failed(path, error) from error
    if found is None or not os.path.samestat(ours, found):
        what = "is gone" if found is None else "is another file now"
    elif found.st_size != num_bytes:
        what = f"has {found.st_size:,} bytes, not the {num_bytes:,} that were written"
    else:
        return
    raise _changed(path, what)


def _changed(path: Path, what: str) -> EnvironmentFailed:
    return EnvironmentFailed(
        f"output: {path} {what}: another program moved, replaced or changed it while this job "
        "was at work; see what that was, and run the same command to resume"
    )


def sync_records(path: Path, num_bytes: int) -> os.stat_result:
    """Make all records, which are so many bytes, survive a power loss; returns which file it is.

    Raises:
        EnvironmentFailed: the disk does not take them, or somebody else changed the file.
    """
    try:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            ours = os.fstat(file.fileno())
    except OSError as error:
        raise output_failed(path, error) from error
    require_unchanged(path, ours, num_bytes)
    return ours


def cut_surplus(path: Path, num_bytes: int) -> int:
    """Cut off, durably, what follows `num_bytes`; returns how many bytes that was.

    A file that ends there, or is not there, is not touched.

    Raises:
        EnvironmentFailed: the file cannot be written.
    """
    try:
        num_surplus = path.stat().st_size - num_bytes
        if num_surplus:
            with path.open("r+b") as file:
                file.truncate(num_bytes)
                os.fsync(file.fileno())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise output_failed(path, error) from error
    return num_surplus


# ---- stats.jsonl ---------------------------------------------------------------------------------


def append_stats(files: RunFiles, stats: RunStats, node: str | None = None) -> None:
    """Append one line to stats.jsonl: an `interval`, or a `Summary`, which is durable.

    `node`: whose figures they are, where several work on a job.

    Raises:
        EnvironmentFailed: disk full, quota, I/O error.
    """
    is_summary = isinstance(stats, Summary)
    if node is None:
        line = {"type": "summary" if is_summary else "interval", **asdict(stats)}
    else:
        line = {"type": "node", "node": node, **asdict(stats)}
    try:
        with files.stats.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            if is_summary:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise output_failed(files.stats, error) from error


def last_summary(files: RunFiles) -> Summary | None:
    """The last summary in stats.jsonl; None: there is none, or a power loss tore it.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    summaries = [line for line in read_lines(files.stats) if line.startswith(b'{"type":"summary"')]
    try:
        return as_written(Summary, orjson.loads(summaries[-1])) if summaries else None
    except ValueError:  # no JSON, or less of it than was written
        return None


def mend_stats(files: RunFiles) -> None:
    """Cut off a torn last line, so that the next one does not become part of it.

    Raises:
        EnvironmentFailed: the file cannot be written.
    """
    try:
        with files.stats.open("r+b") as file:
            data = file.read()
            if not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_failed(files.stats, error) from error


# ---- trying again --------------------------------------------------------------------------------


def failed_refs(
    predictions: Path, refs: Iterable[ImageRef], codes: Collection[str]
) -> Iterator[ImageRef]:
    """The entries of the listing whose record is an error with one of `codes`, in order.

    Raises:
        EnvironmentFailed: the file cannot be read, or does not hold one record per entry.
    """
    lines = read_lines(predictions)
    for ref in refs:
        if (line := next(lines, None)) is None:
            raise _changed(predictions, f"ends before the record of image {ref.index:,}")
        if failure_code(line) in codes:
            yield ref


def replace_failed(files: RunFiles, codes: Collection[str], num_images: int) -> int:
    """Put the records of the retry in the places of the errors with one of `codes`, all at once.

    Returns:
        The bytes that there are now, all of which survive a power loss.

    Raises:
        EnvironmentFailed: disk full, I/O error, other records than were written; the old ones stay.
    """
    predictions, retry = files.predictions, files.retry
    try:
        with (
            predictions.open("rb") as old,
            retry.open("rb") as new,
            open_temporary(predictions) as file,
        ):
            num_lines = 0
            for line in old:
                is_replaced = failure_code(line) in codes
                file.write(next(new, b"") if is_replaced else line)
                num_lines += 1
            if num_lines != num_images:
                raise _changed(predictions, f"has {num_lines:,} records, not {num_images:,}")
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        move_into_place(predictions)
        retry.unlink()
    except OSError as error:
        with suppress(OSError):
            temporary_of(predictions).unlink(missing_ok=True)
        raise output_failed(predictions, error) from error
    return num_bytes


# ---- starting anew -------------------------------------------------------------------------------


def discard(files: RunFiles) -> None:
    """Remove an earlier run's files, so that the job starts anew; the listing stays.

    run.json goes last: as long as it is there, it tells whose the rest is.

    Raises:
        EnvironmentFailed: a file cannot be removed.
    """
    remove_folder(files.parts)
    for path in (files.predictions, files.stats, files.retry, files.run):
        remove(path)


def remove_leftovers(files: RunFiles, *, is_complete: bool) -> None:
    """Remove what a run that was killed left half-written; of a complete job, retry and parts too.

    Whoever still writes drafts for that run commits none of them any more.

    Raises:
        EnvironmentFailed: a file cannot be removed.
    """
    for folder in (*files.old_drafts(), *([files.parts] if is_complete else [])):
        remove_folder(folder)
    for path in (*files.leftovers(), *([files.retry] if is_complete else [])):
        remove(path)
