"""One record as one line of predictions.jsonl, and back; which lines of a file are done."""

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from batchclf.errors import EnvironmentFailed
from batchclf.results.files import RunFiles, read_lines
from batchclf.results.records import Failure, ImageRef, Prediction, Record

RECORDS_RECIPE = 1
"""Counted up when a line gains, loses or changes a key, or says a score otherwise."""
SCORE_STEPS = 10**6
"""Scores have 6 digits."""


@dataclass(slots=True)
class Done:
    """What an earlier run has written: a prefix of the listing."""

    num_bytes: int = 0
    num_ok: int = 0
    errors_by_code: Counter[str] = field(default_factory=Counter)
    last: str | None = None
    """What became of the last one: `ok`, or a code."""

    @property
    def num_images(self) -> int:
        return self.num_ok + self.errors_by_code.total()


@dataclass(frozen=True, slots=True)
class Lines:
    """Some records, one after the other, as they are written."""

    data: bytes
    num_ok: int
    errors_by_code: Mapping[str, int]

    @property
    def num_errors(self) -> int:
        return sum(self.errors_by_code.values())

    @property
    def num_images(self) -> int:
        return self.num_ok + self.num_errors


def encode(records: Sequence[Record]) -> Lines:
    """The lines of some records."""
    failures = [one.outcome for one in records if isinstance(one.outcome, Failure)]
    return Lines(
        b"".join(map(encode_record, records)),
        len(records) - len(failures),
        Counter(one.code for one in failures),
    )


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


def failure_code(line: bytes) -> str | None:
    """The code of an error record; None for any other."""
    record = parse_record(line)
    if record is None or record["status"] != "error":
        return None
    return str(record["error"]["code"])


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, whatever the name in it; None where there is none."""
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


def read_records(files: RunFiles, first: int, num_images: int) -> Iterator[Record]:
    """The records of a finished job, or of a shard of it that begins with image `first`.

    Raises:
        EnvironmentFailed: they cannot be read, or are not what was written.
    """
    number, where = -1, files.shown(files.predictions)
    for number, line in enumerate(read_lines(files.predictions)):
        try:
            yield decode_record(line, first + number)
        except (KeyError, TypeError, ValueError) as error:
            raise EnvironmentFailed(
                f"output: {where}:{number + 1}: not a record: {error!r}; run the job "
                "again to have it written anew"
            ) from error
    if number + 1 != num_images:
        raise EnvironmentFailed(
            f"output: {where}: {number + 1:,} records are there, not {num_images:,}; "
            "run the job again to have them written anew"
        )


def decode_record(line: bytes, index: int) -> Record:
    """The record of one line; `index`: the number of its image.

    Raises:
        KeyError, TypeError, ValueError: the line holds none.
    """
    found = parse_record(line)
    if found is None:
        raise ValueError("no JSON object")
    encoded = found.get("path_b64")
    path = found["path"].encode() if encoded is None else base64.b64decode(encoded, validate=True)
    outcome: tuple[Prediction, ...] | Failure
    if found["status"] == "ok":
        outcome = tuple(Prediction(**one) for one in found["predictions"])
    else:
        outcome = Failure(**found["error"])
    return Record(ImageRef(index, path), outcome, tuple(found.get("warnings", ())))


def find_done(predictions: Path, paths: Iterable[bytes], max_bytes: int | None = None) -> Done:
    """How much of `predictions` is whole records of `paths`, in order, from its beginning.

    Nothing is taken beyond `max_bytes`.

    Raises:
        EnvironmentFailed: the file cannot be read.
    """
    done = Done()
    for line, path in zip(read_lines(predictions), paths, strict=False):
        outcome = _outcome(line, path)
        if outcome is None or (max_bytes is not None and done.num_bytes + len(line) > max_bytes):
            break
        done.num_bytes += len(line)
        done.last = outcome
        if outcome == "ok":
            done.num_ok += 1
        else:
            done.errors_by_code[outcome] += 1
    return done


def _outcome(line: bytes, path: bytes) -> str | None:
    """`ok` or the code of the failure, where `line` is a whole record of `path`; else None."""
    record = parse_record(line) if line.endswith(b"\n") else None
    if record is None or not is_of(record, path):
        return None
    # Plain look-ups: a `match` takes as long as parsing the line.
    if record.get("status") == "ok" and isinstance(record.get("predictions"), list):
        return "ok"
    error = record.get("error")
    if record.get("status") == "error" and isinstance(error, dict):
        code = error.get("code")
        return code if isinstance(code, str) else None
    return None


def is_of(record: Mapping[str, Any], path: bytes) -> bool:
    """Whether a record is that of the image with this path."""
    if "path_b64" not in record:
        try:
            return bool(record.get("path") == path.decode())
        except UnicodeDecodeError:
            return False
    return {key: record.get(key) for key in ("path", "path_b64")} == _path_fields(path)
