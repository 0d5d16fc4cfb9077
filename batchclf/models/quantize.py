"""A bundle's model to static int8: QDQ, calibrated on a sample of the job's own images.

prepare → take pixels → choose the nodes → equalise channels → ranges → weight scales → correct
biases → write. One file serves every provider. Weights are int8, symmetric and per channel;
activations are uint8, asymmetric and per tensor. The first convolution takes the uint8 pixels as
they are (first_layer.py). Three methods keep the accuracy:

- **Equalised channels** (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
  Bias Correction", section 4.1, with calibrated activation ranges and SmoothQuant's balance, Xiao
  et al. 2023): a positive factor per channel goes into the weights before a tensor and out of those
  after it. The model stays the same, and a range per tensor serves as well as one per channel.
- **Ranges of least squared error** between a tensor and its 8 bits, from a histogram.
- **Corrected biases** (Nagel et al., section 4.2): what rounding the weights moves the mean of an
  output channel by, measured on the calibration images, is taken from its bias.

On x86 without VNNI, int8 kernels add pairs of products in 16 bits, which saturate. Weight scales
are therefore wide enough that no pair can (`_least_scales`): the scores are right on every CPU, and
no slower path is needed.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes; of weights, O output
channels by whatever each of them sums over.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from batchclf.errors import ModelError
from batchclf.models.calibration import Calibration, Ranges, open_session
from batchclf.models.equalize import equalize
from batchclf.models.first_layer import PIXEL_RANGE, probe_pixels, take_pixels
from batchclf.models.graph import (
    WEIGHTED,
    Floats,
    Graph,
    attribute,
    has_attention,
    is_depthwise,
    is_layer,
    output_axis,
    reached,
    refuse_reduced,
    save_model,
)
from batchclf.results.records import Pixels

OLDEST_OPSET = 13
"""First opset whose QuantizeLinear has a scale per channel; older models are converted to 17."""
_CONVERTED_OPSET = 17
_PAIR_LIMIT = 127.5
"""255 * 128 fits in 15 bits; two rounded weights may exceed their sum by half each."""
_BIAS_LIMIT = 2.0**29
"""Biases are int32 in units of input scale x weight scale."""

_BETWEEN = (
    *("Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice"),
)
"""Operators with 8-bit kernels, quantised where they stand between quantised layers."""


def quantize_int8(model: Path, target: Path, calibration_NHWC: Pixels, *, threads: int) -> None:
    """Write `model`, a bundle's model.onnx, to `target` as static int8 QDQ.

    Args:
        calibration_NHWC: uint8, as the model takes them; 100 to 200 of the job's own images.
        threads: how many the calibration may use.

    The same input gives the same file. Input and output keep their names, types and shapes; the
    last layer's scores stay float32 throughout. In a graph with attention or layer normalisation
    only the matrix products with weights are quantised: what is added between them has outlying
    channels (Dettmers et al. 2022, "LLM.int8()"), for which 8 bits are too few.

    Raises:
        ModelError: the model is quantised or float16 already, holds nothing to quantise, is fed
            nothing but zeros by the calibration images, or ONNX cannot bring it to opset 13.
    """
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=target.parent) as temporary:
        folder = Path(temporary)
        graph = Graph(_prepare(model, folder), with_biases=True)
        taken = []
        if not has_attention(graph):
            probe_NHWC = probe_pixels(calibration_NHWC.shape)
            probe = Calibration(graph, probe_NHWC, folder, threads)
            taken = take_pixels(graph, probe_NHWC, probe.tensors)
            graph = Graph(graph.model, with_biases=True)
        names = _choose(graph, model)
        run = Calibration(graph, calibration_NHWC, folder, threads)
        equalize(graph, names, run.channel_peaks)
        ranges = run.ranges(_tensors_of(graph, names))
        ranges |= dict.fromkeys(taken, PIXEL_RANGE)
        names = _without_dead(graph, names, ranges, model)
        scales = _weight_scales(graph, names, ranges)
        _correct_biases(graph, scales, run)
        save_model(_with_qdq(graph, names, ranges, scales), target)


# ---- preparing and choosing ----------------------------------------------------------------------


def _prepare(path: Path, folder: Path) -> onnx.ModelProto:
    """The model with constants folded and batch norms in their convolutions, at opset 13 or later.

    Raises:
        ModelError: see `quantize_int8`.
    """
    model = onnx.load(path)
    refuse_reduced(model, path)
    opset = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset.version < OLDEST_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, _CONVERTED_OPSET)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: found opset {opset.version}; int8 needs {OLDEST_OPSET} or later, and "
                f"ONNX cannot convert it ({error}); export it again with a newer opset"
            ) from error
    plain, folded = folder / "plain.onnx", folder / "folded.onnx"
    save_model(model, plain)
    open_session(plain, threads=1, folded=folded)
    model = onnx.load(folded)
    kept = [entry for entry in model.opset_import if entry.domain in _domains(model)]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    del model.graph.value_info[:]  # shapes from before the folding
    return model


def _domains(model: onnx.ModelProto) -> set[str]:
    return {"", "ai.onnx", *(node.domain for node in model.graph.node)}


def _choose(graph: Graph, path: Path) -> set[str]:
    """Names of the nodes to quantise.

    Raises:
        ModelError: there is none.
    """
    is_attentive = has_attention(graph)
    layers = {
        node.name
        for node in graph.nodes
        if is_layer(graph, node) and not (is_attentive and node.op_type == "Conv")
    }
    if not layers:
        raise ModelError(
            f"{path}: found no convolution or matrix product with float32 weights, so there is "
            "nothing to run in int8; use precision fp32"
        )
    if is_attentive:
        return layers
    after = reached(graph.nodes, layers)
    before = reached(graph.nodes, layers, backwards=True)
    names = set(layers)
    for node in graph.nodes:
        maker = graph.producer.get(node.input[0]) if node.input else None
        ends_layer = (
            graph.rectifies(node)
            and maker is not None
            and maker.op_type == "Conv"
            and maker.name in layers
        )
        if node.op_type == "Clip" and not graph.rectifies(node):
            continue  # ONNX Runtime's quantiser would remove it nevertheless
        if node.op_type in _BETWEEN and (
            ends_layer
            or (node.name in after & before and not (_is_binary(node) and _has_weight(graph, node)))
        ):
            names.add(node.name)
    return names


def _is_binary(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Add", "Mul")


def _has_weight(graph: Graph, node: onnx.NodeProto) -> bool:
    return any(name in graph.weights for name in node.input)


def _tensors_of(graph: Graph, names: set[str]) -> list[str]:
    """What the nodes take and give and is to be quantised, in the order of the graph."""
    touched = [name for node in graph.by_name(names) for name in (*node.input, *node.output)]
    return [
        name
        for name in dict.fromkeys(touched)
        if name in graph.producer and not graph.is_rectified(name, names)
    ]


def _without_dead(graph: Graph, names: set[str], ranges: Ranges, path: Path) -> set[str]:
    """The names without those of layers whose input was 0 throughout: it has no range to quantise.

    Raises:
        ModelError: that was every layer.
    """
    layers = [node for node in graph.by_name(names) if node.op_type in WEIGHTED]
    dead = {node.name for node in layers if ranges[node.input[0]] == (0, 0)}
    if len(dead) == len(layers):
        raise ModelError(
            f"{path}: found only zeros before every layer on the calibration images, so int8 has "
            "no ranges to go by; use precision fp32, or give more varied images"
        )
    return names - dead


# ---- weights and biases --------------------------------------------------------------------------


def _weight_scales(graph: Graph, names: set[str], ranges: Ranges) -> dict[str, Floats]:
    """The scale of each output channel of each layer, by the layer's name."""
    scales = {}
    for node in graph.by_name(names):
        if node.op_type not in WEIGHTED:
            continue
        scale_O = _least_scales(graph, node)
        if len(node.input) > 2:  # wide enough for the bias to fit in 32 bits
            low, high = ranges[node.input[0]]
            unit = (high - low) / 255 * _BIAS_LIMIT
            scale_O = np.maximum(scale_O, np.abs(graph.weights[node.input[2]]) / unit)
        scales[node.name] = np.maximum(scale_O, 1e-12).astype(np.float32)
    return scales


