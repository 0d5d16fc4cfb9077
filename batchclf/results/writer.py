"""predictions.jsonl, stats.jsonl and run.json: written while running, resumed after a stop.

Records are written in the order of the frozen listing, so what is done is a prefix: resuming cuts
the file back to the last whole record that matches the listing and goes on from there.
"""

import base64
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
from filelock import FileLock, Timeout

from batchclf.errors import EnvironmentFailed, ResumeRefused
from batchclf.results.records import Failure, ImageRef, Record, RunStats, Shard

SCORE_STEPS = 10**6
"""Scores have 6 digits."""
READ_BYTES = 1 << 16
"""Of the listing at once; its paths as objects take several times as much."""
LOCK_S = 0.5
Timed = Callable[[float], None]
"""Told the seconds of each write and sync."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one shard in an output folder."""

    folder: Path
    shard: Shard = field(default_factory=Shard)

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
    def listing(self) -> Path:
        """The frozen listing, shared by all shards: paths, each ended by a NUL byte."""
        return self.folder / "listing.nul"


@dataclass(slots=True)
class Done:
    """What an earlier run has written: a prefix of the listing."""

    num_bytes: int = 0
    num_ok: int = 0
    errors_by_code: Counter[str] = field(default_factory=Counter)

    @property
    def num_images(self) -> int:
        return self.num_ok + self.errors_by_code.total()


# ---- lines ---------------------------------------------------------------------------------------


def encode_record(record: Record) -> bytes:
    """One line of predictions.jsonl, with its newline."""
    line: dict[str, Any] = {**_path_fields(record.ref.path)}
    if isinstance(record.outcome, Failure):
        line["status"] = "error"
        line["error"] = {"code": record.outcome.code, "message": record.outcome.message}
    else:
        line["status"] = "ok"
        line["predictions"] = [
            {
                "label": one.label,
                "index": one.index,
                # round(score, 6) takes four times as long: by way of a text.
                "score": round(one.score * SCORE_STEPS) / SCORE_STEPS,
            }
            for one in record.outcome
        ]
    if record.warnings:
        line["warnings"] = list(record.warnings)
    if "path_b64" not in line:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    # Bytes that are no UTF-8 are lone surrogates by now: only \u escapes can hold them.
    return json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


def _path_fields(path: bytes) -> dict[str, str]:
    """`path`, and `path_b64` where the file's name is not UTF-8."""
    try:
        return {"path": path.decode("utf-8")}
    except UnicodeDecodeError:
        return {
            "path": path.decode("utf-8", "surrogateescape"),
            "path_b64": base64.b64encode(path).decode("ascii"),
        }


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        if b'"path_b64"' not in line:
            return None
        try:
            record = json.loads(line)
        except ValueError:
            return None
    return record if isinstance(record, dict) else None


def find_done(predictions: Path, paths: Iterable[bytes]) -> Done:
    """How much of `predictions` is whole records of `paths`, in order; what follows is cut off."""
    done = Done()
    try:
        file = predictions.open("rb")
    except FileNotFoundError:
        return done
    except OSError as error:
        raise output_failed(predictions, error) from error
    with file:
        for line, path in zip(file, paths, strict=False):
            outcome = _outcome(line, path)
            if outcome is None:
                break
            done.num_bytes += len(line)
            if outcome == "ok":
                done.num_ok += 1
            else:
                done.errors_by_code[outcome] += 1
    return done


def _outcome(line: bytes, path: bytes) -> str | None:
    """`ok` or the code of the failure, where `line` is a whole record of `path`; else None."""
    record = _parse_record(line) if line.endswith(b"\n") else None
    if record is None or not _is_of(record, path):
        return None
    # Plain look-ups: a `match` takes as long as parsing the line.
    if record.get("status") == "ok" and isinstance(record.get("predictions"), list):
        return "ok"
    error = record.get("error")
    if record.get("status") == "error" and isinstance(error, dict):
        code = error.get("code")
        return code if isinstance(code, str) else None
    return None


def _is_of(record: Mapping[str, Any], path: bytes) -> bool:
    if "path_b64" not in record:
        try:
            return bool(record.get("path") == path.decode())
        except UnicodeDecodeError:
            return False
    return {key: record.get(key) for key in ("path", "path_b64")} == _path_fields(path)


# ---- files ---------------------------------------------------------------------------------------


class RecordWriter:
    """Appends records to a file cut back to `num_bytes_kept`; use as a context manager."""

    def __init__(
        self, path: Path, num_bytes_kept: int, timed: Timed = lambda seconds: None
    ) -> None:
        self._path = path
        self._timed = timed
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, num_bytes_kept)
            os.lseek(self._descriptor, 0, os.SEEK_END)
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
            self.sync()
        finally:
            os.close(self._descriptor)

    def write(self, records: Sequence[Record]) -> None:
        """Write one batch of records; they survive a kill of this process from here on.

        Raises:
            EnvironmentFailed: disk full, quota, I/O error.
        """
        started = time.perf_counter()
        data = memoryview(b"".join(map(encode_record, records)))
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise output_failed(self._path, error) from error
        self._timed(time.perf_counter() - started)

    def sync(self) -> None:
        """Make what is written survive a power loss.

        Raises:
            EnvironmentFailed: the disk does not take it.
        """
        started = time.perf_counter()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise output_failed(self._path, error) from error
        self._timed(time.perf_counter() - started)


