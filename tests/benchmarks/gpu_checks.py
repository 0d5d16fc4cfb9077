"""The rows of a visit that tell what the machine is, and whether its answers are right.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import itertools
import json
import math
import os
import platform
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import numpy as np

from batchclf.errors import BatchclfError
from batchclf.models.checks import assert_same_scores
from batchclf.models.golden import _largest_errors, _read, errors_of
from batchclf.results.records import Pixels, Scores
from batchclf.runtime.classifier import open_classifier
from batchclf.runtime.providers import installed_flavours
from batchclf.sessions.open import targets
from batchclf.spec.job import ProviderSpec
from batchclf.system.machine import cpu_name_and_flags, usable_cores
from tests.benchmarks.gpu_bench import (
    PRECISIONS,
    Bench,
    Row,
    Rows,
    batchclf,
    called,
    log,
    settle,
    varied,
)

NUM_CHECKED = 64
"""Images whose scores are compared."""
SAME_TOP1 = 0.95
"""Share of them on which a reduced precision must name the same class: weights are random."""


# ---- look ----------------------------------------------------------------------------------------


def look(bench: Bench) -> Rows:
    """The machine, the driver, `batchclf doctor`, and which libraries are loaded from where."""
    yield "machine", machine
    yield "nvidia-smi", nvidia_smi
    yield "doctor", partial(doctor, bench)
    yield "libraries", partial(libraries, bench)
    if os.environ.get("LD_LIBRARY_PATH"):
        yield "doctor without LD_LIBRARY_PATH", partial(doctor, bench, "LD_LIBRARY_PATH")


def machine() -> Row:
    """What this is measured on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name_and_flags()[0],
        "usable_cores": usable_cores(),
        "flavours": installed_flavours(),
    }


def nvidia_smi() -> Row:
    """The GPUs, as the driver tells them."""
    query = (
        "name,compute_cap,driver_version,memory.total,power.limit,"
        "pcie.link.gen.max,pcie.link.width.max,clocks.max.sm"
    )
    done = called("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", timeout_s=8)
    return {"exit_code": done.returncode, "gpus": done.stdout.strip().splitlines()}


def doctor(bench: Bench, without: str | None = None) -> Row:
    """`batchclf doctor --json`, also where nothing says in which folders libraries are."""
    found = batchclf("doctor", "--json", timeout_s=14, without=without)
    return {"agree": found["providers"][bench.arguments.provider]["opens"], **found}


def libraries(bench: Bench) -> Row:
    """Where a working provider has its libraries from."""
    settle(bench)
    maps = Path("/proc/self/maps").read_text()
    found = re.findall(r"/\S*(?:libcu|libnv|libonnxruntime)\S*\.so\S*", maps)
    return {"libraries": sorted(set(found))}


# ---- the models ----------------------------------------------------------------------------------


def bundles(bench: Bench) -> Rows:
    """Models with random weights, as bundles."""
    given = {Path(folder).name for folder in bench.arguments.bundle}
    for model in bench.arguments.models:
        if model not in given:
            yield model, partial(export, bench, model)


def export(bench: Bench, model: str) -> Row:
    """Export a model whose every parameter matters to its answers, at fp32 and fp16."""
    import torch

    from batchclf.commands.export import export_job
    from batchclf.models import zoo
    from batchclf.spec.job import ModelSpec
    from tests.sweep import wake

    started = time.perf_counter()
    built = zoo.build(ModelSpec(name=model, weights="none"))
    wake(built)
    weights = bench.work / f"{model}.pth"
    torch.save(built.module.state_dict(), weights)
    job = bench.job(
        model,
        model={"name": model, "weights": str(weights)},
        precision="fp16" if bench.on_cuda else "fp32",
    )
    folder = bench.work / "bundles" / model
    folder.parent.mkdir(exist_ok=True)
    export_job(job, folder, log)
    return {"seconds": round(time.perf_counter() - started, 1)}


# ---- correctness ---------------------------------------------------------------------------------


def correctness(bench: Bench) -> Rows:
    """Are the answers those of the CPU, and the same in every way that a job computes them?"""
    settle(bench)
    first, *_ = bench.arguments.models
    for name, model in itertools.product(bench.precisions, bench.arguments.models):
        yield f"{model} {name} against the cpu", partial(against_cpu, bench, model, name)
    ways = ("fp16", "fp32") if bench.on_cuda else ("fp32",)
    for name in ways:
        yield f"{first} {name} bound or not", partial(bound_or_not, bench, first, name)
        yield f"{first} {name} two streams", partial(two_streams, bench, first, name)
        yield f"{first} {name} padded batch", partial(padded, bench, first, name)
        yield f"{first} {name} placement by profile", partial(placement, bench, first, name)
    if bench.on_cuda:
        yield f"{first} int8 refused", partial(int8_refused, bench, first)


@cache
def cpu_scores(bench: Bench, model: str) -> tuple[Pixels, Scores]:
    """Images, and what the fp32 model says of them on the CPU."""
    pixels_NHWC = varied(bench, model, NUM_CHECKED)
    spec = ProviderSpec(name="cpu")
    job = bench.job(model, runtime={"streams": 1, "threads": usable_cores()})
    bundle = bench.resolved(model).bundle
    classify = open_classifier(bundle.model_path, targets(spec, job)[0])
    return pixels_NHWC, np.concatenate([classify(one) for one in np.split(pixels_NHWC, 8)])


