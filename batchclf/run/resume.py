"""What an earlier run of the same job has left, and whether it is the same job at all."""

import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import orjson

from batchclf import __version__
from batchclf.errors import ResumeRefused, UsageError
from batchclf.images.jpeg import decoder_name
from batchclf.models.bundle import digest_of
from batchclf.models.resolve import Log
from batchclf.models.variants import facts, needed_variant, nested_variant
from batchclf.results.files import RunFiles, read_json, read_lines
from batchclf.results.lines import Done, find_done
from batchclf.results.listing import read_paths
from batchclf.results.run_record import Durable, now, read_run
from batchclf.results.writer import cut_surplus
from batchclf.run.plan import Plan
from batchclf.runtime.providers import installed_flavours
from batchclf.sessions.open import Opened
from batchclf.system.machine import boot_id


def fingerprint(plan: Plan, limit: int | None) -> dict[str, object]:
    """What the records depend on; provider, batch size and workers are free to change.

    So are the limits of `loader`: a run with others, and --retry-failed, is how to use them.
    """
    job = plan.job
    exif = bool(job.model.preprocess and job.model.preprocess.exif_transpose)
    return {
        "model": plan.model.bundle.digest,
        "preprocess": asdict(plan.model.preprocess)
        | {"exif_transpose": exif, "decode": job.loader.decode},
        "allow_outside_links": job.loader.allow_outside_links,
        "labels": digest_of(plan.model.labels),
        "top_k": job.top_k,
        "precision": job.precision,
        "converted": _converted(plan),
        "input": os.fspath(job.input),
        "limit": limit,
        "num_images": plan.num_images,
    }


def _converted(plan: Plan) -> str | None:
    """Digest of the model at the job's precision, where it was exported with the bundle."""
    precision = needed_variant(plan.job.provider.name, plan.job.precision)
    if precision is None:
        return None
    nested = nested_variant(plan.model.bundle, precision)
    return None if nested is None else nested.digest


def resume(
    plan: Plan,
    previous: Mapping[str, Any] | None,
    fingerprint: Mapping[str, object],
    log: Log,
) -> Done:
    """What of this very job is already written, and can be relied on.

    After a crash of the machine that is what was noted as durable: what lies behind it may be
    anything, even records of an earlier run. After a crash of a process it is every whole record.

    What stands after the last image's record is cut off.

    Raises:
        ResumeRefused: the folder holds another job's records.
        EnvironmentFailed: the records cannot be read, or cut.
    """
    require_same_listing(plan, fingerprint)
    if previous is None:
        if plan.files.predictions.exists():
            raise ResumeRefused(
                f"output: {plan.files.predictions} is there, but no readable {plan.files.run.name} "
                "says which job wrote it; give another output, or --overwrite"
            )
        return Done()
    _require_same_job(plan, previous, fingerprint)
    paths = read_paths(plan.files, plan.first, plan.last)
    durable = durable_of(previous)
    # --retry-failed begins with all records, made durable, and puts others in their place at once.
    was_finished = previous.get("status") == "complete" or previous.get("retry") is not None
    is_whole = was_finished or durable.is_of_this_boot
    done = find_done(plan.files.predictions, paths, None if is_whole else durable.num_bytes)
    if done.num_images < durable.num_images:
        log(
            f"{plan.files.predictions}: {durable.num_images:,} records had been safe on disk, but "
            f"only {done.num_images:,} are there and whole; the others are made again"
        )
    if done.num_images == plan.num_images:
        if num_surplus := cut_surplus(plan.files.predictions, done.num_bytes):
            log(
                f"{plan.files.predictions}: {num_surplus:,} bytes stood after the record of the "
                "last image; they are cut off"
            )
    elif done.num_images:
        log(f"resuming after {done.num_images:,} of {plan.num_images:,} images")
    return done


