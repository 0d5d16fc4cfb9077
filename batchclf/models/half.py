"""A bundle's model to float16, for GPUs whose matrix units run it several times as fast.

Weights and computation become float16; the pixels stay uint8, their normalisation float32, and the
scores float32. Operators without a float16 kernel stay float32. A tensor is cast only where one
side has it in the other type, and once.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

from batchclf.errors import ModelError
from batchclf.models.calibration import open_session
from batchclf.models.graph import (
    WEIGHTED,
    Graph,
    attribute,
    inner_graphs,
    reached,
    refuse_reduced,
    save_model,
    taken_by,
)

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_ELEMENTS = {"tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16}
"""Types as ONNX Runtime calls them; no other matters here."""
_STAY_FLOAT = frozenset((*DEFAULT_OP_BLOCK_LIST, "ConstantOfShape", "EyeLike"))


def to_half(model: Path, target: Path) -> None:
    """Write `model`, a bundle's float32 model.onnx, to `target` in float16.

    Input and output keep their names, types and shapes. Whether what is computed on the way stays
    in range depends on the images: compare the scores before using the model.

    Raises:
        ModelError: the model is float16 or quantised already, or a weight is out of range.
    """
    loaded = onnx.load(model)
    refuse_reduced(loaded, model)
    graph = Graph(loaded)
    _require_range(graph, model)
    _Conversion(graph, _types(model, target.parent)).convert()
    save_model(loaded, target)


def _require_range(graph: Graph, path: Path) -> None:
    for name, weight in graph.weights.items():
        largest = float(np.abs(weight).max(initial=0))
        if not largest <= _LARGEST:
            raise ModelError(
                f"{path}: {name} holds {largest:.6g}, and float16 ends at {_LARGEST:,.0f}; "
                "run this model with precision fp32"
            )


def _types(model: Path, folder: Path) -> dict[str, int]:
    """The element type of each tensor between nodes.

    Raises:
        ModelError: ONNX does not know the operator of one, and ONNX Runtime does not run it.
    """
    with tempfile.TemporaryDirectory(prefix=".half-", dir=folder) as temporary:
        # A path, not the model: shapes of one over 2 GiB can only be inferred on disk.
        inferred = Path(temporary) / "inferred.onnx"
        onnx.shape_inference.infer_shapes_path(str(model), str(inferred))
        graph = onnx.load(inferred, load_external_data=False).graph
        values = (*graph.value_info, *graph.input, *graph.output)
        known = {
            value.name: value.type.tensor_type.elem_type
            for value in values
            if not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type
        }
        made = [name for node in graph.node for name in node.output if name]
        unknown = [name for name in made if name not in known]
        return known | _types_of_onnxruntime(model, unknown, Path(temporary))


def _types_of_onnxruntime(model: Path, names: Sequence[str], folder: Path) -> dict[str, int]:
    """The same of tensors that operators of ONNX Runtime's own make, told by itself."""
    if not names:
        return {}
    loaded = onnx.load(model)
    loaded.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    save_model(loaded, folder / "told.onnx")
    session = open_session(folder / "told.onnx", threads=1)
    told = {output.name: output.type for output in session.get_outputs()}
    return {name: _ELEMENTS.get(told[name], TensorProto.UNDEFINED) for name in names}


class _Conversion:
    """A graph on its way: its nodes one after the other, each tensor in the types asked for."""

    def __init__(self, graph: Graph, types: Mapping[str, int]) -> None:
        self._graph = graph.model.graph
        self._names = graph.names
        layers = {node.name for node in graph.nodes if node.op_type in WEIGHTED}
        self._in_half = layers | reached(graph.nodes, layers)
        self._types = types
        self._weights = {tensor.name: tensor for tensor in self._graph.initializer}
        for node in graph.nodes:  # constants are weights by another name
            if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
                self._weights[node.output[0]] = value
        self._forms: dict[tuple[str, int], str] = {}
        """The name of a tensor in a type that is not its own."""
        self._halved: set[str] = set()
        """Tensors that nodes make in float16, where they were float32."""
        self._nodes: list[onnx.NodeProto] = []

    def convert(self) -> None:
        """Put the converted nodes in the place of the graph's."""
        outputs = {output.name for output in self._graph.output}
        for node in self._graph.node:
            half = self._becomes_half(node)
            for place, name in enumerate(node.input):
                if self._is_float(name):
                    as_half = half and not (node.op_type == "Resize" and place > 0)  # its scales
                    node.input[place] = self._form(name, half=as_half)
            for graph in inner_graphs(node):
                self._give_float(graph)
            self._nodes.append(node)
            if half:
                self._make_half(node, outputs)
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(_used(self._nodes, outputs))
        _drop_unused_weights(self._graph)

    def _becomes_half(self, node: onnx.NodeProto) -> bool:
        return (
            node.name in self._in_half
            and node.domain in ("", "ai.onnx")
            and node.op_type not in _STAY_FLOAT
            and not any(inner_graphs(node))
        )

    def _is_float(self, name: str) -> bool:
        if name in self._weights:
            return bool(self._weights[name].data_type == TensorProto.FLOAT)
        return self._types.get(name) == TensorProto.FLOAT

    def _make_half(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        """Let a node make float16 where it made float32; outputs of the graph are cast back."""
        if node.op_type == "Cast" and attribute(node, "to", None) == TensorProto.FLOAT:
            _set_attribute(node, "to", TensorProto.FLOAT16)
        for place, name in enumerate(node.output):
            if not self._is_float(name):
                continue
            self._halved.add(name)
            if name in outputs:
                half = self._names.new(f"{name}_fp16")
                node.output[place] = self._forms[name, TensorProto.FLOAT16] = half
                self._cast(half, name, TensorProto.FLOAT)
                self._forms[name, TensorProto.FLOAT] = name

    def _form(self, name: str, *, half: bool) -> str:
        """The name of a float32 tensor of the model in the type wanted, made where it is not."""
        wanted = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        if half == (name in self._halved) and (name, wanted) not in self._forms:
            return name
        if (name, wanted) not in self._forms:
            made = self._names.new(f"{name}_fp16" if half else f"{name}_fp32")
            if name in self._weights:
                values = _to_half(numpy_helper.to_array(self._weights[name]))
                self._graph.initializer.append(numpy_helper.from_array(values, made))
            else:
                self._cast(name, made, wanted)
            self._forms[name, wanted] = made
        return self._forms[name, wanted]

    def _cast(self, source: str, target: str, to: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], f"{target}_cast", to=to))

    def _give_float(self, graph: onnx.GraphProto) -> None:
        """Let a subgraph take what it uses of the graph around it in float32, as it did."""
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name in self._halved:
                    node.input[place] = self._form(name, half=False)
            for inner in inner_graphs(node):
                self._give_float(inner)


def _to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded; what is no 0 does not become 0, since something may be divided by it."""
    half = values.clip(-_LARGEST, _LARGEST).astype(np.float16)
    lost = (half == 0) & (values != 0)
    return np.where(lost, np.copysign(np.float16(_SMALLEST), values), half).astype(np.float16)


def _set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    for found in node.attribute:
        if found.name == name:
            found.i = value


def _used(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that something depends on, in their order."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(taken_by(node))
    return kept[::-1]


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    taken = {name for node in graph.node for name in taken_by(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in taken]
    del graph.initializer[:]
    graph.initializer.extend(kept)
