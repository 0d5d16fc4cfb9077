"""int8: the same answers on every provider and CPU, from whatever float32 model there is.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from batchclf.errors import ModelError
from batchclf.models.bundle import sha256_of
from batchclf.models.calibration import Calibration
from batchclf.models.equalize import equalize
from batchclf.models.graph import Graph, attribute
from batchclf.models.half import to_half
from batchclf.models.quantize import quantize_int8
from batchclf.results.records import Pixels, Scores
from batchclf.runtime.classifier import open_classifier
from batchclf.runtime.providers import PROVIDERS, compiled_in
from batchclf.runtime.sessions import Target
from tests.conftest import BY_HAND, DATA, PHOTOS, data
from tests.models.bundles import digits_model, mobilenet_model, pixels_of, scores_of
from tests.tiny import DIGITS

TRUTH = DATA / "labels" / "imagenet_samples_truth.csv"
NOISE_NHWC = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
PREPARE = """
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    floats = Cast <to = 1> (planes)
    scaled = Mul (floats, scale)
    image = Add (scaled, shift)
"""
CONVOLUTIONS = """
    a = Conv <pads = [1, 1, 1, 1]> (image, first)
    b = Clip (a, zero, six)
    c = Conv <pads = [1, 1, 1, 1], group = 16> (b, depthwise)
    d = Clip (c, zero, six)
    e = Conv (d, narrow)
    f = Conv (e, wide)
    g = Add (e, f)
    h = Conv (g, last)
    i = GlobalAveragePool (h)
    j = Flatten <axis = 1> (i)
    scores = Gemm (j, head, head_bias)
"""
CLIPPED = """
    a = Conv <pads = [1, 1, 1, 1]> (image, first)
    b = Clip (a, low, high)
    c = Conv (b, wide)
    d = GlobalAveragePool (c)
    e = Flatten <axis = 1> (d)
    scores = Gemm (e, head, head_bias)
"""
DEAD = """
    a = Conv (image, patch, drowned)
    b = Relu (a)
    c = Conv (b, wide, wide_bias)
    d = Conv (image, patch)
    e = Add (c, d)
    f = GlobalAveragePool (e)
    g = Flatten <axis = 1> (f)
    scores = Gemm (g, head, head_bias)
"""
LAYERS = """
    a = Conv (image, first)
    b = Relu (a)
    c = Conv <group = 4> (b, grouped)
    d = GlobalAveragePool (c)
    e = Flatten <axis = 1> (d)
    f = MatMul (e, query)
    g = Relu (f)
    h = Gemm <transB = 1> (g, key, zeros)
    scores = Gemm (h, head, head_bias)
"""
"""A convolution of an odd number of channels, one of groups, and every kind of matrix product."""
ATTENTION = """
    patches = Conv <strides = [4, 4]> (image, patch)
    a = Reshape (patches, rows)
    b = Transpose <perm = [0, 2, 1]> (a)
    c = LayerNormalization <axis = -1> (b, ones, zeros)
    q = MatMul (c, query)
    k = MatMul (c, key)
    t = Transpose <perm = [0, 2, 1]> (k)
    w = MatMul (q, t)
    p = Softmax <axis = -1> (w)
    s = MatMul (p, k)
    r = Add (b, s)
    m = ReduceMean <axes = [1], keepdims = 0> (r)
    scores = Gemm (m, head, head_bias)