def require_extendable(
    plan: Plan, previous: Mapping[str, Any] | None, fingerprint: Mapping[str, object]
) -> None:
    """Refuse to add files to a listing that is not this job's, and this job's alone.

    Raises:
        ResumeRefused: it is another job's.
        UsageError: it is divided among shards, whose bounds would move.
    """
    require_same_listing(plan, fingerprint)
    if previous is not None:
        _require_same_job(plan, previous, fingerprint)
    if any(plan.files.folder.glob("run-*-of-*.json")):
        raise UsageError(
            f"--extend: {plan.files.folder} holds shards, whose bounds would move; give new files "
            "another output"
        )


def _require_same_job(
    plan: Plan, previous: Mapping[str, Any], fingerprint: Mapping[str, object]
) -> None:
    # Through JSON and back, as the previous fingerprint went.
    current = json.loads(json.dumps(fingerprint))
    before = _mapping(previous.get("fingerprint"))
    changed = [
        f"  {key}: was {before.get(key)!r}, is {value!r}"
        for key, value in current.items()
        if before.get(key) != value and not _is_extended(key, before.get(key), value)
    ]
    if changed:
        raise ResumeRefused(
            f"output: {plan.files.folder} holds results of a job that differs:\n"
            + "\n".join(changed)
            + "\n  Give another output, or --overwrite to start anew."
        )


def _is_extended(key: str, before: object, now: object) -> bool:
    """Whether a listing has only grown, by --extend: what it held before still stands first."""
    return key == "num_images" and isinstance(before, int) and isinstance(now, int) and before < now


def durable_of(previous: Mapping[str, Any] | None) -> Durable:
    """Up to where an earlier run's records survive a power loss."""
    noted = _mapping((previous or {}).get("durable"))
    try:
        return Durable(**noted)
    except TypeError:
        return Durable()


def converted_digest(previous: Mapping[str, Any] | None) -> str | None:
    """Of the int8 or fp16 model that an earlier run classified with; None: with no such model."""
    found = _mapping((previous or {}).get("converted_model")).get("digest")
    return found if isinstance(found, str) else None


def require_same_converted(previous: Mapping[str, Any] | None, done: Done, opened: Opened) -> None:
    """Refuse to go on with another int8 or fp16 model than the one that wrote the first records.

    Raises:
        ResumeRefused: that one is gone, and images or ONNX Runtime changed since it was calibrated.
    """
    before = converted_digest(previous)
    if done.num_images and before not in (None, opened.bundle.digest):
        raise ResumeRefused(
            f"output: {done.num_images:,} records are of a converted model with digest "
            f"{str(before)[:12]}, which is no longer in the model cache. Made anew, its digest is "
            f"{opened.bundle.digest[:12]}: ONNX Runtime or images of its calibration changed. "
            "--overwrite starts anew; `batchclf export` at this precision keeps a converted model"
        )


def require_same_listing(plan: Plan, fingerprint: Mapping[str, object]) -> None:
    """Refuse a folder whose frozen listing is that of another input: all shards share it.

    Raises:
        ResumeRefused: naming the shard's file and what differs.
    """
    for path in sorted(plan.files.folder.glob("run*.json")):
        if path == plan.files.run:
            continue
        other = read_json(path) or {}
        before = _mapping(other.get("fingerprint"))
        for key in ("input", "limit", "allow_outside_links"):
            if before.get(key) != fingerprint[key]:
                raise ResumeRefused(
                    f"output: {plan.files.folder} holds another job's listing: {path.name} has "
                    f"{key} {before.get(key)!r}, this job {fingerprint[key]!r}; "
                    "give another output"
                )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def is_finished(previous: Mapping[str, Any] | None) -> bool:
    """Whether run.json says that there is nothing left to do, or that all records are durable."""
    if previous is None:
        return False
    num_images = previous.get("num_images")
    is_durable = num_images is not None and durable_of(previous).num_images == num_images
    return previous.get("status") == "complete" or is_durable


def finished_summary(files: RunFiles) -> dict[str, Any] | None:
    """The last summary line of a job that run.json calls complete.

    Raises:
        EnvironmentFailed: a file cannot be read.
    """
    run = read_run(files)
    if run is None or run.get("status") != "complete":
        return None
    summaries = [line for line in read_lines(files.stats) if line.startswith(b'{"type":"summary"')]
    try:
        return orjson.loads(summaries[-1]) if summaries else None
    except orjson.JSONDecodeError:  # torn by a power loss: the run writes another
        return None


