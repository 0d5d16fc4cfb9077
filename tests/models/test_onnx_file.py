"""A user's own ONNX file: every form of classifier is fed as it wants, or refused with a reason.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from batchclf.errors import ModelError
from batchclf.models import graph
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.runtime.classifier import OnnxClassifier, open_classifier, open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import DATA, MOBILENET_WEIGHTS, ROOT, Batchclf, data, read_records, write_job
from tests.models.onnx_models import (
    MEAN,
    PREPROCESS,
    STD,
    Array,
    Classifier,
    build,
    finish,
    run_by_hand,
    save,
)
from tests.tiny import CPU

PLAIN = Classifier()
ACTIVATIONS = {"logits": "softmax", "probabilities": "none"}
BYTES = PLAIN.but(input_type="uint8")


def resolve(path: Path, **spec: Any) -> ResolvedModel:
    """The file as a job with `model: {onnx: path, preprocess: PREPROCESS}` gets it."""
    given_spec = {"preprocess": PREPROCESS, **spec, "onnx": path}
    return resolve_model(
        ModelSpec.model_validate(given_spec),
        batch_size=4,
        open_reference=open_reference,
        log=print,
    )


def open_on_cpu(model: ResolvedModel) -> OnnxClassifier:
    return open_classifier(model.bundle.model_path, CPU)


def pixels(count: int, height: int = 32, width: int = 24) -> NDArray[np.uint8]:
    """Images between dark and bright, so that channels, rows and columns all differ."""
    rng = np.random.default_rng(count)
    noise_NHWC = rng.integers(0, 256, (count, height, width, 3))
    ramp_H = np.linspace(0, 1, height)[:, None, None]
    tint_C = np.array([1.0, 0.6, 0.3])
    images_NHWC: NDArray[np.uint8] = (noise_NHWC * ramp_H * tint_C).astype(np.uint8)
    return images_NHWC


def assert_answers_as_by_hand(path: Path, model: Classifier, found: ResolvedModel) -> None:
    crop_h, crop_w = found.preprocess.crop
    images_NHWC = pixels(9, crop_h, crop_w)
    expected_NK = run_by_hand(path, model, images_NHWC)
    classify = open_on_cpu(found)
    half = "float16" in (model.input_type, model.output_type)
    sizes = [model.batch] if isinstance(model.batch, int) else [1, 2, 3, 5, 9]
    for size in sizes:
        for start in range(0, 9 - size + 1, size):
            scores_NK = classify(images_NHWC[start : start + size])
            assert scores_NK.dtype == np.float32
            np.testing.assert_allclose(
                scores_NK,
                expected_NK[start : start + size],
                rtol=1e-3,
                atol=5e-3 if half else 1e-4,
            )


# ---- the forms that are taken --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_type", "layout", "batch", "scores", "rank"),
    tuple(
        itertools.product(
            ("float32", "float16", "uint8"),
            ("NCHW", "NHWC"),
            ("batch", 1, 4),
            ("logits", "probabilities"),
            (2, 4),
        )
    ),
)
def test_every_usual_form_of_classifier_gives_its_own_answers(
    tmp_path: Path,
    input_type: str,
    layout: Literal["NCHW", "NHWC"],
    batch: str | int,
    scores: Literal["logits", "probabilities"],
    rank: Literal[2, 4],
) -> None:
    model = Classifier(input_type, layout, batch, scores=scores, rank=rank)
    path = save(model, tmp_path / "own.onnx")
    preprocess = {"resize": 40} if input_type == "uint8" else PREPROCESS
    found = resolve(path, preprocess=preprocess)
    meta = found.bundle.meta
    assert meta.activation == ACTIVATIONS[scores]
    assert meta.fixed_batch == (batch if isinstance(batch, int) else None)
    assert meta.labels == ("0", "1", "2", "3", "4")
    assert found.preprocess.crop == (32, 24)
    assert_answers_as_by_hand(path, model, found)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(PLAIN.but(output_type="float16"), id="float16 scores"),
        pytest.param(PLAIN.but(output_type="float64"), id="float64 scores"),
        pytest.param(
            PLAIN.but(input_type="float16", output_type="float16", scores="probabilities"),
            id="float16 in and out",
        ),
        pytest.param(PLAIN.but(weights_are_inputs=True, opset=8), id="weights among the inputs"),
        pytest.param(
            PLAIN.but(weights_are_inputs=True, opset=7, layout="NHWC"), id="oldest opset, NHWC"
        ),
        pytest.param(PLAIN.but(features="map"), id="feature map as second output"),
        pytest.param(PLAIN.but(batch=None), id="batch without a name"),
        pytest.param(PLAIN.but(batch=-1), id="batch of -1"),
        pytest.param(PLAIN.but(opset=21), id="new opset"),
        pytest.param(PLAIN.but(num_classes=2), id="two classes"),
        pytest.param(PLAIN.but(num_classes=1000, scores="probabilities"), id="1,000 classes"),
    ],
)
def test_less_usual_forms_give_their_own_answers_too(tmp_path: Path, model: Classifier) -> None:
    path = save(model, tmp_path / "own.onnx")
    found = resolve(path)
    assert found.bundle.meta.fixed_batch is None
    assert found.bundle.meta.activation == ACTIVATIONS[model.scores]
    scores_model = model.but(batch="batch") if model.batch == -1 else model
    assert_answers_as_by_hand(path, scores_model, found)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [("height", "width"), (None, None), (40, "width")])
def test_an_open_height_or_width_takes_the_crop_that_the_job_gives(
    tmp_path: Path, layout: Literal["NCHW", "NHWC"], size: tuple[int | str | None, str | None]
) -> None:
    model = PLAIN.but(layout=layout, size=size)
    path = save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"model\.preprocess\.crop"):
        resolve(path)
    found = resolve(path, preprocess=PREPROCESS | {"crop": [40, 28]})
    assert found.preprocess.crop == (40, 28)
    assert_answers_as_by_hand(path, model, found)


def test_another_crop_than_the_file_takes_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"found 64 x 64, but .*own\.onnx takes 32 x 24"):
        resolve(path, preprocess=PREPROCESS | {"crop": 64})


@settings(max_examples=40, deadline=None)
@given(
    mean=st.lists(st.floats(-2, 3), min_size=3, max_size=3),
    std=st.lists(st.floats(0.01, 3), min_size=3, max_size=3),
)
def test_any_mean_and_std_give_what_numpy_gives(
    tmp_path_factory: pytest.TempPathFactory, mean: list[float], std: list[float]
) -> None:
    path = save(PLAIN, tmp_path_factory.mktemp("own") / "own.onnx")
    preprocess = {"resize": 40, "mean": mean, "std": std}
    found = resolve(path, preprocess=preprocess, activation="softmax")
    images_NHWC = pixels(3)
    fed = ((images_NHWC / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    expected_NK = open_reference(path)(fed.astype(np.float32))
    scale = max(1.0, float(np.abs(expected_NK).max()))
    np.testing.assert_allclose(
        open_on_cpu(found)(images_NHWC), expected_NK, rtol=1e-3, atol=1e-4 * scale
    )


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_a_deep_half_precision_model_is_taken(tmp_path: Path, batch: str | int) -> None:
    """Deep enough for float16's rounding to add up to more than one of its steps."""
    model = Classifier("float16", num_classes=64, depth=24, batch=batch, output_type="float16")
    path = save(model, tmp_path / "half.onnx")
    size = batch if isinstance(batch, int) else 4
    found = open_on_cpu(resolve(path))(np.repeat(pixels(1), size, axis=0))
    expected_NK = run_by_hand(path, model, pixels(1))
    scale = float(np.abs(expected_NK).max())
    np.testing.assert_allclose(found, np.repeat(expected_NK, size, axis=0), atol=2e-2 * scale)


