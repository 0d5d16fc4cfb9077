"""Does the job's provider give PyTorch's answers, and native OpenVINO's; and how fast is each?

The comparisons are made on the same images of the job's own. Array shapes: N images, H rows,
W columns, C = 3 (RGB), K classes.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchclf.errors import BatchclfError, UsageError
from batchclf.models.checks import ATOL, RTOL
from batchclf.models.resolve import Log, ResolvedModel, open_eager, resolve_model
from batchclf.results.records import Pixels, Precision, Scores
from batchclf.runtime.classifier import open_classifier, open_reference
from batchclf.runtime.timing import (
    Latency,
    Run,
    filled_batches,
    measure_latency,
    measure_throughput,
)
from batchclf.sessions.open import Opened, Wanted, open_devices, settle_provider, targets
from batchclf.sessions.sample import sample_input
from batchclf.spec.job import JobSpec, ProviderSpec
from batchclf.system.machine import usable_cores

TIGHT = {"rtol": 1e-5, "atol": 1e-4}
"""Tolerance on logits of ONNX Runtime's own tutorial."""
PROMISED = {"rtol": RTOL, "atol": ATOL}
"""Tolerance on logits that a run at fp32 keeps."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way of running the model, its figures, and how it agrees with the reference."""

    name: str
    device: str
    precision: Precision
    latencies: Sequence[Latency]
    images_per_s: float
    largest_logit_difference: float | None
    """None where a logit is NaN or infinite."""
    is_close: Mapping[str, bool]
    """Whether all logits are close at `TIGHT` and at `PROMISED`; the latter decides at fp32."""
    top1_agreement: float
    top5_agreement: float
    """Share of the reference's five best classes found among the backend's five best."""
    agrees: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What `batchclf verify` found."""

    model: str
    num_images: int
    batch_size: int
    reference: str
    tolerances: Mapping[str, Mapping[str, float]]
    backends: Sequence[Backend]
    left_out: Mapping[str, str]
    """Backends that could not be compared, and why."""
    agree: bool


@dataclass(frozen=True, slots=True)
class _Named:
    """What a backend is called, and what it computes in."""

    name: str
    device: str
    precision: Precision


@dataclass(frozen=True, slots=True)
class _Measured:
    named: _Named
    latencies: Sequence[Latency]
    images_per_s: float
    logits_NK: Scores


def verify_job(job: JobSpec, num_images: int, log: Log) -> Verified:
    """Run `num_images` of the job's images through every backend there is, and compare.

    Raises:
        BatchclfError: the provider does not work, or the model or the images are not to be had.
    """
    fallback = settle_provider(job, log)
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    pixels_NHWC = sample_input(job, model, size=num_images).pixels
    batch_size = model.bundle.meta.fixed_batch or min(job.batch_size, len(pixels_NHWC))
    # Whatever the agreement is, the table shall show it.
    lenient = job.model_copy(update={"min_agreement": 0.0})
    wanted = Wanted(lenient, model, batch_size, sample_input(job, model), log)
    opened = open_devices(wanted, fallback)
    measured: list[_Measured] = []
    left_out: dict[str, str] = {}
    eager = open_eager(job.model, usable_cores(), log)
    if isinstance(eager, str):
        left_out["PyTorch eager"] = eager
    else:
        log("PyTorch eager")
        measured.append(_measure_eager(eager, pixels_NHWC, batch_size))
    log(f"ONNX Runtime, {opened.provider.active}")
    measured.append(_measure_job(job, opened, pixels_NHWC, batch_size))
    if importlib.util.find_spec("openvino") is None:
        left_out["native OpenVINO"] = (
            "the package openvino is not installed: pip install 'batchclf[verify]'"
        )
    else:
        log("native OpenVINO, in a process of its own")
        measured.append(_measure_native(model, pixels_NHWC, batch_size))
    if isinstance(eager, str) and (
        job.precision != "fp32" or opened.provider.active != "CPUExecutionProvider"
    ):
        measured.insert(0, _measure_cpu(job, model, pixels_NHWC, batch_size))
    if len(measured) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        name = measured[0].named.name
        raise UsageError(f"verify: there is nothing to compare {name} with: {reasons}")
    backends = [_compared(one, measured[0].logits_NK, job) for one in measured]
    return Verified(
        model=model.bundle.meta.name,
        num_images=len(pixels_NHWC),
        batch_size=batch_size,
        reference=measured[0].named.name,
        tolerances={"tight": TIGHT, "promised": PROMISED},
        backends=backends,
        left_out=left_out,
        agree=all(one.agrees for one in backends),
    )


# ---- the backends --------------------------------------------------------------------------------


def _measure(
    named: _Named,
    pixels_NHWC: Pixels,
    runs: Sequence[Run],
    run_one: Run | None,
    batch_size: int,
) -> _Measured:
    """Figures of a backend: `runs` take batches of `batch_size`, `run_one` takes single images."""
    rows = [runs[0](batch_NHWC) for batch_NHWC in filled_batches(pixels_NHWC, batch_size)]
    batch_NHWC = next(filled_batches(pixels_NHWC, batch_size))
    latencies = [] if run_one is None else [measure_latency(run_one, pixels_NHWC[:1])]
    if batch_size > 1:
        latencies.append(measure_latency(runs[0], batch_NHWC))
    return _Measured(
        named,
        latencies,
        round(measure_throughput(runs, batch_NHWC).images_per_s, 1),
        np.concatenate(rows)[: len(pixels_NHWC)].astype(np.float32),
    )


def _measure_eager(eager: Run, pixels_NHWC: Pixels, batch_size: int) -> _Measured:
    named = _Named("PyTorch eager", "CPU", "fp32")
    return _measure(named, pixels_NHWC, [eager], eager, batch_size)


def _measure_job(job: JobSpec, opened: Opened, pixels_NHWC: Pixels, batch_size: int) -> _Measured:
    """The job's own sessions, and another one for single images."""
    spec = job.provider if opened.provider.fallback is None else ProviderSpec(name="cpu")
    run_one: Run | None = None
    if opened.bundle.meta.fixed_batch is None:
        target = targets(spec, job)[0]
        target = replace(target, streams=1, threads=target.streams * target.threads)
        run_one = open_classifier(opened.bundle.model_path, target, batch_size=1)
    name = f"ONNX Runtime {opened.provider.active.removesuffix('ExecutionProvider')}"
    return _measure(
        _Named(name, opened.provider.device, job.precision),
        pixels_NHWC,
        opened.classifiers,
        run_one,
        batch_size,
    )


