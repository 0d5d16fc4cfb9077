"""Small ONNX classifiers with random weights, in the many forms that users' files come in.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)

MEAN = (0.48, 0.45, 0.4)
STD = (0.2, 0.25, 0.3)
PREPROCESS: dict[str, Any] = {"resize": 40, "mean": list(MEAN), "std": list(STD)}
"""What goes into a job for the models here that take floats."""

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
}

Array = NDArray[Any]
Dim = int | str | None


@dataclass(frozen=True, slots=True)
class Classifier:
    """What a file says, and does: convolution, ReLU, mean over the pixels, and what `scores` adds.

    A convolution with 3 x 3 weights tells channels, rows and columns apart.
    """

    input_type: str = "float32"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    batch: Dim = "batch"
    size: tuple[Dim, Dim] = (32, 24)
    channels: Dim = 3
    num_classes: int = 5
    scores: Literal["logits", "probabilities", "sigmoid"] = "logits"
    rank: Literal[2, 4] = 2
    output_type: str = "float32"
    weights_are_inputs: bool = False
    depth: int = 1
    """Convolutions, one after another."""
    features: Literal["", "map", "vector"] = ""
    """A second output: the map before the mean over the pixels, or a vector beside the scores."""
    opset: int = 17
    seed: int = 0

    @property
    def shape(self) -> list[Dim]:
        if self.layout == "NCHW":
            return [self.batch, self.channels, *self.size]
        return [self.batch, *self.size, self.channels]

    def but(self, **changes: Any) -> "Classifier":
        return replace(self, **changes)


class _Graph:
    """Collects nodes one after another."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def weight(self, name: str, values: Array) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name


def build(model: Classifier) -> onnx.ModelProto:
    """The model as ONNX knows it."""
    rng = np.random.default_rng(model.seed)
    channels = model.channels if isinstance(model.channels, int) else 3
    graph = _Graph()
    value, kind = "images", np.float16 if model.input_type == "float16" else np.float32
    if model.input_type not in ("float32", "float16"):
        value = graph.add("Cast", value, to=TensorProto.FLOAT)
        value = graph.add("Div", value, graph.weight("scale", np.array([64], np.float32)))
    if model.layout == "NHWC":
        value = graph.add("Transpose", value, perm=[0, 3, 1, 2])
    kernel = rng.normal(size=(model.num_classes, channels, 3, 3)).astype(kind)
    value = graph.add(
        "Conv",
        value,
        graph.weight("kernel", kernel),
        graph.weight("bias", rng.normal(size=model.num_classes).astype(kind)),
    )
    for number in range(2, model.depth + 1):
        width = model.num_classes
        kernel = rng.normal(size=(width, width, 3, 3), scale=(9 * width / 2) ** -0.5)
        value = graph.add("Relu", value)
        kernel_name = graph.weight(f"kernel_{number}", kernel.astype(kind))
        value = graph.add("Conv", value, kernel_name, pads=[1, 1, 1, 1])
    value = feature_map = graph.add("Relu", value)
    value = graph.add("GlobalAveragePool", value)
    if model.depth > 1:
        head = rng.normal(size=(model.num_classes, model.num_classes, 1, 1))
        value = graph.add("Conv", value, graph.weight("head", head.astype(kind)))
    if model.rank == 2:
        value = graph.add("Flatten", value, axis=1)
    vector = value
    if model.scores == "probabilities":
        value = graph.add("Softmax", value, axis=1)
    elif model.scores == "sigmoid":
        value = graph.add("Sigmoid", value)
    graph.add("Cast", value, output="answer", to=_TYPES[model.output_type])
    if model.scores == "sigmoid" and model.output_type == "float32":
        graph.nodes.pop()
        graph.nodes[-1].output[0] = "answer"
    ones = [1, 1] if model.rank == 4 else []
    outputs = [_value("answer", model.output_type, [model.batch, model.num_classes, *ones])]
    inner_type = "float16" if kind is np.float16 else "float32"
    if model.features == "map":
        graph.add("Identity", feature_map, output="features")
        area = [dim - 2 if isinstance(dim, int) else dim for dim in model.size]
        outputs.append(_value("features", inner_type, [model.batch, model.num_classes, *area]))
    elif model.features == "vector":
        graph.add("Neg", vector, output="features")
        outputs.append(_value("features", inner_type, [model.batch, model.num_classes, *ones]))
    inputs = [_value("images", model.input_type, model.shape)]
    if model.weights_are_inputs:
        inputs += [
            helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
            for weight in graph.weights
        ]
    return finish(
        helper.make_graph(graph.nodes, "classifier", inputs, outputs, graph.weights),
        opset=model.opset,
        ir_version=3 if model.weights_are_inputs else 8,
    )


