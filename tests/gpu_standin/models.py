"""Models for the stand-in."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NUM_CLASSES = 10


def write_convolving(path: Path, edge: int, *, has_bias: bool = False) -> Path:
    """A classifier of NUM_CLASSES with one convolution, for images of some size."""
    weights_OC11 = np.random.default_rng(0).normal(size=(NUM_CLASSES, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weights", *["bias"] * has_bias], ["maps"]),
        helper.make_node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "convolving",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, edge, edge])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", NUM_CLASSES])],
        [
            numpy_helper.from_array(weights_OC11, "weights"),
            numpy_helper.from_array(np.ones(NUM_CLASSES, np.float32), "bias"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path