def _measure_cpu(
    job: JobSpec, model: ResolvedModel, pixels_NHWC: Pixels, batch_size: int
) -> _Measured:
    """The reference where there is no PyTorch: fp32 on the CPU."""
    (target,) = targets(ProviderSpec(name="cpu"), job)
    target = replace(target, precision="fp32", threads=target.threads * target.streams)
    run = open_classifier(model.bundle.model_path, target)
    one = run if model.bundle.meta.fixed_batch is None else None
    return _measure(_Named("ONNX Runtime CPU", "CPU", "fp32"), pixels_NHWC, [run], one, batch_size)


def _measure_native(model: ResolvedModel, pixels_NHWC: Pixels, batch_size: int) -> _Measured:
    with tempfile.TemporaryDirectory(prefix="batchclf-verify-") as folder:
        pixels, scores = Path(folder, "pixels.npy"), Path(folder, "scores.npy")
        np.save(pixels, pixels_NHWC)
        single = [1] if model.bundle.meta.fixed_batch is None and batch_size > 1 else []
        request = {
            "model": str(model.bundle.model_path),
            "pixels": str(pixels),
            "scores": str(scores),
            "batch_size": batch_size,
            "latency_batches": [*single, batch_size],
        }
        done = subprocess.run(
            [sys.executable, "-m", "batchclf.runtime.native_openvino"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BatchclfError(
                f"verify: native OpenVINO failed with exit code {done.returncode}:\n{done.stderr}"
            )
        found: dict[str, Any] = json.loads(done.stdout)
        return _Measured(
            _Named(
                f"native OpenVINO {found['version'].partition('-')[0]}", found["device"], "fp32"
            ),
            [Latency(**one) for one in found["latencies"]],
            found["images_per_s"],
            np.load(scores),
        )


# ---- the comparison ------------------------------------------------------------------------------


def _compared(one: _Measured, reference_NK: Scores, job: JobSpec) -> Backend:
    close = {
        name: bool(
            np.allclose(one.logits_NK, reference_NK, rtol=tolerance["rtol"], atol=tolerance["atol"])
        )
        for name, tolerance in (("tight", TIGHT), ("promised", PROMISED))
    }
    top1 = float((one.logits_NK.argmax(axis=1) == reference_NK.argmax(axis=1)).mean())
    largest = float(np.abs(one.logits_NK - reference_NK).max())
    agrees = close["promised"] if one.named.precision == "fp32" else top1 >= job.min_agreement
    return Backend(
        name=one.named.name,
        device=one.named.device,
        precision=one.named.precision,
        latencies=one.latencies,
        images_per_s=one.images_per_s,
        largest_logit_difference=largest if np.isfinite(largest) else None,
        is_close=close,
        top1_agreement=round(top1, 4),
        top5_agreement=round(_top5_agreement(one.logits_NK, reference_NK), 4),
        agrees=agrees,
    )


def _top5_agreement(found_NK: Scores, expected_NK: Scores) -> float:
    count: int = min(5, found_NK.shape[1])
    best = [np.argsort(-scores_NK, axis=1)[:, :count] for scores_NK in (found_NK, expected_NK)]
    shared = sum(len(np.intersect1d(*rows)) for rows in zip(*best, strict=True))
    return float(shared) / (count * len(found_NK))
