"""How sensitive is a model to rounding? Its own answers with 8 bits kept of what layers multiply.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from batchclf.models.bundle import MODEL_FILE
from batchclf.models.checks import OpenReference, Run
from batchclf.models.graph import WEIGHTED, Graph, save_model

_SPLITTER = np.array(2**16 + 1, np.float32)
"""c - (c - x), with c = x times this, is x with 8 bits kept, rounded to nearest: Veltkamp's
splitting. It needs no type that older opsets lack, and holds below 2^111."""


def open_rounded(folder: Path, open_reference: OpenReference) -> Run:
    """The model of a bundle that is being written, computing as bfloat16 does.

    What a convolution or a matrix product takes is rounded to bfloat16; its sums stay float32, as
    processors with bfloat16 form them.

    Raises:
        ModelError: ONNX Runtime does not accept the changed model.
    """
    graph = Graph(onnx.load(folder / MODEL_FILE))
    splitter = graph.names.new("bf16_splitter")
    nodes = [helper.make_node("Constant", [], [splitter], value=numpy_helper.from_array(_SPLITTER))]
    for node in graph.nodes:
        if node.op_type in WEIGHTED and node.input[1] in graph.weights:
            for place in range(2):
                taken, wanted = node.input[place], f"{node.output[0]}_bf16_{place}"
                name, wide, rest = map(
                    graph.names.new, (wanted, f"{wanted}_wide", f"{wanted}_rest")
                )
                nodes += [
                    helper.make_node("Mul", [taken, splitter], [wide]),
                    helper.make_node("Sub", [wide, taken], [rest]),
                    helper.make_node("Sub", [wide, rest], [name]),
                ]
                node.input[place] = name
        nodes.append(node)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with tempfile.TemporaryDirectory(prefix=".rounded-", dir=folder.parent) as temporary:
        save_model(model, Path(temporary) / MODEL_FILE)
        return open_reference(Path(temporary) / MODEL_FILE)
