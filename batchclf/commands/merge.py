"""Join the shards of a job into what one run would have written; the shards' own files stay."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import orjson

from batchclf.errors import EnvironmentFailed, ResumeRefused, UsageError
from batchclf.results.files import (
    RunFiles,
    move_into_place,
    open_temporary,
    output_failed,
    read_json,
    replace_file,
    temporary_of,
)
from batchclf.results.lines import find_done
from batchclf.results.listing import Listing, open_listing
from batchclf.results.lock import only_writer
from batchclf.results.records import Shard
from batchclf.results.run_record import Durable, RunRecord, Segment, read_run, write_run
from batchclf.results.stats import Summary, together
from batchclf.results.writer import last_summary
from batchclf.run.identity import require_same_job, require_same_listing
from batchclf.system.machine import boot_id
from batchclf.system.text import spans


@dataclass(frozen=True, slots=True)
class Merged:
    """What was joined."""

    num_shards: int
    num_images: int
    num_ok: int
    num_errors: int
    errors_by_code: Mapping[str, int]
    predictions: str


@dataclass(frozen=True, slots=True)
class _Part:
    """One shard that is complete."""

    files: RunFiles
    record: RunRecord
    summary: Summary
    first: int
    """Its first image, by number in the listing."""


def merge_shards(output: Path) -> Merged:
    """Write predictions.jsonl, stats.jsonl and run.json of a whole job from those of its shards.

    Reads and writes them as streams, whatever their size. May be repeated.

    Raises:
        UsageError: there are no shards.
        ResumeRefused: some are missing, not complete or of another job; another process writes.
        EnvironmentFailed: a file cannot be read or written, or holds other records than it should.
    """
    if not output.is_dir():
        raise UsageError(f"output: {output} is no folder; give the folder that shards wrote to")
    files = RunFiles(output)
    shards = _shards_of(files)
    with only_writer(files):
        _require_not_another(files, len(shards))
        listing = open_listing(files)
        if listing is None:
            raise ResumeRefused(f"output: {files.listing} is not there; run a shard again")
        parts = _complete(files, listing, shards)
        num_bytes = _join(files, listing, parts)
        summary = together([part.summary for part in parts])
        line = {"type": "summary", **asdict(summary)}
        replace_file(files.stats, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        write_run(files, _record(parts, listing, num_bytes))
    return Merged(
        num_shards=len(parts),
        num_images=summary.num_images,
        num_ok=summary.num_ok,
        num_errors=summary.num_errors,
        errors_by_code=summary.errors_by_code,
        predictions=str(files.predictions),
    )


# ---- what there is -------------------------------------------------------------------------------


def _shards_of(files: RunFiles) -> list[RunFiles]:
    """The files of each shard, whether it has begun or not, in their order."""
    found = [other.shard for other in files.of_others() if other.shard.count > 1]
    counts = {shard.count for shard in found}
    if not counts:
        raise UsageError(
            f"output: {files.folder} holds no shards: no run-00000-of-N.json is there; a job that "
            "was run without --shard needs no merging"
        )
    if len(counts) > 1:
        told = " and ".join(f"{count:,}" for count in sorted(counts))
        raise ResumeRefused(
            f"output: {files.folder} holds shards of several divisions, into {told}; move those "
            "of one away"
        )
    (count,) = counts
    return [RunFiles(files.folder, Shard(index, count)) for index in range(count)]


def _require_not_another(files: RunFiles, num_shards: int) -> None:
    """Refuse to replace what another job, run without shards, has written there."""
    record = read_run(files)
    if record is None and not files.predictions.exists():
        return
    if record is None or record.num_merged != num_shards:
        raise ResumeRefused(
            f"output: {files.predictions} is there, and was not merged from these shards; move it "
            "away"
        )


def _complete(files: RunFiles, listing: Listing, shards: Sequence[RunFiles]) -> list[_Part]:
    """The shards, all of which are complete and of one job.

    Raises:
        ResumeRefused: naming those that are not, and how far they are.
    """
    records = {one.run.name: read_run(one) for one in shards}
    begun = {name: record for name, record in records.items() if record is not None}
    require_same_job(files, listing.job, {name: one.fingerprint for name, one in begun.items()})
    require_same_listing(files, listing, begun)
    parts: list[_Part] = []
    lacking: dict[str, list[int]] = {}
    for one, record in zip(shards, records.values(), strict=True):
        summary = last_summary(one)
        if record is None or record.status != "complete" or summary is None:
            lacking.setdefault(_how_far(one, record), []).append(one.shard.index)
        else:
            parts.append(_Part(one, record, summary, one.shard.bounds(listing.num_images)[0]))
    if lacking:
        told = "".join(f"\n  {how}: {spans(numbers)}" for how, numbers in lacking.items())
        raise ResumeRefused(
            f"output: {files.folder}: not all of the {len(shards):,} shards are complete:{told}\n"
            f"  run each again with --shard I/{len(shards)}, and merge then"
        )
    return parts


def _how_far(files: RunFiles, record: RunRecord | None) -> str:
    if record is None:
        return "not begun"
    if record.status != "running":
        return "not complete" if record.status == "complete" else record.status
    holder = read_json(files.lease) or {}
    return f"running on host {holder['host']}" if "host" in holder else "stopped without a word"


# ---- joining -------------------------------------------------------------------------------------


def _join(files: RunFiles, listing: Listing, parts: Sequence[_Part]) -> int:
    """Write all records behind each other, in place of what was there; returns their bytes."""
    try:
        with open_temporary(files.predictions) as whole:
            for part in parts:
                _append(whole, part, listing)
            whole.flush()
            os.fsync(whole.fileno())
            num_bytes = whole.tell()
        move_into_place(files.predictions)
    except BaseException as error:
        with suppress(OSError):
            temporary_of(files.predictions).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise output_failed(files.predictions, error) from error
        raise
    return num_bytes


def _append(whole: BinaryIO, part: _Part, listing: Listing) -> None:
    """Raises EnvironmentFailed where a shard has not one record for each of its images."""
    records, shard = part.files.predictions, part.files.shard
    first, last = shard.bounds(listing.num_images)
    done = find_done(records, listing.paths(first, last))
    size = records.stat().st_size if records.exists() else 0
    if done.num_images != last - first or done.num_bytes != size:
        raise EnvironmentFailed(
            f"output: {records}: {done.num_images:,} of its {last - first:,} images have a whole "
            f"record, in the order of the listing; run that shard again: --shard "
            f"{shard.index}/{shard.count} --overwrite"
        )
    if size:
        with records.open("rb") as file:
            shutil.copyfileobj(file, whole, 1 << 20)


def _record(parts: Sequence[_Part], listing: Listing, num_bytes: int) -> RunRecord:
    """run.json as of a run that made all records, in as many segments as the shards did."""
    records = [part.record for part in parts]
    ended = [record.ended_at for record in records if record.ended_at is not None]
    return replace(
        records[0],
        fingerprint=replace(
            records[0].fingerprint, listing=listing.extent, num_images=listing.num_images
        ),
        num_images=listing.num_images,
        num_merged=len(parts),
        started_at=min(record.started_at for record in records),
        ended_at=max(ended, default=None),
        durable=Durable(num_bytes, listing.num_images, boot_id()),
        segments=tuple(_segments(parts)),
        retries=tuple(retry for record in records for retry in record.retries),
    )


def _segments(parts: Sequence[_Part]) -> Iterator[Segment]:
    for part in parts:
        for segment in part.record.segments:
            yield replace(segment, first=part.first + segment.first)
