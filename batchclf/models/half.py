"""A bundle's model to float16, for GPUs whose matrix units run it several times as fast.

Weights and computation become float16; the pixels stay uint8, their normalisation float32, and the
scores float32. Operators without a float16 kernel stay float32, between casts.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from batchclf.errors import ModelError
from batchclf.models.graph import WEIGHTED, Graph, attribute, reached, refuse_reduced, save_model

_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: Path, target: Path) -> None:
    """Write `model`, a bundle's float32 model.onnx, to `target` in float16.

    Input and output keep their names, types and shapes. Whether what is computed on the way stays
    in range depends on the images: compare the scores before using the model.

    Raises:
        ModelError: the model is float16 or quantised already, or a weight is out of range.
    """
    with tempfile.TemporaryDirectory(prefix=".half-", dir=target.parent) as temporary:
        loaded = onnx.load(model)
        refuse_reduced(loaded, model)
        graph = Graph(loaded)
        _require_range(graph, model)
        layers = {node.name for node in graph.nodes if node.op_type in WEIGHTED}
        after = reached(graph.nodes, layers)
        # A path, not the model: shapes of one over 2 GiB can only be inferred on disk.
        named = Path(temporary) / "named.onnx"
        save_model(loaded, named)
        half = convert_float_to_float16(
            str(named),
            keep_io_types=True,
            node_block_list=[node.name for node in graph.nodes if node.name not in layers | after],
        )
        _join_kept(half.graph)
        save_model(half, target)


def _require_range(graph: Graph, path: Path) -> None:
    for name, weight in graph.weights.items():
        largest = float(np.abs(weight).max(initial=0))
        if not largest <= _LARGEST:
            raise ModelError(
                f"{path}: {name} holds {largest:.6g}, and float16 ends at {_LARGEST:,.0f}; "
                "run this model with precision fp32"
            )


def _join_kept(graph: onnx.GraphProto) -> None:
    """Let neighbours that stay float32 pass float32 on, where the converter rounds in between."""
    cast_to = {
        node.output[0]: (node.input[0], attribute(node, "to", None))
        for node in graph.node
        if node.op_type == "Cast"
    }
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in graph.node:
        for place, name in enumerate(node.input):
            rounded, to = cast_to.get(name, ("", None))
            exact, half = cast_to.get(rounded, ("", None))
            if (to, half) == (TensorProto.FLOAT, TensorProto.FLOAT16) and (
                types.get(exact) == TensorProto.FLOAT
            ):
                node.input[place] = exact