def against_cpu(bench: Bench, model: str, name: str) -> Row:
    """The scores of a precision beside those of the CPU at fp32: all of them, and the top class."""
    pixels_NHWC, expected_NK = cpu_scores(bench, model)
    classify = bench.open(model, name, len(pixels_NHWC))
    found_NK = classify(pixels_NHWC)
    scale = float(np.abs(expected_NK).max())
    top1 = float((found_NK.argmax(1) == expected_NK.argmax(1)).mean())
    is_finite = bool(np.isfinite(found_NK).all())
    rounding = float(errors_of(found_NK, expected_NK, sees_shift=False).max())
    allowed = allowed_rounding(bench, model)
    if name == "fp32":
        agree = not refused(found_NK, expected_NK)
    else:
        agree = is_finite and top1 >= SAME_TOP1 and rounding <= allowed
    return {
        "agree": agree,
        "top1": round(top1, 4),
        "largest": figure(np.abs(found_NK - expected_NK).max() / scale),
        "rounding": figure(rounding),
        "allowed": figure(allowed),
        "scale": figure(scale),
        "finite": is_finite,
        "nodes": dict(classify.active.nodes),
        "cpu_nodes": classify.active.cpu_nodes,
    }


def allowed_rounding(bench: Bench, model: str) -> float:
    """How much a start allows to fp16, as which TF32 rounds, on one of the model's own images."""
    _, expected_NK, own_N = _read(bench.resolved(model).bundle)
    return float(_largest_errors(own_N, "fp16", len(expected_NK)).max())


def figure(value: float) -> float | None:
    """A figure with three digits; None where it is none, which JSON cannot say."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def refused(found_NK: Scores, expected_NK: Scores) -> bool:
    """Whether a start would refuse these scores."""
    try:
        assert_same_scores(found_NK, expected_NK, "the GPU")
    except BatchclfError as error:
        log(str(error))
        return True
    return False


def bound_or_not(bench: Bench, model: str, name: str) -> Row:
    """The same bits from a session with bound memory and one without, batch after batch."""
    pixels_NHWC, _ = cpu_scores(bench, model)
    halves = np.split(pixels_NHWC, 2)
    bound, plain = (bench.open(model, name, len(halves[0]), bind=bind) for bind in (True, False))
    pairs = [(bound(one), plain(one)) for one in (*halves, *halves[::-1])]
    return {
        "bitwise": all(np.array_equal(*pair) for pair in pairs),
        "largest": figure(max(np.abs(one - other).max() for one, other in pairs)),
    }


def two_streams(bench: Bench, model: str, name: str) -> Row:
    """Two sessions at work on different images at once, beside one session after the other."""
    pixels_NHWC, _ = cpu_scores(bench, model)
    halves = np.split(pixels_NHWC, 2)
    sessions = [bench.open(model, name, len(halves[0])) for _ in halves]
    alone = [sessions[0](one) for one in halves]
    num_wrong = 0
    with ThreadPoolExecutor(2) as pool:
        for turn in range(20):
            order = halves if turn % 2 else halves[::-1]
            expected = alone if turn % 2 else alone[::-1]
            calls = [pool.submit(run, one) for run, one in zip(sessions, order, strict=True)]
            found = [call.result() for call in calls]
            num_wrong += sum(not np.array_equal(*two) for two in zip(found, expected, strict=True))
    return {"bitwise": num_wrong == 0, "num_wrong": num_wrong}


def padded(bench: Bench, model: str, name: str) -> Row:
    """The rows of a batch that is filled up with other pixels, beside those of a full one."""
    pixels_NHWC, _ = cpu_scores(bench, model)
    classify = bench.open(model, name, len(pixels_NHWC))
    full_NK = classify(pixels_NHWC)
    short_NHWC = np.full_like(pixels_NHWC, 255)
    short_NHWC[:5] = pixels_NHWC[-5:]
    short_NK = classify(short_NHWC)[:5]
    largest = float(np.abs(short_NK - full_NK[-5:]).max())
    return {"bitwise": largest == 0, "largest": figure(largest)}


def placement(bench: Bench, model: str, name: str) -> Row:
    """Which provider really ran each node, by ONNX Runtime's own profile."""
    import onnxruntime as ort

    classify = bench.open(model, name, 8)
    settings = ort.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(bench.work / f"profile-{os.getpid()}")
    settings.add_free_dimension_override_by_name("batch", 8)
    bundle = bench.bundle(model, PRECISIONS[name][0])
    session = ort.InferenceSession(
        str(bundle.model_path),
        settings,
        providers=[(classify.active.active, dict(classify.active.options))],
        enable_fallback=0,
    )
    session.run(None, {session.get_inputs()[0].name: varied(bench, model, 8)})
    events = json.loads(Path(session.end_profiling()).read_text())
    found = [event["args"] for event in events if "provider" in event.get("args", {})]
    copies = [one["op_name"] for one in found if one["op_name"].startswith("Memcpy")]
    return {
        "ran_on": dict(Counter(one["provider"] for one in found)),
        "on_the_cpu": sorted(
            {one["op_name"] for one in found if one["provider"] != classify.active.active}
        ),
        "copies": dict(Counter(copies)),
    }


def int8_refused(bench: Bench, model: str) -> Row:
    """int8 does not run on CUDA: exit 2, and why."""
    found = batchclf("run", str(bench.job_file(model, precision="int8")), "--json", timeout_s=30)
    return {"agree": found["exit_code"] == 2, "run": found}
