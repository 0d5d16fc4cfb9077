"""A graph as the passes that change its precision see it."""

from pathlib import Path

import onnx
import pytest
from onnx import helper

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


def test_weights_and_biases_that_are_added_have_names_that_are_free(tmp_path: Path) -> None:
    model = onnx.load(write_convolving(tmp_path / "model.onnx", 8))
    graph = model.graph
    second = helper.make_node("Conv", ["image", "weights"], ["Conv_0_zero_bias"])
    both = helper.make_node("Add", ["maps", "Conv_0_zero_bias"], ["weights_0"])
    convolution, mean = graph.node
    mean.input[0] = "weights_0"
    nodes = [convolution, second, both, mean]
    graph.ClearField("node")
    graph.node.extend(nodes)
    changed = Graph(model, with_biases=True)
    made = [name for node in changed.nodes for name in node.output]
    held = [one.name for one in graph.initializer]
    assert len({*made, *held}) == len(made) + len(held)
    onnx.checker.check_model(model)


def test_fp16_adds_no_bias(tmp_path: Path) -> None:
    to_half(write_convolving(tmp_path / "model.onnx", 8), tmp_path / "half.onnx")
    nodes = onnx.load(tmp_path / "half.onnx").graph.node
    assert [len(node.input) for node in nodes if node.op_type == "Conv"] == [2]
