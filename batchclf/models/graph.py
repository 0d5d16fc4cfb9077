"""An ONNX graph as the passes that change its precision see it: weights as arrays, makers, takers.

Array shapes of weights: O output channels by whatever each of them sums over.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
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
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger")
"""Operators that only a quantised model has."""


@dataclass(slots=True)
class Graph:
    """A model with its float32 weights as arrays, and who makes and who takes each tensor."""

    model: onnx.ModelProto
    weights: dict[str, Floats] = field(init=False)
    producer: dict[str, onnx.NodeProto] = field(init=False)
    consumers: dict[str, list[onnx.NodeProto]] = field(init=False)

    def __post_init__(self) -> None:
        _own_weights(self.model)
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

    def is_rectified(self, name: str) -> bool:
        """Whether one Relu or Clip alone sees a tensor, which is then not quantised itself."""
        takers = self.consumers[name]
        return len(takers) == 1 and takers[0].op_type in ("Relu", "Clip")

    def by_name(self, names: Collection[str]) -> list[onnx.NodeProto]:
        """The nodes called so, in the order of the graph."""
        return [node for node in self.nodes if node.name in names]


def _own_weights(model: onnx.ModelProto) -> None:
    """Name every node; give every Conv and Gemm weights and a bias that no other node uses."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    used: set[str] = set()
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        if node.op_type not in WEIGHTED or node.input[1] not in tensors:
            continue
        for place, name in enumerate(node.input):
            if place and name in used:
                own = f"{name}_{number}"
                graph.initializer.add().CopyFrom(tensors[name])
                graph.initializer[-1].name = node.input[place] = own
        weight = tensors.get(node.input[1], graph.initializer[-1])
        if node.op_type != "MatMul" and len(node.input) == 2:
            axis = 1 if node.op_type == "Gemm" and not attribute(node, "transB", 0) else 0
            zeros = np.zeros(weight.dims[axis], np.float32)
            node.input.append(f"bias_{number}")
            graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))
        used.update(node.input[1:])


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
    """Whether a node is a 2-D convolution or a matrix product with constant float32 weights."""
    weight = graph.weights.get(node.input[1]) if node.op_type in WEIGHTED else None
    if weight is None or node.input[0] in graph.weights:
        return False
    if node.op_type == "Conv":
        return weight.ndim == 4 and node.input[2] in graph.weights
    plain = all(
        attribute(node, name, default) == default
        for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    )
    return weight.ndim == 2 and plain and all(name in graph.weights for name in node.input[1:])


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
