"""How sensitive is a model to rounding? Its own answers with 8 bits kept of what layers multiply.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from batchclf.models.bundle import MODEL_FILE
from batchclf.models.checks import OpenReference, Run
from batchclf.models.graph import WEIGHTED, Graph, save_model


def open_rounded(folder: Path, open_reference: OpenReference) -> Run:
    """The model of a bundle that is being written, computing as bfloat16 does.

    What a convolution or a matrix product takes is rounded to bfloat16; its sums stay float32, as
    processors with bfloat16 form them.

    Raises:
        ModelError: ONNX Runtime does not accept the changed model.
    """
    graph = Graph(onnx.load(folder / MODEL_FILE))
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.op_type in WEIGHTED and node.input[1] in graph.weights:
            for place in range(2):
                name = f"{node.name}_rounded_{place}"
                half = f"{name}_half"
                nodes += [
                    helper.make_node("Cast", [node.input[place]], [half], to=TensorProto.BFLOAT16),
                    helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT),
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