def finish(graph: onnx.GraphProto, *, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """A graph as a model."""
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )


def _value(name: str, kind: str, shape: list[Dim]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[kind], shape)


def save(model: Classifier, path: Path) -> Path:
    """Write the model to `path`."""
    onnx.save(build(model), path)
    return path


def run_by_hand(path: Path, model: Classifier, pixels_NHWC: NDArray[np.uint8]) -> Array:
    """What the user's own file says of these pixels, one image at a time: scores NK."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = []
    for pixels_HWC in pixels_NHWC:
        fed: Array = pixels_HWC[None]
        if model.input_type != "uint8":
            fed = (fed / 255 - np.array(MEAN)) / np.array(STD)
        if model.layout == "NCHW":
            fed = fed.transpose(0, 3, 1, 2)
        fed = np.repeat(fed, model.batch if isinstance(model.batch, int) else 1, axis=0)
        (answer,) = session.run(["answer"], {"images": fed.astype(model.input_type)})
        rows.append(np.asarray(answer, np.float32)[0].reshape(-1))
    return np.stack(rows)


# ---- other ends, and other forms -----------------------------------------------------------------


def with_tail(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """The model with `nodes` after what was its output `answer` and is now called `before`."""
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    domains = {node.domain for node in nodes} - {""}
    model.opset_import.extend(
        helper.make_opsetid(domain, 3 if domain == "ai.onnx.ml" else 1) for domain in domains
    )
    return model


def constants(model: onnx.ModelProto, **values: Any) -> None:
    """Add constants that nodes of a tail take."""
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(one), name) for name, one in values.items()
    )


def as_fed(pixels_NHWC: NDArray[np.uint8], layout: str = "NCHW") -> Array:
    """Pixels as a script prepares them, in float32 throughout as torchvision's transforms do."""
    mean_C, std_C = np.array(MEAN, np.float32), np.array(STD, np.float32)
    fed = (pixels_NHWC.astype(np.float32) / np.float32(255) - mean_C) / std_C
    return np.ascontiguousarray(fed.transpose(0, 3, 1, 2) if layout == "NCHW" else fed)


def ask_by_hand(path: Path, output: str, fed: Array) -> Array:
    """An output of the user's own file, for one image after another."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [np.asarray(session.run([output], {name: row[None]})[0]) for row in fed]
    return np.stack([row.astype(np.float32).reshape(-1) for row in rows])


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Images for a quantiser to see, one after another."""

    def __init__(self, name: str, fed: Array) -> None:
        self._rows = iter([{name: row[None]} for row in fed])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rows, None)


def quantised(path: Path, form: Literal["QDQ", "QOperator", "dynamic"], fed: Array) -> Path:
    """The file in 8 bits, by ONNX Runtime's own tools."""
    target = path.with_suffix(f".{form}.onnx")
    if form == "dynamic":
        quantize_dynamic(path, target)
        return target
    name = onnx.load(path).graph.input[0].name
    quantize_static(
        path, target, Calibration(name, fed), quant_format=QuantFormat[form], per_channel=False
    )
    return target
