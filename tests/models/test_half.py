"""Models in float16: the same answers within half precision, and what cannot be converted."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchclf.errors import ModelError
from batchclf.models.half import to_half
from batchclf.runtime.classifier import open_classifier, open_reference
from tests.conftest import PHOTOS, data
from tests.models.bundles import digits_model, mobilenet_model, pixels_of, scores_of
from tests.tiny import CPU, DIGITS


@pytest.fixture(scope="module")
def digits() -> Path:
    return digits_model().bundle.model_path


def test_a_model_in_float16_gives_the_same_scores_within_half_precision(
    digits: Path, tmp_path: Path
) -> None:
    pixels_NHWC = pixels_of(DIGITS, digits_model())[::3]
    to_half(digits, tmp_path / "half.onnx")
    expected_NK = scores_of(digits, pixels_NHWC)
    found_NK = scores_of(tmp_path / "half.onnx", pixels_NHWC)
    assert found_NK.dtype == np.float32
    assert np.abs(found_NK - expected_NK).max() < 1e-2 * np.abs(expected_NK).max()


def test_weights_are_float16_and_the_normalisation_float32(digits: Path, tmp_path: Path) -> None:
    to_half(digits, tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert types[node.input[1]] == TensorProto.FLOAT16
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * digits.stat().st_size
    assert types["scale"] == types["shift"] == TensorProto.FLOAT


def test_a_model_in_float16_keeps_its_input_and_output(digits: Path, tmp_path: Path) -> None:
    to_half(digits, tmp_path / "half.onnx")
    before, after = onnx.load(digits), onnx.load(tmp_path / "half.onnx")
    for ours, theirs in (
        (after.graph.input, before.graph.input),
        (after.graph.output, before.graph.output),
    ):
        assert [value.name for value in ours] == [value.name for value in theirs]
        assert [value.type.tensor_type.elem_type for value in ours] == [
            value.type.tensor_type.elem_type for value in theirs
        ]


def test_a_weight_out_of_the_range_of_float16_is_refused_by_name(
    digits: Path, tmp_path: Path
) -> None:
    model = onnx.load(digits)
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    weight = next(one for one in model.graph.initializer if one.name == layer.input[1])
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 7e4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ModelError, match=r"holds 70000, and float16 ends at 65,504"):
        to_half(tmp_path / "large.onnx", tmp_path / "half.onnx")


def test_a_float16_model_is_not_converted_twice(digits: Path, tmp_path: Path) -> None:
    to_half(digits, tmp_path / "half.onnx")
    with pytest.raises(ModelError, match="FLOAT16 weights"):
        to_half(tmp_path / "half.onnx", tmp_path / "again.onnx")


def test_mobilenet_in_float16_ranks_the_photos_as_in_float32(tmp_path: Path) -> None:
    mobilenet = mobilenet_model()
    pixels_NHWC = pixels_of(data(PHOTOS), mobilenet)[::4]
    to_half(mobilenet.bundle.model_path, tmp_path / "half.onnx")
    expected_N = scores_of(mobilenet.bundle.model_path, pixels_NHWC).argmax(1)
    found_N = scores_of(tmp_path / "half.onnx", pixels_NHWC).argmax(1)
    assert (found_N == expected_N).mean() >= 0.99


def converted(
    folder: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("scores",),
) -> tuple[onnx.ModelProto, Path]:
    """The float16 model of a graph that takes `image`, float32 N x 8, and gives float32."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "full.onnx")
    to_half(folder / "full.onnx", folder / "half.onnx")
    model = onnx.load(folder / "half.onnx")
    assert_same_answers(folder / "full.onnx", folder / "half.onnx", outputs)
    return model, folder / "half.onnx"


def assert_same_answers(full: Path, half: Path, outputs: tuple[str, ...]) -> None:
    image = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    for output in outputs:
        expected, found = (open_reference(path, output)(image) for path in (full, half))
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32) / 3


def casts(model: onnx.ModelProto) -> list[str]:
    return [node.input[0] for node in model.graph.node if node.op_type == "Cast"]


def test_a_model_in_float16_casts_where_it_leaves_float32_and_where_it_comes_back(
    digits: Path, tmp_path: Path
) -> None:
    to_half(digits, tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    assert [node.op_type for node in model.graph.node].count("Cast") == 3  # with that of the pixels
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    made = {name for node in model.graph.node for name in node.output}
    taken = {name for node in model.graph.node for name in node.input}
    assert made - taken == {"scores"}


def test_a_tensor_that_several_nodes_take_in_the_other_type_is_cast_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["one"]),
        helper.make_node("MatMul", ["image", "w"], ["two"]),
        # Max and CumSum stay float32, side by side.
        helper.make_node("Max", ["one", "two"], ["largest"]),
        helper.make_node("CumSum", ["one", "axis"], ["summed"]),
        helper.make_node("Max", ["largest", "summed"], ["both"]),
        helper.make_node("MatMul", ["both", "w"], ["scores"]),
    ]
    weights = {"w": weight(8, 8), "axis": np.array(1, np.int64)}
    model, _ = converted(tmp_path, nodes, weights)
    assert casts(model) == ["image", "one", "two", "both", "scores_fp16"]


