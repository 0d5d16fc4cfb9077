"""Models in float16: the same answers within half precision, and what cannot be converted."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from batchclf.errors import ModelError
from batchclf.models.half import to_half
from tests.conftest import PHOTOS, data
from tests.models.bundles import digits_model, mobilenet_model, pixels_of, scores_of
from tests.tiny import DIGITS


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
