"""An ONNX graph as the passes that change its precision see it: weights as arrays, makers, takers.

Array shapes of weights: O output channels by whatever each of them sums over.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from batchclf.errors import ModelError
from batchclf.models.bundle import MAX_PROTOBUF_BYTES

Floats = NDArray[np.float32]

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Operators of layers: they take a tensor and weights."""
QUANTISED = (
    *("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm"),
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QLinearSoftmax", "QLinearSigmoid"),
    *("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
)
"""Operators that only a quantised model has."""


@dataclass(slots=True)
class Graph:
    """A model with its float32 weights as arrays, and who makes and who takes each tensor."""

    model: onnx.ModelProto
    with_biases: bool = False
    """Whether layers that have no bias get one, of zeros: quantising corrects biases. On a GPU,
    each costs an addition that is a launch of its own."""
    names: "Names" = field(init=False)
    weights: dict[str, Floats] = field(init=False)
    producer: dict[str, onnx.NodeProto] = field(init=False)
    consumers: dict[str, list[onnx.NodeProto]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = Names(self.model.graph)
        _own_weights(self.model, self.names)
        if self.with_biases:
            _give_biases(self.model, self.names)
        self.weights = {
            tensor.name: numpy_helper.to_array(tensor).copy()
            for tensor in self.model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """In topological order."""
        nodes: Sequence[onnx.NodeProto] = self.model.graph.node
        return nodes

    def flush(self) -> None:
        """Put the arrays back into the model."""
        for tensor in self.model.graph.initializer:
            if tensor.name in self.weights:
                array = np.ascontiguousarray(self.weights[tensor.name], np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    def rectifies(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a Relu or Clip whose work the 8-bit range of its output does as well.

        Such a range holds 0, so a Clip that does not let 0 through is none.
        """
        if node.op_type == "Clip":
            low, high = self.bounds(node)
            return low <= 0 <= high
        return node.op_type == "Relu"

    def bounds(self, clip: onnx.NodeProto) -> tuple[float, float]:
        """Where a Clip of opset 11 or later cuts: infinite where it does not, NaN if not known."""
        low, high = -math.inf, math.inf
        if len(clip.input) > 1 and clip.input[1]:
            low = self._constant(clip.input[1])
        if len(clip.input) > 2 and clip.input[2]:
            high = self._constant(clip.input[2])
        return low, high

    def _constant(self, name: str) -> float:
        return float(self.weights[name].item()) if name in self.weights else math.nan

    def is_rectified(self, name: str, names: Collection[str]) -> bool:
        """Whether a Relu or Clip among the nodes called `names` is all that takes a tensor.

        The tensor is then not quantised itself.
        """
        takers = self.consumers[name]
        return len(takers) == 1 and takers[0].name in names and self.rectifies(takers[0])

    def by_name(self, names: Collection[str]) -> list[onnx.NodeProto]:
        """The nodes called so, in the order of the graph."""
        return [node for node in self.nodes if node.name in names]


class Names:
    """The names of a graph's tensors, those of the graphs inside its nodes among them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = set(_tensor_names(graph))

    def new(self, wanted: str) -> str:
        """A name for another tensor: the one wanted, or one like it that is free."""
        candidates = chain([wanted], (f"{wanted}_{number}" for number in count(2)))
        name = next(one for one in candidates if one not in self._taken)
        self._taken.add(name)
        return name


def _tensor_names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in inner_graphs(node):
            yield from _tensor_names(inner)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node, as those of If and Loop."""
    for found in node.attribute:
        if found.type == onnx.AttributeProto.GRAPH:
            yield found.g
        yield from found.graphs


def taken_by(node: onnx.NodeProto) -> Iterator[str]:
    """What a node takes, and what the graphs inside it take from around them."""
    yield from node.input
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield from taken_by(inner)
        yield from (value.name for value in graph.output)


@dataclass(slots=True)
class NodeChain:
    """Nodes that are put before or after a graph, made one after another."""

    prefix: str
    """Of the names of the tensors between them."""
    names: Names | None = None
    """Of the graph that they are put into; None: it has none that begin so."""
    made: list[onnx.NodeProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of one output; returns that tensor's name."""
        output = f"{self.prefix}_{len(self.made)}"
        if self.names is not None:
            output = self.names.new(output)
        self.made.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, values: NDArray[Any]) -> str:
        """Append a constant; returns its name."""
        return self.add("Constant", value=numpy_helper.from_array(values))

    def ended(self, output: str) -> list[onnx.NodeProto]:
        """All nodes, the last of which makes the tensor `output`."""
        self.made[-1].output[0] = output
        return self.made


def _own_weights(model: onnx.ModelProto, names: Names) -> None:
    """Name every node; give every layer weights, and a bias if it has one, that no other node uses.

    A Gemm's bias that is the same for every row becomes one number per output channel.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        if node.op_type not in WEIGHTED or node.input[1] not in tensors:
            continue
        if not node.input[-1]:  # the bias, left out by an empty name
            del node.input[-1]
        for place, name in enumerate(node.input):
            if place and name in tensors and uses[name] > 1:
                uses[name] -= 1
                own = graph.initializer.add()
                own.CopyFrom(tensors[name])
                own.name = node.input[place] = names.new(f"{name}_{number}")
                tensors[own.name] = own
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in tensors:
            bias = tensors[node.input[2]]
            num_channels = tensors[node.input[1]].dims[output_axis(node)]
            if all(size == 1 for size in bias.dims[:-1]):
                bias_O = np.broadcast_to(numpy_helper.to_array(bias).ravel(), num_channels)
                bias.CopyFrom(numpy_helper.from_array(bias_O.copy(), bias.name))


def _give_biases(model: onnx.ModelProto, names: Names) -> None:
    """Give every Conv and Gemm that has weights, but no bias, one of zeros."""
    graph = model.graph
    dims = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 2 and node.input[1] in dims:
            zeros = np.zeros(dims[node.input[1]][output_axis(node)], np.float32)
            node.input.append(names.new(f"{node.name}_zero_bias"))
            graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weights along which its output channels lie."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1


def reached(
    nodes: Sequence[onnx.NodeProto], layers: set[str], *, backwards: bool = False
) -> set[str]:
    """Nodes with one of `layers` somewhere before them (or, backwards, after them)."""
    names: set[str] = set()
    tensors: set[str] = set()
    for node in reversed(nodes) if backwards else nodes:
        here, there = (node.output, node.input) if backwards else (node.input, node.output)
        isreached = any(name in tensors for name in here)
        if isreached:
            names.add(node.name)
        if isreached or node.name in layers:
            tensors.update(there)
    return names


def is_layer(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is a 2-D convolution or a matrix product with constant float32 weights.

    A bias, if there is one, is constant too, with one number per output channel.
    """
    weight = graph.weights.get(node.input[1]) if node.op_type in WEIGHTED else None
    if weight is None or node.input[0] in graph.weights:
        return False
    if weight.ndim != (4 if node.op_type == "Conv" else 2):
        return False
    if node.op_type != "MatMul" and len(node.input) > 2:
        bias = graph.weights.get(node.input[2])
        if bias is None or bias.shape != (weight.shape[output_axis(node)],):
            return False
    return node.op_type == "Conv" or all(
        attribute(node, name, default) == default
        for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    )


def has_attention(graph: Graph) -> bool:
    """Whether there is layer normalisation, or a product of two tensors that are no weights."""
    return any(
        node.op_type == "LayerNormalization"
        or (node.op_type == "MatMul" and not set(node.input) & set(graph.weights))
        for node in graph.nodes
    )


def is_depthwise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a layer is a convolution with one filter per channel."""
    shape = graph.weights[node.input[1]].shape
    return node.op_type == "Conv" and shape[1] == 1 and attribute(node, "group", 1) == shape[0]


def refuse_reduced(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that is not float32.

    Raises:
        ModelError: it is quantised, or has weights of float16 or bfloat16.
    """
    operators = {node.op_type for node in model.graph.node}
    if found := sorted(operators.intersection(QUANTISED)):
        raise ModelError(
            f"{path}: is quantised already (it has {', '.join(found)}); run it with precision "
            "fp32, which leaves a model as it is"
        )
    types = {tensor.data_type for tensor in model.graph.initializer}
    for half in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        if half in types:
            raise ModelError(
                f"{path}: has {TensorProto.DataType.Name(half)} weights; int8 is made from a "
                "float32 model: give that one"
            )


def save_model(model: onnx.ModelProto, target: Path) -> None:
    """Write a model; the weights of one too large for protocol buffers go into a second file."""
    if model.ByteSize() > MAX_PROTOBUF_BYTES:
        onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")
    else:
        onnx.save(model, target)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or `default` where it has none of that name."""
    return next(
        (helper.get_attribute_value(found) for found in node.attribute if found.name == name),
        default,
    )