def test_an_output_that_other_nodes_take_as_well_is_float32_outside_and_float16_inside(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["features"]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("MatMul", ["positive", "w"], ["scores"]),
    ]
    model, _ = converted(tmp_path, nodes, {"w": weight(8, 8)}, ("scores", "features"))
    assert casts(model) == ["image", "features_fp16", "scores_fp16"]


def test_a_weight_of_both_a_float16_and_a_float32_node_is_there_in_both(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["third"], value=numpy_helper.from_array(weight(1))),
        helper.make_node("Mul", ["image", "shared"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "w"], ["one"]),
        helper.make_node("Mul", ["one", "shared"], ["two"]),
        helper.make_node("Add", ["two", "third"], ["scores"]),
    ]
    model, _ = converted(tmp_path, nodes, {"w": weight(8, 8), "shared": weight(8)})
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    halves = dict.fromkeys(("shared_fp16", "w_fp16", "third_fp16"), TensorProto.FLOAT16)
    assert types == {"shared": TensorProto.FLOAT, **halves}


def test_a_condition_and_what_its_branches_take_of_the_graph_stay_float32(tmp_path: Path) -> None:
    nothing: list[onnx.ValueInfoProto] = []
    branch_scores = [helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)]
    branches = {
        name: helper.make_graph(
            [helper.make_node(operator, ["one", "image"], ["taken"])], name, nothing, branch_scores
        )
        for name, operator in (("then_branch", "Add"), ("else_branch", "Sub"))
    }
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["one"]),
        helper.make_node("ReduceSum", ["one"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["two"], **branches),
        helper.make_node("MatMul", ["two", "w"], ["scores"]),
    ]
    model, _ = converted(tmp_path, nodes, {"w": weight(8, 8), "zero": np.zeros((), np.float32)})
    assert casts(model) == ["image", "one", "two", "scores_fp16"]


def test_names_that_the_model_has_already_are_not_given_again(tmp_path: Path) -> None:
    """Tensors, weights and a branch's own tensors that are called as the conversion would."""
    nothing: list[onnx.ValueInfoProto] = []
    branch_scores = [helper.make_tensor_value_info("image_fp32", TensorProto.FLOAT, None)]
    branches = {
        name: helper.make_graph(
            [
                helper.make_node(operator, ["w_fp16", "image"], ["scores_fp16_2"]),
                helper.make_node("Neg", ["scores_fp16_2"], ["image_fp32"]),
            ],
            name,
            nothing,
            branch_scores,
        )
        for name, operator in (("then_branch", "Add"), ("else_branch", "Sub"))
    }
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["w_fp16"]),
        helper.make_node("ReduceSum", ["w_fp16"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "w_fp16_fp32"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["image_fp16"], **branches),
        helper.make_node("MatMul", ["image_fp16", "w"], ["scores_fp16"]),
        helper.make_node("MatMul", ["scores_fp16", "w_2"], ["scores"]),
    ]
    zero = np.zeros((), np.float32)
    weights = {"w": weight(8, 8), "w_2": 2 * weight(8, 8), "w_fp16_fp32": zero}
    converted(tmp_path, nodes, weights)


def test_what_operators_of_onnx_runtimes_own_make_is_of_the_type_that_it_says(
    tmp_path: Path,
) -> None:
    own = {"domain": "com.microsoft"}
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["one"]),
        helper.make_node("Shape", ["one"], ["shape"]),
        helper.make_node("ExpandDims", ["shape", "axis"], ["row"], **own),  # int64
        helper.make_node("Squeeze", ["row"], ["again"]),
        helper.make_node("Reshape", ["one", "again"], ["two"]),
        helper.make_node("QuickGelu", ["two"], ["three"], **own),  # float32
        helper.make_node("MatMul", ["three", "w"], ["scores"]),
    ]
    model, _ = converted(tmp_path, nodes, {"w": weight(8, 8), "axis": np.array(0, np.int32)})
    assert casts(model) == ["image", "two", "three", "scores_fp16"]


def test_the_scales_of_a_resize_stay_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["one"]),
        helper.make_node("Resize", ["one", "", "scales"], ["scores"], mode="linear"),
    ]
    converted(tmp_path, nodes, {"w": weight(8, 8), "scales": np.array([1, 2], np.float32)})


def test_a_number_that_float16_rounds_to_zero_does_not_become_one_to_divide_by(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("MatMul", ["image", "zeros"], ["none"]),
        helper.make_node("Add", ["none", "epsilon"], ["little"]),
        helper.make_node("Div", ["none", "little"], ["scores"]),
    ]
    weights = {"zeros": np.zeros((8, 8), np.float32), "epsilon": np.array([1e-12], np.float32)}
    converted(tmp_path, nodes, weights)


def test_attention_over_the_batch_in_float16_opens_on_the_cpu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "w"], ["mixed"]),
        helper.make_node("LayerNormalization", ["mixed", "ones"], ["normed"]),
        helper.make_node("Transpose", ["normed"], ["moved"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["moved", "w"], ["scores"]),
    ]
    weights = {"w": weight(4, 4), "shape": np.array([0, 2, 4]), "ones": np.ones(4, np.float32)}
    _, half = converted(tmp_path, nodes, weights)
    classify = open_classifier(half, CPU)
    assert classify(np.ones((3, 8), np.float32)).shape == (2, 3, 4)
