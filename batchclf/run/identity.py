"""Which job an output belongs to: what its records depend on, and what may change between runs."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import cache, partial

from batchclf.errors import ResumeRefused
from batchclf.images.decode import PIXELS_RECIPE
from batchclf.models.bundle import digest_of
from batchclf.models.resolve import ResolvedModel
from batchclf.models.variants import needed_variant, nested_variant
from batchclf.results.files import RunFiles
from batchclf.results.identity import Fingerprint, Identity
from batchclf.results.lines import RECORDS_RECIPE
from batchclf.results.listing import Listing
from batchclf.results.run_record import RunRecord, read_run
from batchclf.run.kept import input_of
from batchclf.spec.job import JobSpec


def identity_of(job: JobSpec, model: ResolvedModel, limit: int | None) -> Identity:
    """What the records depend on; provider, batch size and workers are free to change.

    So are the limits of `loader`: a run with others, and --retry-failed, is how to use them.
    """
    exif = bool(job.model.preprocess and job.model.preprocess.exif_transpose)
    precision = needed_variant(job.provider.name, job.precision)
    nested = None if precision is None else nested_variant(model.bundle, precision)
    loader = job.loader
    preprocess = asdict(model.preprocess) | {
        "exif_transpose": exif,
        "decode": loader.decode,
        "sixteen_bit": loader.sixteen_bit,
    }
    return Identity(
        recipe={"pixels": PIXELS_RECIPE, "records": RECORDS_RECIPE},
        model=model.bundle.digest,
        preprocess=json.loads(json.dumps(preprocess)),  # as it is read back: no tuples
        labels=digest_of(model.labels),
        top_k=job.top_k,
        precision=job.precision,
        converted=None if nested is None else nested.digest,
        input=input_of(job),
        limit=limit,
        allow_outside_links=job.loader.allow_outside_links,
    )


def fingerprint_of(identity: Identity, listing: Listing, num_images: int) -> Fingerprint:
    """The same with the part of a listing that the records are of."""
    return Fingerprint(**vars(identity), listing=listing.extent, num_images=num_images)


def others_of(files: RunFiles, *, starts_anew: bool = False) -> Mapping[str, RunRecord]:
    """The run records of the other shards in an output folder, by the names of their files.

    Shards and the job that was merged from them leave each other alone, unless one starts anew.

    Raises:
        ResumeRefused: one is damaged, of another version of batchclf, or of another division.
    """
    found: dict[str, RunRecord] = {}
    num_merged = cache(partial(_num_merged, RunFiles(files.folder)))
    for other in files.of_others():
        counts = sorted((files.shard.count, other.shard.count))
        is_one_whole = counts[0] == 1 < counts[1]
        if not starts_anew and is_one_whole and num_merged() == counts[1]:
            continue
        if other.shard.count != files.shard.count:
            raise ResumeRefused(
                f"output: {files.folder} is divided otherwise: {other.run.name} is there; give "
                "another output"
            )
        if (record := read_run(other)) is not None:
            found[other.run.name] = record
    return found


def _num_merged(whole: RunFiles) -> int | None:
    """Of how many shards a whole job was merged; None: it was not, or has not begun."""
    record = read_run(whole)
    return None if record is None else record.num_merged


def require_same_job(files: RunFiles, identity: Identity, before: Mapping[str, Identity]) -> None:
    """Refuse a folder in which something is of another job; `before` names what is there.

    Raises:
        ResumeRefused: naming the file and what differs.
    """
    for name, other in before.items():
        changed = [f"  {line}" for line in _differences(vars(other), vars(identity))]
        if changed:
            raise ResumeRefused(
                f"output: {files.folder} holds results of a job that differs ({name}):\n"
                + "\n".join(changed)
                + f"\n  {_advice(files, name)}"
            )


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """What of an identity is another, in words; of a mapping, only the keys in it that are."""
    for name in (field.name for field in fields(Identity)):
        was, is_ = before[name], now[name]
        if was == is_:
            continue
        if not (isinstance(was, Mapping) and isinstance(is_, Mapping)):
            yield f"{name}: was {_shown(was)}, is {_shown(is_)}"
            continue
        for key in {**was, **is_}:
            if was.get(key) != is_.get(key):
                yield f"{name}.{key}: was {_shown(was.get(key))}, is {_shown(is_.get(key))}"


def _shown(value: object) -> str:
    """A value as people tell it from another: of a digest, the beginning."""
    if value is None:
        return "none"
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    return f"one with digest {str(value)[:12]}" if is_digest else repr(value)


def _advice(files: RunFiles, name: str) -> str:
    if name == files.run.name or not any(files.of_others()):
        return "Give another output, or --overwrite to start anew."
    return "Give another output: --overwrite leaves what other shards use."


def require_same_listing(
    files: RunFiles, listing: Listing, records: Mapping[str, RunRecord]
) -> None:
    """Refuse a listing that is not the one, or extends the one, that records were made of.

    Raises:
        ResumeRefused: naming the file.
    """
    for name, record in records.items():
        if not listing.continues(record.fingerprint.listing):
            raise ResumeRefused(
                f"output: {files.folder}: {name} is of a listing with digest "
                f"{record.fingerprint.listing.digest[:12]}, and {listing.path.name} has "
                f"{listing.extent.digest[:12]}: it was removed, or the input has changed. "
                f"{_advice(files, name)}"
            )


def is_larger(limit: int | None, before: int | None) -> bool:
    """Whether a run's --limit lets it have more images than an earlier one's."""
    return before is not None and (limit is None or limit > before)
