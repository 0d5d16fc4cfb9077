"""PyTorch models to ONNX.

The exported graph takes uint8 pixels NHWC and holds layout change, scaling and normalisation. It
is accepted only when ONNX Runtime gives PyTorch's logits at several batch sizes: an exporter may
bake the example's batch size into the graph without a word.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchclf.errors import ModelError
from batchclf.models.bundle import MAX_PROTOBUF_BYTES, MODEL_FILE
from batchclf.models.checkpoints import first_line
from batchclf.models.checks import OpenReference, Run, assert_same_scores, sample_pixels, tiled
from batchclf.results.records import Activation, Preprocess

OPSET = 18
"""Read by every ONNX Runtime since 1.14, so also by the OpenVINO flavour, which lags behind."""
MAX_BATCH = 65536


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A built model in eval mode, and what comes with its weights."""

    module: nn.Module
    preprocess: Preprocess
    labels: tuple[str, ...]
    activation: Activation = "softmax"
    """What its output lacks to be scores."""


def export_model(
    model: BuiltModel, folder: Path, *, batch_size: int, open_reference: OpenReference
) -> tuple[int, ...]:
    """Export to `folder`/model.onnx and check it against PyTorch; returns the batch sizes checked.

    Raises:
        ModelError: the exporter fails, or the exported model gives other answers.
    """
    wrapped = _PixelsToLogits(model.module, model.preprocess).eval()
    path = folder / MODEL_FILE
    crop_h, crop_w = model.preprocess.crop
    pixels_NHWC = sample_pixels(crop_h, crop_w)
    # The fused attention path of nn.MultiheadAttention has no ONNX counterpart.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.inference_mode():
        try:
            expected_NK = wrapped(torch.from_numpy(pixels_NHWC)).numpy()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModelError(
                f"the model does not take {crop_h} x {crop_w} pixels "
                f"(model.preprocess.crop): {first_line(error)}"
            ) from error
    _export(wrapped, path, example=torch.from_numpy(pixels_NHWC[:2].copy()))
    run = open_reference(path)
    checked = tuple(sorted({1, 2, 3, batch_size}))
    for size in checked:
        found_NK = run(tiled(pixels_NHWC, size))
        assert_same_scores(found_NK, tiled(expected_NK, size), f"exported model, batch of {size}")
    return checked


def eager(model: BuiltModel, threads: int) -> Run:
    """The model in PyTorch, uint8 pixels NHWC to float32 logits NK, on `threads` CPU threads."""
    wrapped = _PixelsToLogits(model.module, model.preprocess).eval()
    torch.set_num_threads(threads)

    def run(pixels_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            logits_NK: np.ndarray[Any, Any] = wrapped(torch.from_numpy(pixels_NHWC)).numpy()
        return logits_NK

    return run


def count_outputs(module: nn.Module, preprocess: Preprocess, name: str) -> int:
    """How many numbers a module gives per image.

    Raises:
        ModelError: it does not take images of the crop's size.
    """
    with torch.inference_mode():
        try:
            logits_NK = module(torch.zeros(2, 3, *preprocess.crop))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModelError(
                f"{name} does not take {preprocess.crop[0]} x {preprocess.crop[1]} pixels "
                f"(model.preprocess.crop): {first_line(error)}"
            ) from error
    return int(logits_NK.shape[1])


class TwoLogits(nn.Module):
    """One logit z as the two logits (0, z), whose softmax is (1 - sigmoid, sigmoid) of z."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        logit_N1 = self.module(inputs)
        return torch.cat([torch.zeros_like(logit_N1), logit_N1], dim=1)


class _PixelsToLogits(nn.Module):
    """uint8 pixels NHWC to logits NK: `ToTensor` and `Normalize` as one multiply and one add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        assert preprocess.mean is not None
        assert preprocess.std is not None
        mean_C = torch.tensor(preprocess.mean, dtype=torch.float64)
        std_C = torch.tensor(preprocess.std, dtype=torch.float64)
        self.module = module
        self.is_bgr = preprocess.channels == "bgr"
        self.register_buffer("scale", (1 / (255 * std_C)).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean_C / std_C).float().view(1, 3, 1, 1))

    def forward(self, pixels_NHWC: Tensor) -> Tensor:
        pixels_NCHW = pixels_NHWC.permute(0, 3, 1, 2).float()
        if self.is_bgr:
            pixels_NCHW = pixels_NCHW.flip(1)
        logits_NK: Tensor = self.module(pixels_NCHW * self.scale + self.shift)
        return logits_NK


def _export(module: nn.Module, path: Path, *, example: Tensor) -> None:
    """Export with a dynamic batch axis; the example's batch of 2 keeps 0 and 1 unspecialised."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["pixels"],
                output_names=["scores"],
                opset_version=OPSET,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        cause = _innermost(error)  # the exporter wraps it in pages of advice to its own authors
        raise ModelError(
            f"the model cannot be exported to ONNX: {type(cause).__name__}: {first_line(cause)}; "
            "where you have it as an ONNX file, give that as model.onnx"
        ) from error
    assert program is not None
    num_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    _forget_origins(program)
    _register_constants(program.model.graph)
    program.save(path, external_data=num_bytes > MAX_PROTOBUF_BYTES)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _register_constants(graph: Any) -> None:
    """Give the graph the constants that it uses and does not hold.

    Where one tensor is clamped twice, onnxscript makes two constants under one name and keeps one.
    """
    for node in graph:
        for value in node.inputs:
            is_constant = value is not None and value.const_value is not None
            if is_constant and value.producer() is None and value.name not in graph.initializers:
                graph.register_initializer(value)


def _forget_origins(program: Any) -> None:
    """Drop stack traces and the like: they hold this machine's paths and this file's line numbers,
    and would make the same model another one elsewhere."""
    model = program.model
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
    model.metadata_props.clear()
