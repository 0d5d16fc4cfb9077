"""A graph as the passes that change its precision see it."""

from pathlib import Path

import onnx
import pytest

from batchclf.models.graph import Graph, is_layer
from batchclf.models.half import to_half
from tests.gpu_standin.models import write_convolving


@pytest.mark.parametrize("with_biases", [False, True])
def test_a_convolution_without_a_bias_gets_one_only_where_it_is_asked_for(
    with_biases: bool, tmp_path: Path
) -> None:
    graph = Graph(onnx.load(write_convolving(tmp_path / "model.onnx", 8)), with_biases)
    (convolution,) = [node for node in graph.nodes if node.op_type == "Conv"]
    assert len(convolution.input) == 2 + with_biases
    assert is_layer(graph, convolution)
    assert not with_biases or not graph.weights[convolution.input[2]].any()


def test_fp16_adds_no_bias(tmp_path: Path) -> None:
    to_half(write_convolving(tmp_path / "model.onnx", 8), tmp_path / "half.onnx")
    nodes = onnx.load(tmp_path / "half.onnx").graph.node
    assert [len(node.input) for node in nodes if node.op_type == "Conv"] == [2]
