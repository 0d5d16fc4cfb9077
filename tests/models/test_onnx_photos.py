"""Real weights in other people's forms of file, on real photos: as the file says by hand.

Array shapes: N images of a batch, K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, quantize_static

from tests.conftest import ONLY_IN_CI, PHOTOS, Batchclf, data, read_records, write_job
from tests.models.bundles import mobilenet_model, pixels_of
from tests.models.onnx_models import (
    Array,
    Calibration,
    ask_by_hand,
    constants,
    quantised,
    with_tail,
)

NUM_PHOTOS = 50
HALF: dict[str, Any] = {"resize": 256, "mean": [0.5], "std": [0.5]}
IMAGENET: dict[str, Any] = {
    "resize": 256,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to every fifth of the photos."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(data(PHOTOS).glob("*.JPEG"))[:: 250 // NUM_PHOTOS]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def pixels_NHWC(photos: Path) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = pixels_of(photos, mobilenet_model())
    return found


def prepared(pixels_NHWC: NDArray[np.uint8], given: dict[str, Any]) -> Array:
    """As torchvision's ToTensor and Normalize do it, in float32."""
    mean_C, std_C = (np.array(given[key], np.float32) for key in ("mean", "std"))
    fed = (pixels_NHWC.astype(np.float32) / np.float32(255) - mean_C) / std_C
    return np.ascontiguousarray(fed.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNetV2 as people export it: normalised float32 images in, logits out."""
    model = onnx.load(mobilenet_model().bundle.model_path)
    graph = model.graph
    normalised = next(one for one in graph.node if one.op_type == "Conv").input[0]
    names = {normalised: "images", graph.input[0].name: "images", graph.output[0].name: "answer"}
    kept: list[onnx.NodeProto] = []
    needed = {graph.output[0].name}
    for one in reversed(graph.node):
        if needed.intersection(one.output) and normalised not in one.output:
            kept.insert(0, one)
            needed.update(set(one.input) - {normalised})
    for one in kept:
        one.input[:] = [names.get(name, name) for name in one.input]
        one.output[:] = [names.get(name, name) for name in one.output]
    made = helper.make_graph(
        kept,
        "plain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 1000])],
        [one for one in graph.initializer if one.name in needed],
    )
    model = helper.make_model(made, opset_imports=model.opset_import, ir_version=8)
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    onnx.save(model, path)
    return path


def static(path: Path, pixels_NHWC: NDArray[np.uint8], **options: Any) -> Path:
    """In 8 bits with calibrated scales, the input's own 8 bits included."""
    target = path.with_name("static.onnx")
    fed = prepared(pixels_NHWC[::5], options.pop("prepare", IMAGENET))
    quantize_static(
        path,
        target,
        Calibration("images", fed),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        **options,
    )
    return target


def fed_from_minus_one_to_one(path: Path, pixels_NHWC: NDArray[np.uint8]) -> Path:
    """Takes pixels of [-1, 1], in 8 bits at once: each byte lies between two of its steps."""
    model = onnx.load(path)
    mean_C, std_C = (np.array(IMAGENET[key], np.float32) for key in ("mean", "std"))
    constants(
        model,
        to_scale=(0.5 / std_C).reshape(1, 3, 1, 1),
        to_shift=((0.5 - mean_C) / std_C).reshape(1, 3, 1, 1),
        in_scale=np.float32(2 / 255),
        in_zero=np.uint8(128),
    )
    for one in model.graph.node:
        one.input[:] = ["normalised" if name == "images" else name for name in one.input]
    before = [
        helper.make_node("QuantizeLinear", ["images", "in_scale", "in_zero"], ["in_q"]),
        helper.make_node("DequantizeLinear", ["in_q", "in_scale", "in_zero"], ["in_f"]),
        helper.make_node("Mul", ["in_f", "to_scale"], ["in_scaled"]),
        helper.make_node("Add", ["in_scaled", "to_shift"], ["normalised"]),
    ]
    for number, one in enumerate(before):
        model.graph.node.insert(number, one)
    target = path.with_name("half.onnx")
    onnx.save(model, target)
    return target


def static_and_softmax(path: Path, pixels_NHWC: NDArray[np.uint8]) -> Path:
    """As TFLite's converters write it: the softmax itself in 8 bits."""
    model = onnx.load(static(path, pixels_NHWC))
    constants(model, end_scale=np.float32(1 / 256), end_zero=np.uint8(0))
    tail = [
        helper.make_node("Softmax", ["before"], ["p"], axis=1),
        helper.make_node("QuantizeLinear", ["p", "end_scale", "end_zero"], ["p_q"]),
        helper.make_node("DequantizeLinear", ["p_q", "end_scale", "end_zero"], ["answer"]),
    ]
    output = helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 1000])
    target = path.with_name("softmax.onnx")
    onnx.save(with_tail(model, tail, [output]), target)
    return target


def dynamic(path: Path, pixels_NHWC: NDArray[np.uint8]) -> Path:
    return quantised(path, "dynamic", prepared(pixels_NHWC[:1], IMAGENET))


Make = Callable[[Path, NDArray[np.uint8]], Path]


@pytest.mark.parametrize(
    ("make", "given", "activation", "num_photos"),
    [
        (static_and_softmax, IMAGENET, "none", NUM_PHOTOS),
        (fed_from_minus_one_to_one, HALF, "softmax", NUM_PHOTOS),
        (dynamic, IMAGENET, "softmax", 12),  # ConvInteger takes 0.2 s an image
        pytest.param(dynamic, IMAGENET, "softmax", NUM_PHOTOS, marks=ONLY_IN_CI),
    ],
    ids=["static with softmax", "bytes of -1 to 1", "dynamic", "dynamic, all photos"],
)
def test_a_run_over_photos_says_what_the_file_says_by_hand(
    batchclf: Batchclf,
    tmp_path: Path,
    plain: Path,
    photos: Path,
    pixels_NHWC: NDArray[np.uint8],
    make: Make,
    given: dict[str, Any],
    activation: Literal["softmax", "none"],
    num_photos: int,
) -> None:
    path = make(plain, pixels_NHWC)
    job = write_job(
        tmp_path,
        input=str(photos),
        model={"onnx": str(path), "labels": "imagenet", "preprocess": given},
        batch_size=8,
        top_k=5,
        loader={"allow_outside_links": True},
    )
    done = batchclf("run", job, "--json", "--limit", str(num_photos))
    assert done.exit_code == 0, done.stderr
    assert done.json["batch_size"] == (1 if make is dynamic else 8)
    expected_NK = ask_by_hand(path, "answer", prepared(pixels_NHWC[:num_photos], given))
    expected_NK = expected_NK.astype(np.float64)
    if activation == "softmax":
        expected_NK = np.exp(expected_NK - expected_NK.max(axis=1, keepdims=True))
        expected_NK /= expected_NK.sum(axis=1, keepdims=True)
    records = read_records(tmp_path / "out")
    assert len(records) == num_photos
    found = np.array([[one["score"] for one in record["predictions"]] for record in records])
    best = [record["predictions"][0]["index"] for record in records]
    assert best == expected_NK.argmax(axis=1).tolist()
    np.testing.assert_allclose(found, -np.sort(-expected_NK, axis=1)[:, :5], atol=1e-4)
