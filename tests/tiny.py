"""A tiny ONNX classifier, prepared in milliseconds, and jobs and runs around it."""

import base64
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from batchclf.images.prefetch import Load
from batchclf.results.records import ImageRef, Loaded, Pixels
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.reporter import Reporter
from batchclf.run.request import Run, RunResult
from batchclf.runtime.providers import PROVIDERS
from batchclf.runtime.sessions import Target
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.conftest import ROOT
from tests.links import link_images

CPU = Target(PROVIDERS["cpu"])
NUM_CLASSES = 10
DIGITS = ROOT / "samples" / "digits"
SLOW: Mapping[str, Any] = {"resize": 500, "crop": 500}
"""Preprocessing that makes an image cost milliseconds: it is enlarged, and all of it is kept."""


def write_classifier(
    path: Path,
    *,
    nan_when_dark: bool = False,
    seed: int = 0,
    num_classes: int = NUM_CLASSES,
    edge: int = 8,
) -> Path:
    """Classes from the mean colour of small images; NaN below a mean of 0.05 where asked for."""
    weights_CK = np.random.default_rng(seed).normal(size=(3, num_classes)).astype(np.float32) * 3
    nodes = [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)]
    if nan_when_dark:
        nodes += [
            helper.make_node("Sub", ["mean", "dark"], ["above"]),
            helper.make_node("Sqrt", ["above"], ["colour"]),
        ]
    nodes.append(
        helper.make_node("Gemm", ["colour" if nan_when_dark else "mean", "weights"], ["logits"])
    )
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, edge, edge])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", num_classes])],
        [
            numpy_helper.from_array(weights_CK, "weights"),
            numpy_helper.from_array(np.array([0.05], np.float32), "dark"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def tiny_model(folder: Path, *, nan_when_dark: bool = False, **preprocess: Any) -> dict[str, Any]:
    """The `model` of a job file: a tiny classifier written into `folder`."""
    return {
        "onnx": str(
            write_classifier(
                folder / "tiny.onnx", nan_when_dark=nan_when_dark, edge=preprocess.get("crop", 8)
            )
        ),
        "preprocess": {"resize": 8, "mean": [0.0] * 3, "std": [1.0] * 3, **preprocess},
    }


def write_tiny_job(
    folder: Path,
    *,
    preprocess: Mapping[str, Any] | None = None,
    name: str = "job.yaml",
    **keys: Any,
) -> Path:
    """A job file in `folder` that classifies the sample digits with a tiny classifier."""
    job = {
        "input": str(DIGITS),
        "output": str(folder / "out"),
        **keys,
    }
    if "model" not in job:
        job["model"] = tiny_model(folder, **(preprocess or {}))
    path = folder / name
    path.write_text(json.dumps(job))
    return path


@dataclass(frozen=True, slots=True)
class SlowLoader:
    """Loads an image, and sleeps as if it were a large one."""

    load: Load
    outside_s: float

    def __call__(self, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        time.sleep(self.outside_s)
        return self.load(ref, slot_HWC)

    def fetched(
        self, refs: Sequence[ImageRef], reading: object = None
    ) -> AbstractContextManager[Sequence[ImageRef]]:
        return nullcontext(refs)


class Log(Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.num_done = 0

    def log(self, text: str) -> None:
        self.lines.append(text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        self.num_done = num_done


def run_here(job: Path, options: RunOptions | None = None, log: Log | None = None) -> RunResult:
    """Run a job file in this process."""
    spec, options = load_job(job), options or RunOptions()
    with hold_output(spec, options.shard):
        return run_job(Run(spec, options, log or Log(), StopRequest()))


def link_digits(folder: Path, num_images: int) -> Path:
    """The same with the sample digits."""
    return link_images(DIGITS, folder, num_images)


def assert_same_records(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same records in the same order, up to 1e-5 in their scores."""
    assert [record["path"] for record in found] == [record["path"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert without_scores(one) == without_scores(other)
        np.testing.assert_allclose(_scores(one), _scores(other), rtol=0, atol=1e-5)


def name_in(record: Mapping[str, Any]) -> bytes:
    """The bytes of the file's name in a record, as a reader gets them back."""
    if "path_b64" in record:
        return base64.b64decode(record["path_b64"], validate=True)
    return os.fsencode(record["path"])


def without_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its scores left out."""
    ranked = [(one["label"], one["index"]) for one in record.get("predictions", ())]
    return {**record, "predictions": ranked}


def _scores(record: Mapping[str, Any]) -> list[float]:
    return [one["score"] for one in record.get("predictions", ())]