@pytest.mark.skipif(not os.environ.get("CI"), reason="20 s: set CI=1 to export MobileNetV2")
def test_a_half_precision_mobilenet_is_taken(tmp_path: Path) -> None:
    """Float32 arithmetic before the model rounds some pixels otherwise than float64 does."""
    torch = pytest.importorskip("torch")
    zoo = pytest.importorskip("torchvision.models")
    module = zoo.mobilenet_v2()
    module.load_state_dict(torch.load(data(MOBILENET_WEIGHTS), weights_only=True))
    torch.onnx.export(
        module.eval().half(),
        (torch.zeros(2, 3, 224, 224, dtype=torch.float16),),
        tmp_path / "half.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    found = resolve(tmp_path / "half.onnx", labels="imagenet")
    assert found.bundle.meta.activation == "softmax"
    assert found.labels[281] == "tabby"


# ---- several outputs -----------------------------------------------------------------------------


def test_two_outputs_that_may_be_scores_have_to_be_told_apart(tmp_path: Path) -> None:
    path = save(PLAIN.but(features="vector"), tmp_path / "own.onnx")
    with pytest.raises(
        ModelError, match=r"say which with model\.output_name\. The outputs are\n  answer, float32 "
    ):
        resolve(path)
    images_NHWC = pixels(3)
    expected_NK = run_by_hand(path, PLAIN, images_NHWC)
    for name, sign in (("answer", 1), ("features", -1)):
        found = open_on_cpu(resolve(path, output_name=name))(images_NHWC)
        np.testing.assert_allclose(found, sign * expected_NK, rtol=1e-3, atol=1e-4)


def test_an_output_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = save(PLAIN.but(features="map"), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"found 'logits'; neither .*\n  answer, .*\n  features, "):
        resolve(path, output_name="logits")
    with pytest.raises(ModelError, match=r"shape \(1, 5, 30, 22\) for a batch of 1"):
        resolve(path, output_name="features")


# ---- what is asked for, and what is refused ------------------------------------------------------


@pytest.mark.parametrize("absent", [("resize",), ("mean",), ("std",), ("mean", "std"), "all"])
def test_preparation_that_the_file_cannot_tell_is_asked_for_and_no_more(
    tmp_path: Path, absent: tuple[str, ...] | str
) -> None:
    keys = ("resize", "mean", "std") if absent == "all" else absent
    path = save(PLAIN, tmp_path / "own.onnx")
    known = {key: value for key, value in PREPROCESS.items() if key not in keys}
    with pytest.raises(ModelError) as caught:
        resolve(path, preprocess=known or None)
    asked = str(caught.value).split("give ")[1].split(" (")[0]
    assert asked == ", ".join(f"model.preprocess.{key}" for key in keys)


def test_of_a_file_that_takes_bytes_only_resize_is_asked(tmp_path: Path) -> None:
    path = save(BYTES, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"give model\.preprocess\.resize \("):
        resolve(path, preprocess=None)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_mean_or_std_for_a_file_that_takes_bytes_is_refused(tmp_path: Path, key: str) -> None:
    path = save(BYTES, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="takes uint8 pixels as they are; remove mean and std"):
        resolve(path, preprocess={"resize": 40, key: [0.5, 0.5, 0.5]})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PLAIN.but(channels="c", size=("h", "w")), r"is \? x \? x \? x \?, which may be NCHW or"),
        (PLAIN.but(size=(224, 3)), r"is \? x 3 x 224 x 3, which may be NCHW or NHWC"),
        (PLAIN.but(channels=4), r"is \? x 4 x 32 x 24: no 3 colour channels, nor 1 for grey"),
        (PLAIN.but(channels=2, layout="NHWC"), r"is \? x 32 x 24 x 2: no 3 colour channels"),
        (PLAIN.but(input_type="int64"), "input images takes INT64; float32, float16 or uint8"),
        (PLAIN.but(num_classes=1), r"gives one number per image.*model\.activation"),
        (
            PLAIN.but(output_type="int64"),
            r"no output has the shape of class scores.*\n  answer, int64",
        ),
    ],
    ids=lambda value: "" if isinstance(value, Classifier) else None,
)
def test_a_file_that_is_no_rgb_classifier_is_refused_with_the_reason(
    tmp_path: Path, model: Classifier, message: str
) -> None:
    path = save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=message) as caught:
        resolve(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_layout_that_cannot_be_told_is_taken_from_the_job(
    tmp_path: Path, layout: Literal["NCHW", "NHWC"]
) -> None:
    model = PLAIN.but(layout=layout, channels="channels", size=("height", "width"))
    path = save(model, tmp_path / "own.onnx")
    found = resolve(path, layout=layout, preprocess=PREPROCESS | {"crop": [16, 20]})
    assert_answers_as_by_hand(path, model, found)


def test_a_layout_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"no 3 colour channels.*, in layout NHWC"):
        resolve(path, layout="NHWC")