def append_stats(
    files: RunFiles, kind: str, stats: RunStats, facts: Mapping[str, object]
) -> dict[str, Any]:
    """Append one line to stats.jsonl, an `interval` or the `summary`, and return it.

    Raises:
        EnvironmentFailed: disk full, quota, I/O error.
    """
    line = {"type": kind, **asdict(stats), **facts}
    try:
        with files.stats.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    except OSError as error:
        raise output_failed(files.stats, error) from error
    return line


def failed_refs(predictions: Path, refs: Iterable[ImageRef]) -> Iterator[ImageRef]:
    """The entries of the listing whose record is an error; one record per entry, in order."""
    with predictions.open("rb") as lines:
        for line, ref in zip(lines, refs, strict=True):
            if _is_error(line):
                yield ref


def replace_failed(predictions: Path, retry: Path) -> None:
    """Put the records of `retry` in the places of the error records, in order, at once.

    Raises:
        EnvironmentFailed: disk full, I/O error; the old records then stay.
    """
    temporary = predictions.with_name(f".{predictions.name}.new")
    try:
        with predictions.open("rb") as old, retry.open("rb") as new, temporary.open("wb") as file:
            file.writelines(next(new) if _is_error(line) else line for line in old)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, predictions)
        retry.unlink()
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise output_failed(predictions, error) from error


def _is_error(line: bytes) -> bool:
    record = _parse_record(line)
    return record is not None and record["status"] == "error"


def write_run(files: RunFiles, run: Mapping[str, object]) -> None:
    """Replace run.json whole."""
    # json and not orjson: a path that is not UTF-8 is kept as escapes.
    data = json.dumps(run, indent=2).encode("ascii") + b"\n"
    replace_file(files.run, data)


def read_run(files: RunFiles) -> dict[str, Any] | None:
    """What run.json says; None when there is none, or none that parses."""
    return read_json(files.run)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None when there is no file, or nothing of the kind in it.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise EnvironmentFailed(f"{path}: cannot be read: {error.strerror}") from error
    return value if isinstance(value, dict) else None


def freeze_listing(files: RunFiles, paths: Iterable[bytes]) -> None:
    """Write the listing once; whoever comes second keeps the first one's."""
    try:
        with tempfile.NamedTemporaryFile(dir=files.folder, prefix=".listing-") as temporary:
            iterator = iter(paths)
            while chunk := list(itertools.islice(iterator, 4096)):
                temporary.write(b"\0".join(chunk) + b"\0")
            temporary.flush()
            os.fsync(temporary.fileno())
            os.fchmod(temporary.fileno(), 0o644)
            with suppress(FileExistsError):  # another shard was first: its listing is the job's
                os.link(temporary.name, files.listing)
    except OSError as error:
        raise output_failed(files.listing, error) from error


def read_listing(files: RunFiles, start: int = 0, stop: int | None = None) -> Iterator[ImageRef]:
    """The entries `start` to `stop` of the frozen listing, read as they are asked for."""
    return itertools.starmap(ImageRef, enumerate(read_paths(files, start, stop), start))


def read_paths(files: RunFiles, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The paths alone of the entries `start` to `stop`."""
    paths = _nul_paths(files.listing, start)
    return itertools.islice(paths, None if stop is None else max(0, stop - start))


def count_listing(files: RunFiles) -> int:
    """Number of entries in the frozen listing."""
    with files.listing.open("rb") as file:
        return sum(chunk.count(b"\0") for chunk in iter(partial(file.read, READ_BYTES), b""))


def _nul_paths(listing: Path, start: int) -> Iterator[bytes]:
    rest = b""
    num_left = start
    with listing.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            *paths, rest = (rest + chunk).split(b"\0")
            yield from paths[num_left:]
            num_left = max(0, num_left - len(paths))


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file whole, durably, or leave it as it is.

    Raises:
        EnvironmentFailed: disk full, I/O error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise output_failed(path, error) from error


def output_failed(path: Path, error: OSError) -> EnvironmentFailed:
    """The error for an output that cannot be written."""
    return EnvironmentFailed(
        f"output: {path}: cannot be written: {error.strerror or error}; "
        "what is written stays: mend it and run the same command to resume"
    )


@contextmanager
def only_writer(files: RunFiles) -> Iterator[None]:
    """Hold the output for this process; the kernel lets go of it when the process ends.

    Raises:
        ResumeRefused: another process holds it.
        EnvironmentFailed: the folder cannot be created or written.
    """
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        # Not at once: another shard may be looking whether this one is at work.
        lock = FileLock(files.lock, timeout=LOCK_S)
        lock.acquire()
    except Timeout:
        raise ResumeRefused(
            f"output: {files.folder}: another batchclf is writing there; "
            "wait for it, or give another output"
        ) from None
    except OSError as error:
        raise output_failed(files.folder, error) from error
    try:
        yield
    finally:
        lock.release()


def discard(files: RunFiles) -> None:
    """Remove an earlier run's files, so that the job starts anew; other shards' files stay."""
    for path in (files.run, files.predictions, files.stats):
        _remove(path)
    discard_abandoned_listing(files)


def discard_abandoned_listing(files: RunFiles) -> None:
    """Remove the listing of a run that ended before it began; nothing was done by it."""
    if not any(files.folder.glob("run*.json")) and not _others_at_work(files):
        _remove(files.listing)


def _others_at_work(files: RunFiles) -> bool:
    """Whether another shard's process holds its lock: it may have frozen the listing just now."""
    for path in files.folder.glob(".lock*"):
        if path == files.lock:
            continue
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
    return False


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise output_failed(path, error) from error