def _least_scales(graph: Graph, node: onnx.NodeProto) -> Floats:
    """The least scales at which weights fit in int8 and no pair of products saturates 16 bits.

    Kernels for AVX2 multiply uint8 by int8 and add neighbours in 16 bits (vpmaddubsw), channels
    running fastest: with 255 * (a + b) in range for each pair, they are exact. Depthwise kernels
    add in 32 bits.
    """
    rows = _rows(graph, node)
    scale_O = np.abs(rows).max(1) / 127
    if is_depthwise(graph, node) or rows.shape[1] < 2:
        return np.asarray(scale_O)
    first, second = rows[:, :-1], rows[:, 1:]
    if graph.weights[node.input[1]].shape[1] % 2 == 0 or node.op_type != "Conv":
        first, second = first[:, ::2], second[:, ::2]  # else taps end inside a pair: take them all
    for sign in (1, -1):
        sums = np.maximum(sign * first, 0) + np.maximum(sign * second, 0)
        scale_O = np.maximum(scale_O, sums.max(1) / _PAIR_LIMIT)
    return np.asarray(scale_O)


def _rows(graph: Graph, node: onnx.NodeProto) -> Floats:
    """A layer's weights with a row per output channel, in the order in which kernels sum."""
    weight = graph.weights[node.input[1]]
    if node.op_type == "Conv":
        return np.asarray(weight.transpose(0, 2, 3, 1).reshape(len(weight), -1))
    return weight if attribute(node, "transB", 0) else np.asarray(weight.T)