def test_a_second_input_is_refused_by_name(tmp_path: Path) -> None:
    model = build(PLAIN)
    model.graph.node.append(helper.make_node("Identity", ["threshold"], ["unused"]))
    model.graph.input.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"found 2 inputs \(images, threshold\)"):
        resolve(tmp_path / "own.onnx")


def test_rows_that_depend_on_their_neighbours_are_refused(tmp_path: Path) -> None:
    """As left behind by a batch normalisation that was exported in training mode."""
    model = build(PLAIN)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("ReduceMean", ["before"], ["mean"], axes=[0]))
    model.graph.node.append(helper.make_node("Sub", ["before", "mean"], ["answer"]))
    onnx.save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"gives other answers than its source.*model\.eval\(\)"):
        resolve(tmp_path / "own.onnx")


def test_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = build(PLAIN)
    kernel = next(weight for weight in model.graph.initializer if weight.name == "kernel")
    kernel.CopyFrom(numpy_helper.from_array(np.full((5, 3, 3, 3), np.nan, np.float32), "kernel"))
    onnx.save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="NaN or infinite"):
        resolve(tmp_path / "own.onnx")


def test_an_opset_that_is_too_old_is_refused(tmp_path: Path) -> None:
    path = save(PLAIN.but(opset=6), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="found opset 6; 7 or later is needed"):
        resolve(path)