# ---- facts ---------------------------------------------------------------------------------------


def run_facts(
    plan: Plan,
    opened: Opened,
    fingerprint: Mapping[str, object],
    previous: Mapping[str, Any] | None,
    done: Done,
    retried: Collection[str],
) -> dict[str, object]:
    """What run.json says of a run, its status apart; `retried`: the codes of `--retry-failed`."""
    how = summary_facts(plan, opened)
    part = _segment(plan, opened, done)
    return {
        "job": plan.job.model_dump(mode="json"),
        "fingerprint": dict(fingerprint),
        "started_at": now(),
        "num_images": plan.num_images,
        # listed then, not now
        "num_left_out": (previous or {}).get("num_left_out", plan.num_left_out),
        "model": {"name": plan.model.bundle.meta.name, **plan.model.bundle.meta.source},
        "converted_model": None
        if opened.bundle.digest == plan.model.bundle.digest
        else facts(opened.bundle),
        "num_streams": len(opened.classifiers),
        "num_workers": plan.num_workers,
        "backend": plan.backend,
        "jpeg_decoder": decoder_name(),
        **how,
        "durable": asdict(_still_durable(previous, done, is_retry=bool(retried))),
        "segments": [*_written_segments(previous, done), *([] if retried else [part])],
        "retry": {**part, "codes": sorted(retried)} if retried else None,
    }


def is_same_retry(previous: Mapping[str, Any] | None, run: Mapping[str, Any]) -> bool:
    """Whether an earlier run was stopped in the very attempt that this one is to make."""
    before = _mapping((previous or {}).get("retry"))
    return (
        (previous or {}).get("status") != "complete"
        and durable_of(previous).is_of_this_boot
        and all(before.get(key) == run["retry"][key] for key in ("codes", "limits"))
    )


def _still_durable(previous: Mapping[str, Any] | None, done: Done, *, is_retry: bool) -> Durable:
    """What was durable, as far as it is kept; a retry begins with all records synced."""
    if is_retry or (previous or {}).get("status") == "complete":
        return Durable(done.num_bytes, done.num_images, boot_id())
    before = durable_of(previous)
    return replace(
        before,
        num_bytes=min(before.num_bytes, done.num_bytes),
        num_images=min(before.num_images, done.num_images),
    )


def _segment(plan: Plan, opened: Opened, done: Done) -> dict[str, object]:
    """How this run's part of the records, from number `first` of the shard on, is made."""
    loader = plan.job.loader
    return {
        "first": done.num_images,
        "started_at": now(),
        "provider": opened.provider.active,
        "device": opened.provider.device,
        "batch_size": plan.batch_size,
        "num_streams": len(opened.classifiers),
        "num_workers": plan.num_workers,
        "backend": plan.backend,
        "limits": loader.model_dump(
            include={"max_pixels", "max_bytes", "max_seconds", "strict"}, mode="json"
        ),
    }


def _written_segments(previous: Mapping[str, Any] | None, done: Done) -> list[object]:
    """The earlier runs that wrote records which are kept."""
    segments = (previous or {}).get("segments")
    if not isinstance(segments, list) or not segments:
        return []
    starts = [*(one["first"] for one in segments[1:]), done.num_images]
    return [
        one
        for one, following in zip(segments, starts, strict=True)
        if one["first"] < min(following, done.num_images)
    ]


def summary_facts(plan: Plan, opened: Opened) -> dict[str, object]:
    """What the summary line says beside the figures: how and on what the job ran."""
    return {
        "batch_size": plan.batch_size,
        "provider": asdict(opened.provider),
        "precision": plan.job.precision,
        "precision_check": opened.precision_check and asdict(opened.precision_check),
        "decode": plan.job.loader.decode,
        "versions": {
            "batchclf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow")},
            **installed_flavours(),
        },
    }
