"""Classify folders of images through batched ONNX Runtime sessions, one record per image."""

import importlib
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchclf import errors
    from batchclf.engines.display import Progress
    from batchclf.engines.run import run_job
    from batchclf.results.records import Failure, ImageRef, Prediction, Record, Shard
    from batchclf.results.stats import Summary
    from batchclf.run.request import RunResult
    from batchclf.spec.file import load_job
    from batchclf.spec.job import JobSpec
    from batchclf.spec.options import RunOptions

__version__ = "1.0.0"
__all__ = [
    "load_job",
    "run_job",
    "JobSpec",
    "RunOptions",
    "Shard",
    "Progress",
    "RunResult",
    "Summary",
    "Record",
    "ImageRef",
    "Prediction",
    "Failure",
    "errors",
]
STARTED = time.perf_counter()
"""When this process became batchclf: start-up time counts from here."""
# ONNX Runtime's events to Microsoft are on by default; a job's images are nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
_HOME = {
    "load_job": "spec.file",
    "run_job": "engines.run",
    "JobSpec": "spec.job",
    "RunOptions": "spec.options",
    "Shard": "results.records",
    "Progress": "engines.display",
    "RunResult": "run.request",
    "Summary": "results.stats",
    "Record": "results.records",
    "ImageRef": "results.records",
    "Prediction": "results.records",
    "Failure": "results.records",
}
"""Where each public name lives; it is imported when it is asked for, so that nothing waits."""


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"batchclf.{_HOME[name]}"), name)
    if name == "errors":
        return importlib.import_module("batchclf.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
