"""Pixels to class scores through ONNX Runtime: the seam every other room sees as a function.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from batchclf.errors import ModelError, ProviderError
from batchclf.results.records import ActiveProvider, Pixels, Scores
from batchclf.runtime.providers import Provider

Classifier = Callable[[Pixels], Scores]
"""uint8 pixels of shape NHWC to float32 scores of shape NK; may be called from several threads."""

_ERRORS_ONLY = 3
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        found
        for found in vars(ort_errors).values()
        if isinstance(found, type) and issubclass(found, Exception)
    ),
)
"""ONNX Runtime's own errors share no base class but Exception."""


class OnnxClassifier:
    """One ONNX Runtime session over a bundle's model, on the provider asked for and no other."""

    def __init__(self, session: ort.InferenceSession, active: ActiveProvider) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name
        self.active = active

    def __call__(self, pixels_NHWC: Pixels) -> Scores:
        (scores_NK,) = self._session.run([self._output], {self._input: pixels_NHWC})
        return np.asarray(scores_NK, np.float32)


def open_classifier(
    model: Path,
    provider: Provider,
    *,
    threads: int,
    device_type: str | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
) -> OnnxClassifier:
    """Open a session for a bundle's model (one uint8 NHWC input, one output of scores NK).

    With one thread, concurrent calls each run on their caller's thread and share the weights.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
        ProviderError: the session would run on another provider.
    """
    chosen = {key: str(value) for key, value in (options or {}).items()}
    if device_type is not None:
        chosen["device_type"] = device_type
    session = _open_session(model, provider, chosen, threads)
    active = session.get_providers()
    if active[0] != provider.execution_provider:
        raise ProviderError(
            f"provider {provider.name}: asked for {provider.execution_provider}, but the session "
            f"opened on {active[0]}; `batchclf doctor` tells what is missing"
        )
    return OnnxClassifier(
        session,
        ActiveProvider(
            requested=provider.name,
            active=active[0],
            device=device_type or {"cuda": "GPU"}.get(provider.name, "CPU"),
            nodes=_nodes_per_provider(session),
        ),
    )


def _open_session(
    model: Path, provider: Provider, options: dict[str, str], threads: int
) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    # Set explicitly: ONNX Runtime's own default ignores cpusets and cgroup quotas.
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _ERRORS_ONLY
    # Decoding shares the cores; a thread that spins between batches takes them from it.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # Without enable_fallback=0 the Python wrapper retries on the CPU by itself.
        return ort.InferenceSession(
            str(model),
            settings,
            providers=[(provider.execution_provider, options)],
            enable_fallback=0,
        )
    except _ORT_ERRORS as error:
        if provider.name == "cpu" and not options:
            raise ModelError(f"{model}: ONNX Runtime does not accept it: {error}") from error
        raise ProviderError(f"provider {provider.name}: no session opens: {error}") from error


def _nodes_per_provider(session: ort.InferenceSession) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        counts[subgraph.ep_name] += len(subgraph.get_nodes())
    return dict(counts)


def open_reference(
    model: Path, output: str | None = None
) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Any one-input ONNX model as a plain function on arrays, on the CPU, for comparisons.

    Raises:
        ModelError: ONNX Runtime does not accept the model, or running it fails.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    try:
        session = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise ModelError(f"{model}: ONNX Runtime does not accept it: {error}") from error
    input_name = session.get_inputs()[0].name
    output_name = output or session.get_outputs()[0].name

    def run(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            (result,) = session.run([output_name], {input_name: array})
        except _ORT_ERRORS as error:
            raise ModelError(f"{model}: running it on {array.shape} fails: {error}") from error
        return np.asarray(result)

    return run
