"""What an earlier run of the same job has left, and whether it is the same job at all."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import orjson

from batchclf import __version__
from batchclf.devices import Opened
from batchclf.errors import BatchclfError, Interrupted, ResumeRefused
from batchclf.images.jpeg import decoder_name
from batchclf.models.bundle import digest_of
from batchclf.models.resolve import Log
from batchclf.models.variants import facts, needed_variant, nested_variant
from batchclf.plan import Plan
from batchclf.results.writer import (
    Done,
    RunFiles,
    find_done,
    read_json,
    read_paths,
    read_run,
    write_run,
)
from batchclf.runtime.providers import installed_flavours


def fingerprint(plan: Plan, limit: int | None) -> dict[str, object]:
    """What the records depend on; provider, batch size and workers are free to change."""
    job = plan.job
    exif = bool(job.model.preprocess and job.model.preprocess.exif_transpose)
    return {
        "model": plan.model.bundle.digest,
        "preprocess": asdict(plan.model.preprocess)
        | {
            "exif_transpose": exif,
            "decode": job.loader.decode,
            "max_pixels": job.loader.max_pixels,
        },
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
    """What of this very job is already written.

    Raises:
        ResumeRefused: the folder holds another job's records.
    """
    _require_same_listing(plan, fingerprint)
    if previous is None:
        if plan.files.predictions.exists():
            raise ResumeRefused(
                f"output: {plan.files.predictions} is there, but no readable {plan.files.run.name} "
                "says which job wrote it; give another output, or --overwrite"
            )
        return Done()
    # Through JSON and back, as the previous fingerprint went.
    current = json.loads(json.dumps(fingerprint))
    before = _mapping(previous.get("fingerprint"))
    changed = [
        f"  {key}: was {before.get(key)!r}, is {value!r}"
        for key, value in current.items()
        if before.get(key) != value
    ]
    if changed:
        raise ResumeRefused(
            f"output: {plan.files.folder} holds results of a job that differs:\n"
            + "\n".join(changed)
            + "\n  Give another output, or --overwrite to start anew."
        )
    paths = read_paths(plan.files, plan.first, plan.last)
    done = find_done(plan.files.predictions, paths)
    if 0 < done.num_images < plan.num_images:
        log(f"resuming after {done.num_images:,} of {plan.num_images:,} images")
    return done


def require_same_converted(previous: Mapping[str, Any] | None, done: Done, opened: Opened) -> None:
    """Refuse to go on with another int8 or fp16 model than the one that wrote the first records.

    Raises:
        ResumeRefused: it was calibrated anew, since images or ONNX Runtime changed.
    """
    before = _mapping((previous or {}).get("converted_model")).get("digest")
    if done.num_images and before not in (None, opened.bundle.digest):
        raise ResumeRefused(
            f"output: {done.num_images:,} records are of a converted model with digest "
            f"{before[:12]}, and it is now {opened.bundle.digest[:12]}: ONNX Runtime or images of "
            "its calibration changed. --overwrite starts anew; `batchclf export` at this precision "
            "keeps a converted model for several runs"
        )


def _require_same_listing(plan: Plan, fingerprint: Mapping[str, object]) -> None:
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


def finished_summary(files: RunFiles) -> dict[str, Any] | None:
    """The last summary line of a job that run.json calls complete."""
    run = read_run(files)
    if run is None or run.get("status") != "complete" or not files.stats.exists():
        return None
    with files.stats.open("rb") as lines:
        summaries = [line for line in lines if line.startswith(b'{"type":"summary"')]
    try:
        return orjson.loads(summaries[-1]) if summaries else None
    except orjson.JSONDecodeError:  # torn by a power loss: the run writes another
        return None


@contextmanager
def kept_status(files: RunFiles, run: dict[str, object]) -> Iterator[None]:
    """Keep run.json's status true: running, then complete, interrupted or failed."""
    write_run(files, run | {"status": "running"})
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)  # a signal
        ending = {
            "status": "interrupted" if stopped else "failed",
            "error": str(error) or type(error).__name__,
            "ended_at": _now(),
        }
        try:
            write_run(files, run | ending)
        except BatchclfError as unwritable:  # the disk that failed the job fails this as well
            error.add_note(str(unwritable))
        raise
    write_run(files, run | {"status": "complete", "ended_at": _now()})


# ---- facts ---------------------------------------------------------------------------------------


def run_facts(plan: Plan, opened: Opened, fingerprint: Mapping[str, object]) -> dict[str, object]:
    """What run.json says of a run, its status apart."""
    return {
        "job": plan.job.model_dump(mode="json"),
        "fingerprint": dict(fingerprint),
        "started_at": _now(),
        "num_images": plan.num_images,
        "num_left_out": plan.source.num_left_out,
        "model": {"name": plan.model.bundle.meta.name, **plan.model.bundle.meta.source},
        "converted_model": None
        if opened.bundle.digest == plan.model.bundle.digest
        else facts(opened.bundle),
        "num_streams": len(opened.classifiers),
        "num_workers": plan.num_workers,
        "backend": plan.backend,
        "jpeg_decoder": decoder_name(),
        **summary_facts(plan, opened),
    }


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