def _correct_biases(graph: Graph, scales: dict[str, Floats], run: Calibration) -> None:
    """Take from each bias what rounding the weights adds to the mean of its channel.

    A second layer beside each, of the rounding errors alone, gives it directly.
    """
    extra = []
    outputs: dict[str, str] = {}
    for node in graph.by_name(scales):
        if node.op_type == "MatMul":
            continue
        weight = graph.weights[node.input[1]]
        scale = _along_output(graph, node, scales[node.name])
        error = np.clip(np.round(weight / scale), -127, 127) * scale - weight
        name = graph.names.new(f"error_of_{node.name}")
        wrong_by = graph.names.new(f"{name}_weight")
        value = numpy_helper.from_array(error.astype(np.float32))
        extra.append(helper.make_node("Constant", [], [wrong_by], value=value))
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = name
        twin.input[:] = [node.input[0], wrong_by]
        twin.output[:] = [name]
        extra.append(twin)
        outputs[name] = node.input[2]
    sums = dict.fromkeys(outputs, np.float64(0))
    num_batches = 0
    for batch in run.tensors(list(outputs), extra):
        num_batches += 1
        for name, error in batch.items():
            axes = (0, 2, 3) if error.ndim == 4 else (0,)
            sums[name] = sums[name] + error.mean(axes, dtype=np.float64)
    for name, bias in outputs.items():
        graph.weights[bias] -= (sums[name] / num_batches).astype(np.float32)


def _along_output(graph: Graph, node: onnx.NodeProto, scale_O: Floats) -> Floats:
    shape = [1] * graph.weights[node.input[1]].ndim
    shape[output_axis(node)] = -1
    return scale_O.reshape(shape)


# ---- writing -------------------------------------------------------------------------------------


def _with_qdq(
    graph: Graph, names: set[str], ranges: Ranges, scales: dict[str, Floats]
) -> onnx.ModelProto:
    """The model with QuantizeLinear and DequantizeLinear around the chosen nodes."""
    graph.flush()
    overrides = {
        node.input[1]: [
            {
                "axis": output_axis(node),
                "quant_type": QuantType.QInt8,
                "scale": scale,
                "zero_point": np.int8(0),
            }
            for scale in scales[node.name]
        ]
        for node in graph.by_name(scales)
    }
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    for node in graph.by_name(names):  # asked for, and then replaced by what the Relu gives
        if graph.is_rectified(node.output[0], names):
            data[node.output[0]] = data[graph.consumers[node.output[0]][0].output[0]]
    with _quiet():
        quantizer = QDQQuantizer(
            graph.model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=sorted(names),
            nodes_to_exclude=[],
            op_types_to_quantize=[*WEIGHTED, *_BETWEEN],
            extra_options={
                "TensorQuantOverrides": overrides,
                # Their kernels give float32, which costs nothing and keeps the scores exact.
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "QDQDisableWeightAdjustForInt32Bias": True,
            },
        )
        quantizer.quantize_model()
    model: onnx.ModelProto = quantizer.model.model
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser warns through the root logger of tensors that it rightly leaves alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
