"""The first convolution takes uint8 pixels, and the model's answers stay what they were.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from batchclf.models.calibration import Calibration
from batchclf.models.first_layer import probe_pixels, take_pixels
from batchclf.models.graph import Graph, save_model
from batchclf.models.quantize import quantize_int8
from batchclf.results.records import Pixels
from tests.models.bundles import scores_of

NOISE_NHWC = np.random.default_rng(3).integers(0, 256, (24, 16, 12, 3), np.uint8)
NORMALISE = """
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    floats = Cast <to = 1> (planes)
    scaled = Mul (floats, scale)
    image = Add (scaled, shift)
"""
BGR = """
    turned = Gather <axis = 3> (pixels, backwards)
    floats = Cast <to = 1> (turned)
    centred = Sub (floats, mean)
    divided = Div (centred, deviation)
    image = Transpose <perm = [0, 3, 1, 2]> (divided)
"""
GREY = """
    red = Gather <axis = 3> (pixels, one)
    floats = Cast <to = 1> (red)
    scaled = Div (floats, grey_deviation)
    shifted = Sub (scaled, middle)
    image = Transpose <perm = [0, 3, 1, 2]> (shifted)
"""
BORDERED = "a = Conv <pads = [1, 2, 0, 1], strides = [2, 2]> (image, first, bias)"
UNBORDERED = "a = Conv (image, first, bias)"
TWO = f"{BORDERED} b = Conv <strides = [2, 2]> (image, first) d = GlobalAveragePool (b)"
GREY_C = np.array([124, 116, 104])
SCALE_C = np.array([1 / 58, 1 / 57, 1 / 52])


def write_graph(path: Path, body: str, **others: NDArray[Any]) -> Path:
    """A model of 16 x 12 pixels, uint8 NHWC, to 8 scores; its border is a whole grey."""
    end = "c = GlobalAveragePool (a)\n scores = Flatten <axis = 1> (c)"
    if " d =" in body:
        end = "c = GlobalAveragePool (a)\n e = Add (c, d)\n scores = Flatten <axis = 1> (e)"
    rng = np.random.default_rng(1)
    values = {
        "scale": SCALE_C[:, None, None],
        "shift": (-GREY_C * SCALE_C)[:, None, None],
        "mean": GREY_C[::-1],
        "deviation": 1 / SCALE_C[::-1],
        "grey_deviation": np.array(64),
        "middle": np.array(2),
        "first": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "bias": rng.normal(0, 1, 8),
    }
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        f"graph (uint8[batch, 16, 12, 3] pixels) => (float[batch, 8] scores) {{ {body} {end} }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array, np.float32), name)
        for name, array in (values | others).items()
        if name in used
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(channels), name)
        for name, channels in (("backwards", [2, 1, 0]), ("one", [0]))
        if name in used
    )
    onnx.save(model, path)
    return path


def taken_of(model: Path, folder: Path) -> tuple[list[str], Path]:
    """What `take_pixels` returns for a model, and the file of the graph that it leaves."""
    graph = Graph(onnx.load(model), with_biases=True)
    probe_NHWC = probe_pixels(NOISE_NHWC.shape)
    taken = take_pixels(graph, probe_NHWC, Calibration(graph, probe_NHWC, folder, 1).tensors)
    graph.flush()
    save_model(graph.model, folder / "taken.onnx")
    return taken, folder / "taken.onnx"


@pytest.mark.parametrize(
    ("body", "num_taken"),
    [
        (NORMALISE + BORDERED, 1),
        (NORMALISE + UNBORDERED, 1),
        (NORMALISE + TWO, 2),
        (BGR + BORDERED, 1),
        (GREY + BORDERED, 1),
    ],
    ids=["border", "no-border", "two-convolutions", "bgr", "one-channel"],
)
def test_the_answers_stay_at_the_border_too(tmp_path: Path, body: str, num_taken: int) -> None:
    others = (
        {"first": np.random.default_rng(2).normal(0, 0.3, (8, 1, 3, 3))} if GREY in body else {}
    )
    model = write_graph(tmp_path / "model.onnx", body, **others)
    taken, changed = taken_of(model, tmp_path)
    assert len(taken) == num_taken
    operators = {node.op_type for node in onnx.load(changed).graph.node}
    assert not operators & {"Cast", "Mul", "Sub", "Div"}
    extreme_NHWC = np.zeros_like(NOISE_NHWC)
    extreme_NHWC[1::2] = 255
    for pixels_NHWC in (NOISE_NHWC, extreme_NHWC):
        np.testing.assert_allclose(
            scores_of(changed, pixels_NHWC), scores_of(model, pixels_NHWC), atol=2e-4
        )


def test_a_border_without_a_pixel_of_its_colour_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    shift = np.full((3, 1, 1), 0.1)  # black is lighter than the border
    model = write_graph(tmp_path / "model.onnx", NORMALISE + BORDERED, shift=shift)
    before = [node.op_type for node in onnx.load(model).graph.node]
    taken, changed = taken_of(model, tmp_path)
    assert taken == []
    assert [node.op_type for node in onnx.load(changed).graph.node] == before
    unbordered = write_graph(tmp_path / "model.onnx", NORMALISE + UNBORDERED, shift=shift)
    assert len(taken_of(unbordered, tmp_path)[0]) == 1


@pytest.mark.parametrize(
    "body",
    [
        NORMALISE.replace("image =", "sums =") + "image = Clip (sums, low, high)" + BORDERED,
        NORMALISE.replace("image =", "sums =")
        + "mean_of_all = ReduceMean <axes = [1, 2, 3]> (sums)  image = Sub (sums, mean_of_all)"
        + BORDERED,
        NORMALISE.replace("image =", "sums =") + "image = Mul (sums, vignette)" + BORDERED,
        NORMALISE + BORDERED + "s = ReduceMax <axes = [1, 2, 3]> (image)  d = Abs (s)",
        NORMALISE + BORDERED.replace("pads = [1, 2, 0, 1]", 'auto_pad = "SAME_UPPER"'),
    ],
    ids=["clipped", "by-the-whole-image", "by-place", "taken-elsewhere", "auto-pad"],
)
def test_colours_that_a_convolution_cannot_make_are_left_to_the_graph(
    tmp_path: Path, body: str
) -> None:
    model = write_graph(
        tmp_path / "model.onnx",
        body,
        low=np.array(-1),
        high=np.array(1),
        vignette=np.linspace(0.5, 1, 12),
    )
    assert taken_of(model, tmp_path)[0] == []
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    assert np.isfinite(scores_of(tmp_path / "int8.onnx", NOISE_NHWC)).all()


def test_between_the_pixels_and_the_first_int8_convolution_nothing_is_computed(
    tmp_path: Path,
) -> None:
    model = write_graph(tmp_path / "model.onnx", NORMALISE + BORDERED)
    quantize_int8(model, tmp_path / "int8.onnx", NOISE_NHWC, threads=1)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(tmp_path / "int8.onnx"), settings, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    maker = {name: node for node in nodes for name in node.output}
    taken = [next(node for node in nodes if node.op_type == "QLinearConv").input[0]]
    before = set()
    while taken:
        node = maker.get(taken.pop())
        if node is not None:
            before.add(node.op_type)
            taken += node.input
    assert before == {"Concat", "Expand", "Shape", "Gather"}


def test_a_grey_that_no_pixel_has_is_rounded_by_less_than_a_step(tmp_path: Path) -> None:
    mean_C = np.array([123.675, 116.28, 103.53])
    shift = (-mean_C * SCALE_C)[:, None, None]
    model = write_graph(tmp_path / "model.onnx", NORMALISE + BORDERED, shift=shift)
    _, changed = taken_of(model, tmp_path)
    found, expected = (scores_of(one, NOISE_NHWC) for one in (changed, model))
    assert 1e-5 < np.abs(found - expected).max() < 0.01


def test_probes_meet_every_byte_of_every_channel() -> None:
    probe_NHWC: Pixels = probe_pixels((8, 224, 224, 3))
    assert all(len(np.unique(probe_NHWC[..., channel])) == 256 for channel in range(3))
