"""`python -m tests.gpu_standin.tries NAME ARGUMENTS`: tried on the machine, told as JSON."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchclf.errors import BatchclfError
from batchclf.models.half import to_half
from batchclf.results.records import Precision
from batchclf.runtime.classifier import OnnxClassifier, open_classifier
from batchclf.runtime.cuda import page_locked
from batchclf.runtime.cuda_machine import require_cuda
from batchclf.runtime.faults import fault_of
from batchclf.runtime.providers import PROVIDERS
from batchclf.runtime.sessions import ORT_ERRORS, Target
from tests.benchmarks import gpu_speeds
from tests.gpu_standin import skeletons

TICK_S = 0.0005
ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, BatchclfError)


def opened(model: str, **target: Any) -> OnnxClassifier:
    require_cuda([target.get("device_id", 0)])
    return open_classifier(Path(model), Target(PROVIDERS["cuda"], **target))


def engines(model: str, precision: str, options: str, num_batches: str = "1") -> object:
    """Runs batches at a precision with options; the trace tells on which engines."""
    classify = opened(model, precision=precision, options=json.loads(options))
    for _ in range(int(num_batches)):
        classify(_zeros(classify))
    return classify.active.options


def longest_gap(model: str) -> object:
    """How long another thread is held up, at most, by a batch: [seconds, of how many].

    By the best of three batches: others may keep this process from its core as well.
    """
    classify = opened(model)
    zeros = _zeros(classify)
    return min(_gap(classify, zeros) for _ in range(3))


def _gap(classify: OnnxClassifier, zeros: np.ndarray[Any, Any]) -> tuple[float, float]:
    gaps, done = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.wait(TICK_S):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    other = threading.Thread(target=tick)
    other.start()
    began = time.perf_counter()
    classify(zeros)
    took_s = time.perf_counter() - began
    done.set()
    other.join()
    return max(gaps), took_s


def placement(precision: Precision, folder: str) -> object:
    """What is on the CPU of each model that there is a skeleton of, and what it fails with."""
    return {name: _left(name, precision, Path(folder)) for name in skeletons.names()}


def _left(name: str, precision: Precision, folder: Path) -> Sequence[str]:
    try:
        return _opened_skeleton(name, precision, folder).active.cpu_nodes
    except ERRORS as error:
        return [str(error)]


def one_batch(name: str, precision: Precision, folder: str) -> object:
    """Runs a batch of a model that there is a skeleton of; the trace tells on which engines."""
    classify = _opened_skeleton(name, precision, Path(folder))
    classify(_zeros(classify))
    return classify.active.nodes


def _opened_skeleton(name: str, precision: Precision, folder: Path) -> OnnxClassifier:
    model = skeletons.write_model(name, folder / "model.onnx")
    if precision == "fp16":
        to_half(model, folder / "half.onnx")
        model = folder / "half.onnx"
    require_cuda([0])
    target = Target(PROVIDERS["cuda"], precision=precision)
    return open_classifier(model, target, batch_size=8)


def refused_pages(model: str) -> object:
    """What is said of memory that is not page-locked; a batch runs in the same thread then."""
    classify = opened(model)
    said: list[str] = []
    with page_locked(np.zeros(1_000_000, np.uint8), 0, said.append):
        classify(_zeros(classify))
    return said


def copied(*kinds: str) -> object:
    """What a visit to a GPU measures of copies from host memory of some kinds."""
    require_cuda([0])
    return [gpu_speeds.copied(kind, 2) for kind in kinds]


def fault(model: str, options: str) -> object:
    """What is found to be behind the error that opening or running it ends with."""
    try:
        classify = opened(model, options=json.loads(options))
        classify(_zeros(classify))
    except ERRORS as error:
        return fault_of(error, [0])
    return None


def _zeros(classify: OnnxClassifier) -> np.ndarray[Any, Any]:
    found = classify._session.get_inputs()[0]
    shape = [8 if isinstance(size, str) else size for size in found.shape]
    return np.zeros(shape, np.uint8 if "uint8" in found.type else np.float32)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
