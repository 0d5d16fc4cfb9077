"""Running a graph on calibration images: its tensors, their peaks and their ranges.

Array shapes: N images of a batch, H rows, W columns, C channels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from batchclf.errors import ModelError
from batchclf.models.graph import Floats, Graph, save_model
from batchclf.results.records import Pixels

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value that a tensor's 8 bits stand for."""

_BATCH = 2
"""Images per calibration batch: every tensor of a batch is in memory at once."""
_BINS = 2048
_SAMPLES = 1 << 14
"""Values per image and tensor that its histogram counts."""
_CLIP_STEPS = np.linspace(0.3, 1, 36)
"""Shares of a tensor's full range that are tried as its quantised range."""


class Calibration:
    """Runs a graph as it stands on the calibration images, a few at a time."""

    def __init__(self, graph: Graph, calibration_NHWC: Pixels, folder: Path, threads: int) -> None:
        self._graph = graph
        self._pixels_NHWC = calibration_NHWC
        self._folder = folder
        self._threads = threads

    def tensors(
        self, names: Sequence[str], extra: Sequence[onnx.NodeProto] = ()
    ) -> Iterator[dict[str, Floats]]:
        """The tensors called `names` (and those of `extra` nodes), for one batch after another."""
        if not names:  # to ONNX Runtime, none means all
            return
        self._graph.flush()
        model = onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        model.graph.node.extend(extra)
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
        path = self._folder / "calibration.onnx"
        save_model(model, path)
        session = open_session(path, threads=self._threads)
        pixels = model.graph.input[0]
        size = pixels.type.tensor_type.shape.dim[0].dim_value or _BATCH
        num_images = len(self._pixels_NHWC)
        for start in range(0, num_images, size):
            # A model of one batch size sees the first images again at the end.
            rows = np.arange(start, start + size) % num_images
            yield dict(
                zip(names, session.run(names, {pixels.name: self._pixels_NHWC[rows]}), strict=True)
            )

    def channel_peaks(self, names: Sequence[str]) -> dict[str, Floats]:
        """Largest magnitude per channel (axis 1) of NCHW tensors."""
        peaks: dict[str, Floats] = {}
        for batch in self.tensors(names):
            for name, found_NCHW in batch.items():
                peak_C = np.maximum(found_NCHW.max((0, 2, 3)), -found_NCHW.min((0, 2, 3)))
                peaks[name] = np.maximum(peaks.get(name, peak_C), peak_C)
        return peaks

    def ranges(self, names: Sequence[str]) -> Ranges:
        """The range of each float32 tensor with the least squared error in 8 bits, 0 included."""
        full: Ranges = {}
        for batch in self.tensors(names):
            for name, found in batch.items():
                if found.dtype == np.float32:
                    low, high = full.get(name, (0.0, 0.0))
                    full[name] = min(low, float(found.min())), max(high, float(found.max()))
        names = list(full)
        counts = {name: np.zeros(_BINS, np.int64) for name in names}
        for batch in self.tensors(names):
            for name, found in batch.items():
                low, high = full[name]
                rows = found.reshape(len(found), -1)
                step = rows.shape[1] // _SAMPLES | 1  # odd: meets every column of an even width
                sample = rows[:, ::step].ravel()
                counts[name] += np.histogram(sample, _BINS, (low, high or 1e-6))[0]
        return {name: _best_range(counts[name], *full[name]) for name in names}


def _best_range(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The share of a full range with the least error: clipping outside it, rounding inside."""
    if high <= low:
        return low, high
    values = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS
    best, best_error = (low, high), np.inf
    for share in _CLIP_STEPS:
        clipped = np.clip(values, low * share, high * share)
        step = (high - low) * share / 255
        error = float((counts * np.maximum((values - clipped) ** 2, step**2 / 12)).sum())
        if error < best_error:
            best, best_error = (low * share, high * share), error
    return best


def open_session(path: Path, *, threads: int, folded: Path | None = None) -> ort.InferenceSession:
    """A session on the CPU; `folded` is where its graph goes, constants folded, instead.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folded is not None:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.optimized_model_filepath = str(folded)
        if path.with_name(f"{path.name}.data").exists():
            settings.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{folded.name}.data"
            )
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except (RuntimeError, ValueError, ort_errors.Fail, ort_errors.InvalidGraph) as error:
        raise ModelError(
            f"{path.name}: ONNX Runtime does not accept it: {error}; export it again"
        ) from error