def test_an_operator_that_onnx_runtime_does_not_know_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Riddle", ["images"], ["answer"])],
        "riddle",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 24])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["n", 5])],
    )
    onnx.save(finish(graph), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"own\.onnx: ONNX Runtime does not accept it: .*Riddle"):
        resolve(tmp_path / "own.onnx")


def test_the_wrapped_model_of_a_bundle_can_be_wrapped_again(tmp_path: Path) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    first = resolve(path)
    again = resolve(first.bundle.model_path, preprocess={"resize": 40})
    np.testing.assert_array_equal(open_on_cpu(again)(pixels(3)), open_on_cpu(first)(pixels(3)))


# ---- files that are not what their name says -----------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 30, 200, -1])
def test_an_empty_or_truncated_file_is_refused_as_no_model(tmp_path: Path, kept: int) -> None:
    whole = build(PLAIN).SerializeToString()
    path = tmp_path / "own.onnx"
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelError, match=r"own\.onnx: not an ONNX model"):
        resolve(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_still_gives_its_own_answers(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    """Whatever bytes are hit, the only error is one that a user can read."""
    whole = bytearray(build(PLAIN).SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        whole[draw.draw(st.integers(0, len(whole) - 1))] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("own") / "own.onnx"
    path.write_bytes(whole)
    found = None
    with suppress(ModelError):
        found = resolve(path)
    if found is not None:
        images_NHWC = pixels(4, *found.preprocess.crop)
        assert len(open_on_cpu(found)(images_NHWC[: found.bundle.meta.fixed_batch])) in (1, 2, 3, 4)


def test_a_web_page_named_onnx_is_refused_with_how_it_starts(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    page = data(DATA / "weights" / "broken" / "sangeeta1998_mobilenetv2-7.onnx")
    job = write_job(tmp_path, model={"onnx": str(page), "preprocess": PREPROCESS})
    done = batchclf("run", job, "--json")
    assert done.exit_code == 2
    assert done.json["error"].startswith(f"model.onnx: {page}: not an ONNX model: it starts with")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["absent.onnx", ""])
def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: .*: cannot be read: "):
        resolve(tmp_path / name)


# ---- external data -------------------------------------------------------------------------------


def save_with_external_data(model: Classifier, path: Path, location: str) -> Path:
    onnx.save(build(model), path, save_as_external_data=True, location=location, size_threshold=16)
    return path


def test_weights_in_a_second_file_are_read(tmp_path: Path) -> None:
    path = save_with_external_data(PLAIN, tmp_path / "own.onnx", "own.onnx.data")
    found = resolve(path)
    assert_answers_as_by_hand(path, PLAIN, found)
    assert sorted(found.bundle.meta.files) == ["model.onnx"]


def test_weights_too_large_for_one_file_stay_in_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MAX_PROTOBUF_BYTES", 1000)
    model = PLAIN.but(num_classes=64, seed=2)
    path = save_with_external_data(model, tmp_path / "own.onnx", "own.onnx.data")
    found = resolve(path)
    assert sorted(found.bundle.meta.files) == ["model.onnx", "model.onnx.data"]
    assert_answers_as_by_hand(path, model, found)


@pytest.mark.parametrize("location", ["own.onnx.data", "weights.bin"])
def test_new_weights_in_the_second_file_are_a_new_model(tmp_path: Path, location: str) -> None:
    """A model that was trained on and exported again: the graph's own file is the same."""
    path = save_with_external_data(PLAIN, tmp_path / "own.onnx", location)
    graph = path.read_bytes()
    before = resolve(path)
    trained_on = PLAIN.but(seed=1)
    (tmp_path / location).unlink()
    save_with_external_data(trained_on, path, location)
    assert path.read_bytes() == graph
    after = resolve(path)
    assert after.bundle.digest != before.bundle.digest
    assert_answers_as_by_hand(path, trained_on, after)


def test_a_second_file_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save_with_external_data(PLAIN, tmp_path / "own.onnx", "own.onnx.data")
    (tmp_path / "own.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"own\.onnx\.data") as caught:
        resolve(path)
    assert "not an ONNX model" not in str(caught.value)


def test_a_second_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = save_with_external_data(PLAIN, tmp_path / "own.onnx", "own.onnx.data")
    second = tmp_path / "own.onnx.data"
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"own\.onnx"):
        resolve(path)


def test_weights_in_a_constant_of_the_graph_count_as_well(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"

    def save_with_constants(seed: int) -> None:
        model = build(PLAIN.but(seed=seed))
        for weight in list(model.graph.initializer):
            constant = helper.make_node("Constant", [], [weight.name], value=weight)
            model.graph.node.insert(0, constant)
        del model.graph.initializer[:]
        (tmp_path / "second").unlink(missing_ok=True)
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location="second",
            size_threshold=16,
            convert_attribute=True,
        )

    save_with_constants(0)
    before = resolve(path)
    assert_answers_as_by_hand(path, PLAIN, before)
    save_with_constants(1)
    assert_answers_as_by_hand(path, PLAIN, resolve(path))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "/dev/zero"])
def test_weights_outside_the_files_folder_are_not_read(
    batchclf: Batchclf, tmp_path: Path, location: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = save_with_external_data(PLAIN, folder / "own.onnx", "own.onnx.data")
    (tmp_path / "secret.bin").write_bytes((folder / "own.onnx.data").read_bytes())
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    job = write_job(tmp_path, model={"onnx": str(path), "preprocess": PREPROCESS})
    done = batchclf("run", job, timeout=30)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


# ---- the whole way -------------------------------------------------------------------------------


def prepared_by_torchvision(path: Path, crop: int) -> Array:
    """Pixels NHWC of one image, through torchvision's own transforms."""
    transforms = pytest.importorskip("torchvision.transforms")
    steps = transforms.Compose(
        [transforms.Resize(40), transforms.CenterCrop(crop), transforms.PILToTensor()]
    )
    with Image.open(path) as image:
        return np.asarray(steps(image.convert("RGB"))).transpose(1, 2, 0)[None]


def softmax(logits_K: Array) -> Array:
    shifted_K = np.exp(logits_K - logits_K.max())
    return np.asarray(shifted_K / shifted_K.sum())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Classifier(size=(32, 32)), id="float32 NCHW logits"),
        pytest.param(
            Classifier("uint8", "NHWC", 1, (32, 32), scores="probabilities"),
            id="uint8 NHWC batch 1 probabilities",
        ),
        pytest.param(
            Classifier("float32", "NHWC", 4, (32, 32), rank=4), id="float32 NHWC batch 4 N,C,1,1"
        ),
        pytest.param(
            Classifier("float16", size=("h", "w"), output_type="float16"), id="float16 open size"
        ),
    ],
)
def test_a_run_gives_what_the_file_gives_by_hand(
    batchclf: Batchclf, tmp_path: Path, model: Classifier
) -> None:
    path = save(model, tmp_path / "own.onnx")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    names = ("ant", "bee", "cat", "dog", "elk")
    preprocess: dict[str, Any] = {"resize": 40, "crop": 32}
    if model.input_type != "uint8":
        preprocess |= {"mean": list(MEAN), "std": list(STD)}
    job = write_job(
        tmp_path,
        input=str(ROOT / "samples" / "photos"),
        model={"onnx": "own.onnx", "labels": "names.txt", "preprocess": preprocess},
        batch_size=3,
        top_k=5,
    )
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["batch_size"] == (model.batch if isinstance(model.batch, int) else 3)
    records = read_records(tmp_path / "out")
    assert len(records) == 6
    for record in records:
        image = ROOT / "samples" / "photos" / record["path"]
        scores_K = run_by_hand(path, model, prepared_by_torchvision(image, 32))[0]
        expected_K = scores_K if model.scores == "probabilities" else softmax(scores_K)
        order = np.argsort(-expected_K, kind="stable")
        found = record["predictions"]
        assert [entry["label"] for entry in found] == [names[index] for index in order]
        tolerance = 5e-3 if model.input_type == "float16" else 1e-4
        np.testing.assert_allclose(
            [entry["score"] for entry in found], expected_K[order], atol=tolerance
        )
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["model"]["name"] == "own"