"""
SPREAD_C = np.logspace(-2.5, 0.5, 16)
"""Channels that differ a thousandfold, which one range per tensor serves badly."""


def write_graph(
    path: Path, body: str, *, batch: str = "batch", opset: int = 17, **others: NDArray[Any]
) -> Path:
    """A model of 16 x 16 pixels, uint8 NHWC, to 10 scores, with random weights and `others`."""
    rng = np.random.default_rng(1)
    shapes = {"wide": (16, 16, 1, 1), "last": (16, 16, 3, 3), "patch": (16, 3, 4, 4)}
    weights = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    weights |= {
        "scale": np.full((1, 1, 1, 1), 1 / 64),
        "shift": np.full((1, 1, 1, 1), -2),
        "first": rng.normal(0, 0.3, (16, 3, 3, 3)) * SPREAD_C[:, None, None, None],
        "depthwise": rng.normal(0, 0.3, (16, 1, 3, 3)) / SPREAD_C[:, None, None, None],
        "narrow": rng.normal(0, 0.3, (16, 16, 1, 1)) * SPREAD_C[:, None, None, None],
        "query": rng.normal(0, 0.3, (16, 16)),
        "key": rng.normal(0, 0.3, (16, 16)),
        "head": rng.normal(0, 1, (16, 10)),
        "head_bias": rng.normal(0, 1, 10),
        "ones": np.ones(16),
        "zeros": np.zeros(16),
        "zero": np.array(0),
        "six": np.array(6),
        "grouped": rng.normal(0, 0.2, (16, 4, 3, 3)),
    }
    weights |= others
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        f"graph (uint8[{batch}, 16, 16, 3] pixels) => (float[{batch}, 10] scores) "
        f"{{ {PREPARE} {body} }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), name)
        for name, values in weights.items()
        if name in used
    )
    if "rows" in used:
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, 16, 16]), "rows"))
    onnx.save(model, path)
    return path


def operators_run(model: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime's CPU provider makes of a model's nodes."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def error_of(found_NK: Scores, expected_NK: Scores) -> float:
    """Root mean square of the difference, in units of the spread of the expected scores."""
    difference = np.sqrt(np.mean((found_NK - expected_NK) ** 2))
    return float(difference / expected_NK.std(axis=0).mean())


def largest_pairs(model: Path) -> list[int]:
    """The largest sum of two weights that an int8 kernel adds in 16 bits, for each layer.

    Two weights are beside each other in a tap, or in all of a filter's taps one after another.
    Depthwise kernels add in 32 bits: those layers are left out.
    """
    graph = onnx.load(model).graph
    tensors = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    largest = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        codes = tensors[makers[node.input[1]].input[0]].astype(np.int64)
        if node.op_type == "Conv":
            codes = codes.transpose(0, 2, 3, 1)
            if attribute(node, "group", 1) == len(codes):
                continue
        elif not attribute(node, "transB", 0):
            codes = codes.T
        sums = []
        for rows in (codes.reshape(-1, codes.shape[-1]), codes.reshape(len(codes), -1)):
            pairs = rows[:, : rows.shape[1] // 2 * 2].reshape(-1, 2)
            sums += [np.maximum(pairs, 0).sum(1).max(), np.maximum(-pairs, 0).sum(1).max()]
        largest.append(int(max(sums)))
    return largest


# ---- a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Path:
    return digits_model().bundle.model_path


@pytest.fixture(scope="module")
def digits_NHWC() -> Pixels:
    return pixels_of(DIGITS, digits_model())[::3]


@pytest.fixture(scope="module")
def digits_int8(
    digits: Path, digits_NHWC: Pixels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("int8") / "model.onnx"
    quantize_int8(digits, target, digits_NHWC[::2], threads=1)
    return target


def test_digits_in_int8_are_read_as_in_float32(
    digits: Path, digits_int8: Path, digits_NHWC: Pixels
) -> None:
    expected_NK = scores_of(digits, digits_NHWC)
    found_NK = scores_of(digits_int8, digits_NHWC)
    assert found_NK.dtype == np.float32
    assert (found_NK.argmax(1) == expected_NK.argmax(1)).mean() >= 0.98
    assert error_of(found_NK, expected_NK) < 0.1


def test_all_convolutions_run_in_int8(digits: Path, digits_int8: Path, tmp_path: Path) -> None:
    num_convolutions = sum(node.op_type == "Conv" for node in onnx.load(digits).graph.node)
    operators = operators_run(digits_int8, tmp_path)
    assert operators["QLinearConv"] == num_convolutions
    assert operators["Conv"] == operators["FusedConv"] == operators["Relu"] == 0


def test_int8_keeps_input_and_output_and_is_less_than_half_the_size(
    digits: Path, digits_int8: Path
) -> None:
    before, after = onnx.load(digits).graph, onnx.load(digits_int8).graph
    for ours, theirs in ((after.input, before.input), (after.output, before.output)):
        assert [value.name for value in ours] == [value.name for value in theirs]
        assert [value.type.tensor_type.elem_type for value in ours] == [
            value.type.tensor_type.elem_type for value in theirs
        ]
        assert ours[0].type.tensor_type.shape.dim[0].dim_param
    assert digits_int8.stat().st_size < digits.stat().st_size / 2


def test_no_pair_of_products_can_saturate_16_bits(digits_int8: Path) -> None:
    sums = largest_pairs(digits_int8)
    assert max(sums) * 255 < 2**15
    assert max(sums) > 120, "more of int8 could have been used"


def test_the_same_input_gives_the_same_file_and_leaves_nothing_else(
    digits: Path, digits_int8: Path, digits_NHWC: Pixels, tmp_path: Path, capfd: Any
) -> None:
    quantize_int8(digits, tmp_path / "model.onnx", digits_NHWC[::2], threads=1)
    assert sha256_of(tmp_path / "model.onnx") == sha256_of(digits_int8)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


# ---- graphs of many kinds ------------------------------------------------------------------------


def test_equalising_leaves_the_scores_as_they_are(tmp_path: Path) -> None:
    graph = Graph(onnx.load(write_graph(tmp_path / "model.onnx", CONVOLUTIONS)), with_biases=True)
    before = {name: values.copy() for name, values in graph.weights.items()}
    run = Calibration(graph, NOISE_NHWC, tmp_path, threads=1)
    equalize(
        graph, {node.name for node in graph.nodes if node.op_type == "Conv"}, run.channel_peaks
    )
    graph.flush()
    onnx.save(graph.model, tmp_path / "equal.onnx")
    changed = {name for name, values in graph.weights.items() if np.any(values != before[name])}
    assert changed >= {"first", "depthwise", "narrow", "wide", "last"}
    np.testing.assert_allclose(
        scores_of(tmp_path / "equal.onnx", NOISE_NHWC),
        scores_of(tmp_path / "model.onnx", NOISE_NHWC),
        atol=1e-3,
    )


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_channels_that_differ_a_thousandfold_survive_int8(tmp_path: Path, opset: int) -> None:
    model = write_graph(tmp_path / "model.onnx", CONVOLUTIONS, opset=opset)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    expected_NK = scores_of(model, NOISE_NHWC)
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC), expected_NK) < 0.1


def test_a_sum_between_convolutions_is_done_in_int8_and_the_head_gives_float32(
    tmp_path: Path,
) -> None:
    model = write_graph(tmp_path / "model.onnx", CONVOLUTIONS)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    operators = operators_run(tmp_path / "int8.onnx", tmp_path)
    assert operators["QLinearConv"] == 5
    assert operators["QLinearAdd"] == 1
    assert operators["QGemm"] == 1
    assert operators["Clip"] == operators["Conv"] == 0


def test_no_pair_can_saturate_in_any_kind_of_layer(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "model.onnx", LAYERS)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    sums = largest_pairs(tmp_path / "int8.onnx")
    assert len(sums) == 5
    assert max(sums) * 255 < 2**15


def test_a_model_of_one_batch_size_is_calibrated_at_it(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "model.onnx", CONVOLUTIONS, batch="5")
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC[:12], threads=1)
    expected_NK = scores_of(model, NOISE_NHWC[:10], size=5)
    found_NK = scores_of(tmp_path / "int8.onnx", NOISE_NHWC[:10], size=5)
    assert error_of(found_NK, expected_NK) < 0.25


def test_of_a_graph_with_attention_the_products_with_weights_are_quantised(tmp_path: Path) -> None:
    model = write_graph(tmp_path / "model.onnx", ATTENTION)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    graph = Graph(onnx.load(tmp_path / "int8.onnx"))
    fed_by = [
        [graph.producer[name].op_type for name in node.input if name in graph.producer]
        for node in graph.nodes
        if node.op_type in ("MatMul", "Gemm", "Conv", "Add")
    ]
    num_quantised = sum("DequantizeLinear" in makers for makers in fed_by)
    assert num_quantised == 3  # query, key and head: not the patches, sums or attention itself
    expected_NK = scores_of(model, NOISE_NHWC)
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC), expected_NK) < 0.25


@pytest.mark.parametrize("bounds", [(1, 6), (0.5, 6), (-6, -0.5), (0, 1), (-1, 1)])
def test_a_clip_keeps_its_bounds(tmp_path: Path, bounds: tuple[float, float]) -> None:
    low, high = (np.array(bound) for bound in bounds)
    model = write_graph(tmp_path / "model.onnx", CLIPPED, low=low, high=high)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    expected_NK = scores_of(model, NOISE_NHWC)
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC), expected_NK) < 0.25
    kept = any(node.op_type == "Clip" for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert kept == (not bounds[0] <= 0 <= bounds[1])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 10), (10,)])
def test_a_bias_of_any_shape_is_added_in_int8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    bias = np.linspace(1, 3, int(np.prod(shape))).reshape(shape)
    model = write_graph(tmp_path / "model.onnx", CONVOLUTIONS, head_bias=bias)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    expected_NK = scores_of(model, NOISE_NHWC)
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC), expected_NK) < 0.1
    assert operators_run(tmp_path / "int8.onnx", tmp_path)["QGemm"] == 1


def test_a_product_with_a_bias_per_image_stays_float32(tmp_path: Path) -> None:
    bias = np.linspace(-1, 1, 10)[:, None]  # as many images as scores
    model = write_graph(tmp_path / "model.onnx", CONVOLUTIONS, batch="10", head_bias=bias)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC[:10], threads=1)
    expected_NK = scores_of(model, NOISE_NHWC[:10])
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC[:10]), expected_NK) < 0.25
    assert operators_run(tmp_path / "int8.onnx", tmp_path)["QGemm"] == 0


def test_layers_get_weights_and_biases_that_no_other_node_uses(tmp_path: Path) -> None:
    body = LAYERS.replace("(h, head, head_bias)", "(h, head, two)").replace("scores", "i")
    body = body.replace("(g, key, zeros)", "(g, query, zeros)")
    model = write_graph(tmp_path / "model.onnx", f"{body} scores = Mul (i, two)", two=np.array(2))
    loaded = onnx.load(model)
    for node in loaded.graph.node:
        if node.op_type == "Conv":
            node.input.append("")  # another way to write that it has no bias
    graph = Graph(loaded, with_biases=True)
    layers = [node for node in graph.nodes if node.op_type in ("Conv", "MatMul", "Gemm")]
    shapes = [[graph.weights[name].shape for name in node.input[1:]] for node in layers]
    assert [shape[1:] for shape in shapes] == [[(16,)], [(16,)], [], [(16,)], [(10,)]]
    names = [name for node in graph.nodes for name in node.input if name in graph.weights]
    assert len(names) == len(set(names))
    graph.flush()
    onnx.save(graph.model, tmp_path / "owned.onnx")
    np.testing.assert_array_equal(
        scores_of(tmp_path / "owned.onnx", NOISE_NHWC), scores_of(model, NOISE_NHWC)
    )


def test_a_model_may_end_in_a_relu(tmp_path: Path) -> None:
    body = LAYERS.replace("scores", "i") + "scores = Relu (i)"
    model = write_graph(tmp_path / "model.onnx", body)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    np.testing.assert_allclose(
        scores_of(tmp_path / "int8.onnx", NOISE_NHWC), scores_of(model, NOISE_NHWC), atol=0.1
    )


def test_a_layer_that_gets_nothing_but_zeros_keeps_its_bias(tmp_path: Path) -> None:
    drowned, bias = np.full(16, -100), np.linspace(-1, 1, 16)
    model = write_graph(tmp_path / "model.onnx", DEAD, drowned=drowned, wide_bias=bias)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    expected_NK = scores_of(model, NOISE_NHWC)
    assert error_of(scores_of(tmp_path / "int8.onnx", NOISE_NHWC), expected_NK) < 0.25


def test_images_that_feed_every_layer_zeros_are_refused(tmp_path: Path) -> None:
    body = "a = Flatten <axis = 1> (image) \n scores = MatMul (a, dense)"
    model = write_graph(tmp_path / "model.onnx", body, dense=np.ones((768, 10)))
    grey_NHWC = np.full_like(NOISE_NHWC, 128)  # what the model takes to 0
    with pytest.raises(ModelError, match="found only zeros before every layer"):
        quantize_int8(model, tmp_path / "int8.onnx", grey_NHWC, threads=1)


def test_a_quantised_model_and_a_float16_model_are_refused(digits_int8: Path, digits: Path) -> None:
    pixels_NHWC = np.zeros((1, 64, 64, 3), np.uint8)
    again, half = digits_int8.with_name("again.onnx"), digits_int8.with_name("half.onnx")
    with pytest.raises(ModelError, match="is quantised already"):
        quantize_int8(digits_int8, again, pixels_NHWC, threads=1)
    to_half(digits, half)
    with pytest.raises(ModelError, match="has FLOAT16 weights"):
        quantize_int8(half, again, pixels_NHWC, threads=1)
    assert not again.exists()


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    body = "a = ReduceMean <axes = [2, 3], keepdims = 0> (image) \n scores = Softmax (a)"
    model = write_graph(tmp_path / "model.onnx", body)
    with pytest.raises(ModelError, match="found no convolution or matrix product"):
        quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)


# ---- real weights --------------------------------------------------------------------------------


@BY_HAND
def test_mobilenet_in_int8_agrees_with_float32_on_the_photos(tmp_path: Path) -> None:
    """On the CPU provider, and on OpenVINO's where the installed ONNX Runtime has it."""
    mobilenet = mobilenet_model()
    truth_N = _truth()
    photos_NHWC = pixels_of(data(PHOTOS), mobilenet)
    expected_N = scores_of(mobilenet.bundle.model_path, photos_NHWC).argmax(1)
    target = tmp_path / "int8.onnx"
    quantize_int8(mobilenet.bundle.model_path, target, photos_NHWC[::2], threads=2)
    for name, least in (("cpu", 0.96), ("openvino", 0.97)):
        if PROVIDERS[name].execution_provider not in compiled_in():
            continue
        classify = open_classifier(target, Target(PROVIDERS[name], precision="int8"), batch_size=10)
        found_N = np.concatenate(
            [classify(photos_NHWC[start : start + 10]) for start in range(0, 250, 10)]
        ).argmax(1)
        assert (found_N == expected_N).mean() >= least
        assert (found_N == truth_N).mean() >= (expected_N == truth_N).mean() - 0.01


def _truth() -> NDArray[np.int64]:
    with data(TRUTH).open() as file:
        classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    return np.array([classes[path.name] for path in sorted(PHOTOS.iterdir())])
