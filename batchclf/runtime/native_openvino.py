"""A bundle's model in OpenVINO itself, without ONNX Runtime: a program for a process of its own.

ONNX Runtime's OpenVINO wheel carries another OpenVINO, and two in one process clash. Reads a
request as JSON from stdin, writes the answer as JSON to stdout:

    python -m batchclf.runtime.native_openvino < request.json
    {"model": "model.onnx", "pixels": "pixels.npy", "scores": "scores.npy", "batch_size": 16,
     "latency_batches": [1, 16]}
"""

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import openvino as ov

from batchclf.runtime.timing import MAX_CALLS, MIN_CALLS, filled_batches, measure_latency


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the images, write their scores (float32 NK), and time the calls; all in fp32 on the CPU.

    Returns:
        `version`, `device`, `latencies` (as `Latency`) and `images_per_s` of asynchronous requests
        at `batch_size`.
    """
    core = ov.Core()
    pixels_NHWC = np.load(request["pixels"])
    batch_size = request["batch_size"]
    sizes = {*request["latency_batches"], batch_size}
    compiled = {size: _compile(core, request["model"], size, "LATENCY") for size in sizes}
    batches = filled_batches(pixels_NHWC, batch_size)
    scores_NK = np.concatenate([_run(compiled[batch_size], batch_NHWC) for batch_NHWC in batches])
    np.save(request["scores"], scores_NK[: len(pixels_NHWC)])
    latencies = []
    for size in request["latency_batches"]:
        batch_NHWC = next(filled_batches(pixels_NHWC, size))
        latencies.append(asdict(measure_latency(partial(_run, compiled[size]), batch_NHWC)))
    return {
        "version": ov.__version__,
        "device": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "latencies": latencies,
        "images_per_s": _throughput(
            _compile(core, request["model"], batch_size, "THROUGHPUT"),
            next(filled_batches(pixels_NHWC, batch_size)),
        ),
    }


def _compile(core: ov.Core, path: str, batch_size: int, hint: str) -> ov.CompiledModel:
    model = core.read_model(path)
    shape = model.input(0).partial_shape
    shape[0] = batch_size
    model.reshape(shape)
    return core.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32"}
    )


def _run(compiled: ov.CompiledModel, batch_NHWC: Any) -> Any:
    return np.array(compiled(batch_NHWC)[0])


def _throughput(compiled: ov.CompiledModel, batch_NHWC: Any) -> float:
    queue = ov.AsyncInferQueue(compiled)
    for _ in range(len(queue)):
        queue.start_async({0: batch_NHWC})
    queue.wait_all()
    count = max(MIN_CALLS, MAX_CALLS // 3) * len(queue)
    started = time.perf_counter()
    for _ in range(count):
        queue.start_async({0: batch_NHWC})
    queue.wait_all()
    return round(count * len(batch_NHWC) / (time.perf_counter() - started), 1)


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
