"""The forms in which people's ONNX files come: taken as they are meant, or refused with what to do.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import hypothesis
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from batchclf.errors import ModelError
from batchclf.models.found_labels import labels_in
from batchclf.models.resolve import ResolvedModel, check_model, resolve_model
from batchclf.results.records import Activation
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import Batchclf, read_records, write_job
from tests.models.onnx_models import (
    PREPROCESS,
    Array,
    Classifier,
    Dim,
    as_fed,
    ask_by_hand,
    build,
    constants,
    quantised,
    save,
    with_tail,
)
from tests.models.test_onnx_file import open_on_cpu, pixels, resolve

PLAIN = Classifier()
FIVE = ("ant", "bee", "cat", "dog", "elk")
node = helper.make_node


def float_value(name: str, shape: list[Dim] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def spec_of(path: Path, **spec: Any) -> ModelSpec:
    """The file as a job's `model`."""
    return ModelSpec.model_validate({"preprocess": PREPROCESS, **spec, "onnx": path})


def resolve_and_hear(path: Path, *, batch_size: int = 4, **spec: Any) -> tuple[ResolvedModel, str]:
    """The file as a job gets it, and what the log says."""
    said: list[str] = []
    found = resolve_model(
        spec_of(path, **spec),
        batch_size=batch_size,
        open_reference=open_reference,
        log=said.append,
    )
    return found, "\n".join(said)


def answers(found: ResolvedModel, images_NHWC: NDArray[np.uint8]) -> Array:
    """The bundle's own scores NK, in the batches that it takes."""
    classify = open_on_cpu(found)
    size = found.bundle.meta.fixed_batch or len(images_NHWC)
    parts = [classify(images_NHWC[at : at + size]) for at in range(0, len(images_NHWC), size)]
    return np.concatenate(parts)


def assert_as_by_hand(found: ResolvedModel, path: Path, output: str = "answer") -> None:
    images_NHWC = pixels(8)
    expected_NK = ask_by_hand(path, output, as_fed(images_NHWC))
    np.testing.assert_allclose(answers(found, images_NHWC), expected_NK, rtol=1e-3, atol=1e-4)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[0, 1, 1, 5], [0, 1, 5], [0, 5, 1], [0, 5, 1, 1]], ids=str)
@pytest.mark.parametrize("declared", [True, False])
def test_axes_of_length_one_around_the_classes_do_not_matter(
    tmp_path: Path, shape: list[int], declared: bool
) -> None:
    model = build(PLAIN)
    constants(model, shape=np.array(shape))
    said = float_value("answer", ["batch", *shape[1:]] if declared else None)
    with_tail(model, [node("Reshape", ["before", "shape"], ["answer"])], [said])
    path = tmp_path / "own.onnx"
    onnx.save(model, path)
    found = resolve(path)
    assert found.bundle.meta.fixed_batch is None
    assert_as_by_hand(found, path)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_scores_without_an_axis_for_the_batch_run_one_image_at_a_time(
    tmp_path: Path, batch: Dim
) -> None:
    model = build(PLAIN.but(batch=batch))
    constants(model, first=np.array([0]))
    squeeze = [node("Squeeze", ["before", "first"], ["answer"])]
    onnx.save(with_tail(model, squeeze, [float_value("answer", [5])]), tmp_path / "own.onnx")
    found = resolve(tmp_path / "own.onnx")
    assert found.bundle.meta.fixed_batch == 1
    assert len(found.labels) == 5
    assert_as_by_hand(found, tmp_path / "own.onnx")


@pytest.mark.parametrize("form", [PLAIN, PLAIN.but(num_classes=1)], ids=["classes", "one output"])
def test_a_squeeze_of_all_axes_leaves_the_batch_open(tmp_path: Path, form: Classifier) -> None:
    """As x.squeeze() does it: one image loses the axis of the batch, and several keep it."""
    model = with_tail(build(form), [node("Squeeze", ["before"], ["answer"])], [])
    model.graph.output.append(float_value("answer", None))
    onnx.save(model, tmp_path / "own.onnx")
    activation = "none" if form.num_classes == 1 else None
    found = resolve(tmp_path / "own.onnx", activation=activation)
    assert found.bundle.meta.fixed_batch is None
    assert len(found.labels) == form.num_classes
    assert_as_by_hand(found, tmp_path / "own.onnx")


@pytest.mark.parametrize(
    ("num_classes", "batch_size"), [(2, 2), (4, 4), (8, 8), (3, 3), (2, 8), (4, 8)]
)
def test_the_classes_of_one_image_are_no_batch_of_as_many(
    tmp_path: Path, num_classes: int, batch_size: int
) -> None:
    form = PLAIN.but(num_classes=num_classes, seed=200 + batch_size)  # built anew
    model = build(form)
    constants(model, first=np.array(0))
    tail = [node("Gather", ["before", "first"], ["answer"], axis=0)]
    onnx.save(with_tail(model, tail, [float_value("answer", [None])]), tmp_path / "own.onnx")
    found, said = resolve_and_hear(tmp_path / "own.onnx", batch_size=batch_size)
    assert found.bundle.meta.fixed_batch == 1
    assert "so it runs in batches of 1" in said
    assert len(found.labels) == num_classes
    assert_as_by_hand(found, tmp_path / "own.onnx")


@pytest.mark.parametrize("size", [(-1, -1), (32, -1)])
def test_a_height_or_width_of_minus_one_is_open(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(PLAIN.but(size=size), tmp_path / "own.onnx")
    with pytest.raises(
        ModelError, match=r"height and width are open; give model\.preprocess\.crop"
    ):
        resolve(path)
    found = resolve(path, preprocess=PREPROCESS | {"crop": [32, 24]})
    assert_as_by_hand(found, path)


# ---- how a graph ends ----------------------------------------------------------------------------


def quantise(name: str, output: str, *, and_back: bool = True) -> list[onnx.NodeProto]:
    """8-bit steps of 1/256 as TensorFlow Lite has them after a softmax."""
    nodes = [node("QuantizeLinear", [name, "q_scale", "q_zero"], [f"{output}_q"])]
    if and_back:
        nodes.append(node("DequantizeLinear", [f"{output}_q", "q_scale", "q_zero"], [output]))
    else:
        nodes[0].output[0] = output
    return nodes


def in_8_bits(operator: str) -> list[onnx.NodeProto]:
    """The operator of com.microsoft that takes and gives 8-bit numbers, and floats around it."""
    names = ["x_q", "x_scale", "x_zero", "q_scale", "q_zero"]
    attributes: dict[str, Any] = {"axis": 1, "opset": 13} if operator == "QLinearSoftmax" else {}
    return [
        node("QuantizeLinear", ["logits", "x_scale", "x_zero"], ["x_q"]),
        node(operator, names, ["y_q"], domain="com.microsoft", **attributes),
        node("DequantizeLinear", ["y_q", "q_scale", "q_zero"], ["answer"]),
    ]


def ends(activation: str) -> dict[str, list[onnx.NodeProto]]:
    """Ways for a graph to end in an activation and not to look like it."""
    axis: list[dict[str, Any]] = [{"axis": 0}, {"axis": 1}] if activation == "Softmax" else [{}, {}]
    act = node(activation, ["logits"], ["p"], **axis[1])
    return {
        "quantised": [act, *quantise("p", "answer")],
        "quantised twice": [act, *quantise("p", "p2"), *quantise("p2", "answer")],
        "cast": [
            act,
            node("Cast", ["p"], ["half"], to=TensorProto.FLOAT16),
            node("Cast", ["half"], ["answer"], to=TensorProto.FLOAT),
        ],
        "identity": [act, node("Identity", ["p"], ["answer"])],
        "reshaped": [act, *quantise("p", "p2"), node("Reshape", ["p2", "flat"], ["answer"])],
        "transposed": [
            node("Transpose", ["logits"], ["t"], perm=[1, 0]),
            node(activation, ["t"], ["p"], **axis[0]),
            node("Transpose", ["p"], ["u"], perm=[1, 0]),
            *quantise("u", "answer"),
        ],
        "8-bit operator": in_8_bits(f"QLinear{activation}"),
        "clipped": [act, node("Clip", ["p", "low", "high"], ["answer"])],
    }


FLAT = PLAIN.but(num_classes=200)
"""With scores of 1/200 or so, in steps of 1/256: rows of them add up to anything but 1."""


def with_end(
    tail: list[onnx.NodeProto], path: Path, output_type: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """The model of 200 classes, its logits made small, and `tail` after them."""
    model = build(FLAT)
    constants(
        model,
        small=np.float32(0.02),
        q_scale=np.float32(1 / 256),
        q_zero=np.uint8(0),
        x_scale=np.float32(0.05),
        x_zero=np.uint8(128),
        flat=np.array([-1, FLAT.num_classes]),
        low=np.float32(0),
        high=np.float32(1),
        axis=np.array([1]),
    )
    output = helper.make_tensor_value_info("answer", output_type, ["batch", FLAT.num_classes])
    with_tail(model, [node("Mul", ["before", "small"], ["logits"]), *tail], [output])
    onnx.save(model, path)
    return model


@pytest.mark.parametrize("activation", ["Softmax", "Sigmoid"])
@pytest.mark.parametrize("end", ends("Softmax"))
def test_an_activation_in_the_graph_is_seen_behind_what_hands_it_on(
    tmp_path: Path, activation: str, end: str
) -> None:
    with_end(ends(activation)[end], tmp_path / "own.onnx")
    found, said = resolve_and_hear(tmp_path / "own.onnx")
    assert found.bundle.meta.activation == "none"
    assert ("do not exclude each other" in said) == (activation == "Sigmoid")
    assert_as_by_hand(found, tmp_path / "own.onnx")
    for given in ("softmax", "sigmoid"):
        with pytest.raises(ModelError, match=rf"found {given}, but .* ends with a {activation}"):
            resolve(tmp_path / "own.onnx", activation=given)
    assert resolve(tmp_path / "own.onnx", activation="none").bundle.meta.activation == "none"


def test_a_softmax_in_its_parts_is_one(tmp_path: Path) -> None:
    tail = [
        node("ReduceMax", ["logits"], ["most"], axes=[1]),
        node("Sub", ["logits", "most"], ["shifted"]),
        node("Exp", ["shifted"], ["above"]),
        node("ReduceSum", ["above", "axis"], ["below"]),
        node("Div", ["above", "below"], ["p"]),
        *quantise("p", "answer"),
    ]
    with_end(tail, tmp_path / "own.onnx")
    assert resolve(tmp_path / "own.onnx").bundle.meta.activation == "none"


@pytest.mark.parametrize("name", ["own", "function"])
def test_a_softmax_inside_a_function_of_the_file_is_one(tmp_path: Path, name: str) -> None:
    body = [node("Softmax", ["x"], ["y"], axis=-1)]
    made = helper.make_function(name, "head", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
    tail = [node("head", ["logits"], ["p"], domain=name), *quantise("p", "answer")]
    model = with_end(tail, tmp_path / "own.onnx")
    model.functions.append(made)
    onnx.save(model, tmp_path / "own.onnx")
    found = resolve(tmp_path / "own.onnx")
    assert found.bundle.meta.activation == "none"
    assert_as_by_hand(found, tmp_path / "own.onnx")


@pytest.mark.parametrize("activation", ["Softmax", "Sigmoid"])
def test_scores_of_8_bits_are_made_floats(tmp_path: Path, activation: str) -> None:
    tail = [
        node(activation, ["logits"], ["p"]),
        *quantise("p", "p2", and_back=False),
        node("Reshape", ["p2", "flat"], ["answer"]),
    ]
    with_end(tail, tmp_path / "own.onnx", TensorProto.UINT8)
    found = resolve(tmp_path / "own.onnx")
    images_NHWC = pixels(8)
    steps_NK = ask_by_hand(tmp_path / "own.onnx", "answer", as_fed(images_NHWC))
    np.testing.assert_allclose(answers(found, images_NHWC), steps_NK / 256, atol=1e-6)
    assert found.bundle.meta.activation == "none"


def test_log_softmax_is_a_kind_of_logits(tmp_path: Path) -> None:
    with_end([node("LogSoftmax", ["logits"], ["answer"], axis=1)], tmp_path / "own.onnx")
    assert resolve(tmp_path / "own.onnx").bundle.meta.activation == "softmax"


@pytest.mark.parametrize("given", ["softmax", "sigmoid", "none", None])
def test_the_jobs_activation_stands_over_what_logits_would_get(
    tmp_path: Path, given: Activation | None
) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    assert resolve(path, activation=given).bundle.meta.activation == (given or "softmax")


# ---- one output ----------------------------------------------------------------------------------

ONE = PLAIN.but(num_classes=1)


@pytest.mark.parametrize("given", ["softmax", None])
def test_one_number_per_image_is_refused_until_the_job_says_what_it_is(
    tmp_path: Path, given: Activation | None
) -> None:
    path = save(ONE, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"one number per image.*model\.activation.*sigmoid"):
        resolve(path, activation=given)
    with pytest.raises(ModelError, match="one number per image"):
        check_model(spec_of(path, activation=given))


@pytest.mark.parametrize("rank", [1, 2])
def test_one_number_is_two_classes_with_a_sigmoid_and_itself_with_none(
    tmp_path: Path, rank: int
) -> None:
    model = build(ONE)
    constants(model, last=np.array([1]))
    tail = [
        node("Identity" if rank == 2 else "Squeeze", ["before", "last"][: 3 - rank], ["answer"])
    ]
    shape: list[Dim] = ["batch", 1]
    onnx.save(with_tail(model, tail, [float_value("answer", shape[:rank])]), tmp_path / "own.onnx")
    found = resolve(tmp_path / "own.onnx", activation="sigmoid")
    expected_N1 = ask_by_hand(tmp_path / "own.onnx", "answer", as_fed(pixels(8)))
    assert found.bundle.meta.activation == "softmax"
    assert found.labels == ("0", "1")
    expected_NK = np.concatenate([np.zeros_like(expected_N1), expected_N1], axis=1)
    np.testing.assert_allclose(answers(found, pixels(8)), expected_NK, rtol=1e-3, atol=1e-4)
    itself = resolve(tmp_path / "own.onnx", activation="none")
    assert itself.labels == ("0",)
    np.testing.assert_allclose(answers(itself, pixels(8)), expected_N1, rtol=1e-3, atol=1e-4)


def test_one_number_behind_a_sigmoid_is_the_score_of_the_second_of_two(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    path = save(ONE.but(scores="sigmoid", size=(32, 32)), tmp_path / "own.onnx")
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    job = write_job(tmp_path, model={"onnx": str(path), "preprocess": PREPROCESS})
    done = batchclf("run", job, "--limit", "4")
    assert done.exit_code == 0, done.stderr
    assert "two classes, and it is the score of the second" in done.stderr
    for record in read_records(tmp_path / "out"):
        scores = {one["label"]: one["score"] for one in record["predictions"]}
        assert set(scores) == {"no", "yes"}
        assert sum(scores.values()) == pytest.approx(1)
    found = resolve(path)
    p_N1 = ask_by_hand(path, "answer", as_fed(pixels(8, 32, 32)))
    np.testing.assert_allclose(
        answers(found, pixels(8, 32, 32)), np.concatenate([1 - p_N1, p_N1], axis=1), atol=1e-5
    )


def test_a_softmax_over_one_number_is_refused(tmp_path: Path) -> None:
    path = save(ONE.but(scores="probabilities"), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="Softmax over one number per image, which is always 1"):
        resolve(path)


# ---- what is no score for each class -------------------------------------------------------------


def picked(operator: str) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """A graph's end that gives places or a few values."""
    softmax = node("Softmax", ["before"], ["inside"], axis=1)
    top = node("TopK", ["inside", "k"], ["values", "places"], axis=1)
    as_float = node("Cast", ["places"], ["answer"], to=TensorProto.FLOAT)
    match operator:
        case "TopK values":
            top.output[0] = "answer"
            return [softmax, top], [float_value("answer", ["batch", 3])]
        case "TopK places":
            return [softmax, top, as_float], [float_value("answer", ["batch", 3])]
        case "TopK both":
            joined = node("Concat", ["values", "floats"], ["answer"], axis=1)
            as_float.output[0] = "floats"
            return [softmax, top, as_float, joined], [float_value("answer", ["batch", 6])]
    best = node("ArgMax", ["inside"], ["places"], axis=1, keepdims=0)
    if operator == "ArgMax":
        places = helper.make_tensor_value_info("places", TensorProto.INT64, ["batch"])
        return [softmax, best], [places]
    return [softmax, best, as_float], [float_value("answer", ["batch"])]


@pytest.mark.parametrize(
    "operator", ["TopK values", "TopK places", "TopK both", "ArgMax", "ArgMax as float"]
)
def test_what_a_graph_picked_is_refused_and_the_tensor_inside_is_taken_if_named(
    tmp_path: Path, operator: str
) -> None:
    model = build(PLAIN)
    constants(model, k=np.array([3]))
    onnx.save(with_tail(model, *picked(operator)), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"picked.*model\.output_name: inside") as caught:
        resolve(tmp_path / "own.onnx")
    with pytest.raises(ModelError) as validated:
        check_model(spec_of(tmp_path / "own.onnx"))
    assert str(validated.value) == str(caught.value)
    with pytest.raises(ModelError, match=r"picked.*model\.output_name: inside"):
        resolve(tmp_path / "own.onnx", output_name=model.graph.output[0].name)
    found = resolve(tmp_path / "own.onnx", output_name="inside")
    assert found.bundle.meta.activation == "none"
    reference = build(PLAIN.but(scores="probabilities"))
    onnx.save(reference, tmp_path / "inside.onnx")
    assert_as_by_hand(found, tmp_path / "inside.onnx")


def test_scores_beside_what_was_picked_from_them_are_taken(tmp_path: Path) -> None:
    model = build(PLAIN)
    constants(model, k=np.array([3]))
    tail, outputs = picked("TopK values")
    onnx.save(
        with_tail(model, tail, [*outputs, float_value("inside", ["batch", 5])]),
        tmp_path / "own.onnx",
    )
    found = resolve(tmp_path / "own.onnx")
    assert_as_by_hand(found, tmp_path / "own.onnx", "inside")


def test_a_detector_is_refused_as_one(tmp_path: Path) -> None:
    model = build(PLAIN)
    constants(model, boxes=np.zeros((1, 5, 4), np.float32), one=np.array([1]))
    tail = [
        node("Unsqueeze", ["before", "one"], ["scores"]),
        node("NonMaxSuppression", ["boxes", "scores"], ["picked"]),
        node("Cast", ["picked"], ["answer"], to=TensorProto.FLOAT),
    ]
    onnx.save(with_tail(model, tail, [float_value("answer", ["found", 3])]), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="this is a detector of objects"):
        resolve(tmp_path / "own.onnx")


# ---- outputs that are no tensors, and several ----------------------------------------------------


def dictionaries(keys: dict[str, Any]) -> onnx.ModelProto:
    """As Custom Vision and skl2onnx end: a label, and a dictionary of scores per image."""
    model = build(PLAIN)
    tail = [
        node("Softmax", ["before"], ["inside"], axis=1),
        node("ArgMax", ["inside"], ["label"], axis=1, keepdims=0),
        node("ZipMap", ["inside"], ["loss"], domain="ai.onnx.ml", **keys),
    ]
    kind = TensorProto.STRING if "classlabels_strings" in keys else TensorProto.INT64
    one = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    loss = helper.make_sequence_type_proto(helper.make_map_type_proto(kind, one))
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        helper.make_value_info("loss", loss),
    ]
    return with_tail(model, tail, outputs)


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"classlabels_strings": list(FIVE)}, FIVE),
        ({"classlabels_int64s": [3, 4, 5, 6, 7]}, ("3", "4", "5", "6", "7")),
    ],
)
@pytest.mark.parametrize("output_name", [None, "loss", "inside"])
def test_of_dictionaries_the_tensor_inside_is_taken_with_their_keys_as_labels(
    tmp_path: Path, keys: dict[str, Any], labels: tuple[str, ...], output_name: str | None
) -> None:
    path = tmp_path / "own.onnx"
    onnx.save(dictionaries(keys), path)
    found, said = resolve_and_hear(path, output_name=output_name)
    onnx.save(build(PLAIN.but(scores="probabilities")), tmp_path / "inside.onnx")
    assert_as_by_hand(found, tmp_path / "inside.onnx")
    assert found.bundle.meta.activation == "none"
    if output_name != "inside":
        assert "takes inside, the tensor inside the dictionaries of loss" in said
        assert found.labels == labels
        assert "class names from its ZipMap" in said


def test_keys_that_are_no_text_are_labels_all_the_same(tmp_path: Path) -> None:
    onnx.save(dictionaries({"classlabels_strings": [b"caf\xe9", *FIVE[1:]]}), tmp_path / "own.onnx")
    assert resolve(tmp_path / "own.onnx").labels == ("caf\ufffd", *FIVE[1:])


def test_of_a_sequence_the_tensor_inside_is_named(tmp_path: Path) -> None:
    model = build(PLAIN)
    one = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    sequence = helper.make_value_info("rows", helper.make_sequence_type_proto(one))
    tail = [node("SplitToSequence", ["before"], ["rows"], axis=0)]
    onnx.save(with_tail(model, tail, [sequence]), tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"rows, sequence.*model\.output_name: before"):
        resolve(tmp_path / "own.onnx")
    assert len(resolve(tmp_path / "own.onnx", output_name="before").labels) == 5


def two_outputs(first: str, second: str) -> onnx.ModelProto:
    model = build(PLAIN)
    tail = [node("Identity", ["before"], [first]), node("Neg", ["before"], [second])]
    return with_tail(model, tail, [float_value(name, ["batch", 5]) for name in (first, second)])


def test_of_several_outputs_the_one_named_for_scores_is_taken_and_said(tmp_path: Path) -> None:
    onnx.save(two_outputs("logits", "embedding"), tmp_path / "own.onnx")
    found, said = resolve_and_hear(tmp_path / "own.onnx")
    assert "takes logits for the class scores, of logits, embedding" in said
    assert_as_by_hand(found, tmp_path / "own.onnx", "logits")


def test_of_logits_and_their_softmax_the_softmax_is_taken(tmp_path: Path) -> None:
    model = build(PLAIN)
    tail = [
        node("Identity", ["before"], ["first"]),
        node("Softmax", ["first"], ["second"], axis=1),
    ]
    outputs = [float_value(name, ["batch", 5]) for name in ("first", "second")]
    onnx.save(with_tail(model, tail, outputs), tmp_path / "own.onnx")
    found, said = resolve_and_hear(tmp_path / "own.onnx")
    assert "takes second, the softmax of the other outputs" in said
    assert_as_by_hand(found, tmp_path / "own.onnx", "second")


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baked", "batch_size", "works"),
    [
        ((1, 5), 4, 1),
        ((2, -1), 4, 2),
        ((4, 5), 4, 4),
        ((4, 5), 16, 4),
        ((6, 5), 16, 6),
        ((8, 5), 4, 8),
        ((1, -1), 1, 1),
    ],
)
def test_a_batch_that_is_open_in_name_only_runs_at_the_largest_that_works(
    tmp_path: Path, baked: tuple[int, int], batch_size: int, works: int
) -> None:
    form = PLAIN.but(seed=100 + batch_size)  # what another case has built is not taken
    model = build(form)
    constants(model, baked=np.array(baked))
    tail = [node("Reshape", ["before", "baked"], ["answer"])]
    onnx.save(with_tail(model, tail, [float_value("answer", ["batch", 5])]), tmp_path / "own.onnx")
    found, said = resolve_and_hear(tmp_path / "own.onnx", batch_size=batch_size)
    assert found.bundle.meta.fixed_batch == works
    assert f"open in name only: {works} is the largest" in said
    plain = save(form, tmp_path / "plain.onnx")
    images_NHWC = pixels(2 * works)
    expected_NK = ask_by_hand(plain, "answer", as_fed(images_NHWC))
    np.testing.assert_allclose(answers(found, images_NHWC), expected_NK, rtol=1e-3, atol=1e-4)


def test_a_model_that_answers_for_no_batch_is_refused_without_a_path_of_ours(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    model = build(PLAIN)
    constants(model, baked=np.array([7, 3]))
    tail = [node("Reshape", ["before", "baked"], ["answer"])]
    onnx.save(with_tail(model, tail, [float_value("answer", ["batch", 5])]), tmp_path / "own.onnx")
    job = write_job(tmp_path, model={"onnx": "own.onnx", "preprocess": PREPROCESS}, batch_size=4)
    done = batchclf("run", job)
    assert done.exit_code == 2
    assert "own.onnx: running it on (1, 3, 32, 24) fails: " in done.stderr
    assert "Reshape" in done.stderr
    for foreign in (os.environ["BATCHCLF_CACHE_DIR"], "onnxruntime::", "[E:", "Traceback"):
        assert foreign not in done.stderr


@pytest.mark.parametrize(
    ("ir_version", "opset", "said"),
    [
        (99, 17, r"IR version 99, and ONNX Runtime \S+ reads up to \d+.*model\.ir_version = \d+"),
        (8, 99, r"opset 99 of ai\.onnx, and ONNX Runtime \S+ reads up to \d+.*convert_version"),
    ],
)
def test_a_file_that_is_too_new_is_refused_with_what_is_read_and_how_to_convert(
    tmp_path: Path, ir_version: int, opset: int, said: str
) -> None:
    model = build(PLAIN)
    model.ir_version = ir_version
    model.opset_import[0].version = opset
    (tmp_path / "own.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=rf"own\.onnx: is of .*{said}"):
        resolve(tmp_path / "own.onnx")


# ---- one channel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [None, "grey"])
def test_a_model_of_one_channel_gets_grey_images(
    tmp_path: Path, layout: Literal["NCHW", "NHWC"], channels: str | None
) -> None:
    model = PLAIN.but(channels=1, layout=layout)
    path = save(model, tmp_path / "own.onnx")
    preprocess = {"resize": 40, "mean": [0.13], "std": [0.31], "channels": channels}
    found, said = resolve_and_hear(path, preprocess=preprocess)
    assert "takes one channel, so images are made grey" in said
    assert found.preprocess.channels == "grey"
    images_NHWC = pixels(8)
    images_NHWC[...] = images_NHWC[..., :1]
    fed = ((images_NHWC[..., :1] / 255 - 0.13) / 0.31).astype(np.float32)
    fed = fed.transpose(0, 3, 1, 2) if layout == "NCHW" else fed
    expected_NK = ask_by_hand(path, "answer", fed)
    np.testing.assert_allclose(answers(found, images_NHWC), expected_NK, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("preprocess", "said"),
    [
        ({"channels": "bgr"}, "found bgr, but .* takes one channel: grey"),
        ({"mean": [0.1, 0.2, 0.3]}, "found one number per colour, but .* takes one channel"),
    ],
)
def test_colours_for_a_model_of_one_channel_are_refused(
    tmp_path: Path, preprocess: dict[str, Any], said: str
) -> None:
    path = save(PLAIN.but(channels=1), tmp_path / "own.onnx")
    given = {"resize": 40, "mean": [0.5], "std": [0.5], **preprocess}
    with pytest.raises(ModelError, match=said):
        resolve(path, preprocess=given)


# ---- 8 bits --------------------------------------------------------------------------------------

WIDE = Classifier(num_classes=16, depth=3, opset=17)


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
@pytest.mark.parametrize("form", ["QDQ", "QOperator", "dynamic"])
def test_files_quantised_by_onnx_runtime_give_their_own_answers(
    tmp_path: Path,
    form: Literal["QDQ", "QOperator", "dynamic"],
    scores: Literal["logits", "probabilities"],
) -> None:
    images_NHWC = pixels(24)
    path = save(WIDE.but(scores=scores), tmp_path / "own.onnx")
    small = quantised(path, form, as_fed(images_NHWC[:8]))
    found, said = resolve_and_hear(small)
    meta = found.bundle.meta
    assert meta.arithmetic == "int8"
    assert meta.activation == ("none" if scores == "probabilities" else "softmax")
    assert meta.fixed_batch == (1 if form == "dynamic" else None)
    assert ("one image at a time" in said) == (form == "dynamic")
    expected_NK = ask_by_hand(small, "answer", as_fed(images_NHWC))
    np.testing.assert_array_equal(answers(found, images_NHWC), expected_NK)


@pytest.mark.parametrize("batch", [1, 4])
def test_dynamic_8_bits_with_a_batch_of_its_own_run_one_image_at_a_time_too(
    tmp_path: Path, batch: int
) -> None:
    images_NHWC = pixels(8)
    path = save(WIDE.but(batch=batch), tmp_path / "own.onnx")
    alone = save(WIDE, tmp_path / "alone.onnx")
    found = resolve(quantised(path, "dynamic", as_fed(images_NHWC)))
    assert found.bundle.meta.fixed_batch == 1
    by_hand = quantised(alone, "dynamic", as_fed(images_NHWC))
    expected_NK = ask_by_hand(by_hand, "answer", as_fed(images_NHWC))
    np.testing.assert_array_equal(answers(found, images_NHWC), expected_NK)


def test_every_byte_is_rounded_to_8_bits_as_torchvisions_arithmetic_has_it(tmp_path: Path) -> None:
    """Mean and std of 0.5 and an input of [-1, 1]: each byte lies between two of its steps."""
    shape: list[Dim] = ["batch", 3, 16, 16]
    graph = helper.make_graph(
        [
            node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
            node("DequantizeLinear", ["q", "scale", "zero"], ["answer"]),
        ],
        "steps",
        [float_value("images", shape)],
        [float_value("answer", ["batch", 768])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.graph.node[1].output[0] = "before"
    model.graph.node.append(node("Flatten", ["before"], ["answer"]))
    constants(model, scale=np.float32(2 / 255), zero=np.uint8(128))
    onnx.save(model, tmp_path / "own.onnx")
    half = {"resize": 16, "mean": [0.5], "std": [0.5]}
    found = resolve(tmp_path / "own.onnx", preprocess=half)
    images_NHWC = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    fed = images_NHWC.astype(np.float32) / np.float32(255)
    fed = ((fed - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2)
    expected_NK = ask_by_hand(tmp_path / "own.onnx", "answer", np.ascontiguousarray(fed))
    np.testing.assert_array_equal(answers(found, images_NHWC), expected_NK)


# ---- weights beside the model --------------------------------------------------------------------


def save_in_two(folder: Path, model: Classifier = PLAIN) -> Path:
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(
        build(model),
        path,
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=16,
    )
    return path


def as_in_the_hub_cache(path: Path) -> Path:
    """snapshots/x/model.onnx -> ../../blobs/y, and its data likewise."""
    snapshot = path.parent.parent / "snapshots" / "x"
    blobs = path.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((path, path.with_name("model.onnx_data"))):
        os.replace(file, blobs / f"b{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/b{number}")
    return snapshot / "model.onnx"


def by_hard_link(path: Path) -> Path:
    os.link(path.with_name("model.onnx_data"), path.parent.parent / "other_name")
    return path


def by_dot(path: Path) -> Path:
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = f"./{entry.value}"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("laid_out", [as_in_the_hub_cache, by_hard_link, by_dot])
def test_weights_are_read_through_the_links_that_people_have(
    tmp_path: Path, laid_out: Callable[[Path], Path]
) -> None:
    path = laid_out(save_in_two(tmp_path / "model"))
    found, said = resolve_and_hear(path)
    assert ("a link beside it leads to its weights" in said) == (laid_out is as_in_the_hub_cache)
    plain = save(PLAIN, tmp_path / "plain.onnx")
    assert_as_by_hand(found, plain)
    assert sorted(found.bundle.meta.files) == ["model.onnx"]


def test_other_weights_behind_the_same_link_are_another_model(tmp_path: Path) -> None:
    path = as_in_the_hub_cache(save_in_two(tmp_path / "a" / "model"))
    before = resolve(path)
    other = as_in_the_hub_cache(save_in_two(tmp_path / "b" / "model", PLAIN.but(seed=1)))
    path.with_name("model.onnx_data").unlink()
    path.with_name("model.onnx_data").symlink_to(other.with_name("model.onnx_data"))
    assert resolve(path).bundle.digest != before.bundle.digest


# ---- class names ---------------------------------------------------------------------------------


def with_metadata(path: Path, **metadata: str) -> None:
    model = onnx.load(path)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("files", "metadata", "origin"),
    [
        ({}, {"names": str(dict(enumerate(FIVE)))}, r"its metadata \(names\)"),
        ({}, {"classes": '["ant", "bee", "cat", "dog", "elk"]'}, r"its metadata \(classes\)"),
        ({"labels.txt": "\n".join(FIVE)}, {}, r"\S+labels\.txt, beside it"),
        ({"class_names.txt": "\n".join(FIVE) + "\n"}, {}, r"\S+class_names\.txt, beside it"),
        (
            {
                "config.json": '{"id2label": {"1": "bee", "0": "ant", "2": "cat", "3": "dog", '
                '"4": "elk"}}',
                "labels.txt": "1\n2\n3\n4\n5",
            },
            {},
            r"\S+config\.json, beside it",
        ),
        ({"labels.txt": "a\nb"}, {"names": str(list(FIVE))}, r"its metadata \(names\)"),
    ],
)
def test_class_names_that_come_with_the_model_are_used_and_said(
    tmp_path: Path, files: dict[str, str], metadata: dict[str, str], origin: str
) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    with_metadata(path, **metadata)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):  # built, and from the cache
        found, said = resolve_and_hear(path)
        assert found.labels == FIVE
        assert re.search(rf"class names from {origin}", said), said
    (tmp_path / "own.txt").write_text("v\nw\nx\ny\nz\n")
    own, said = resolve_and_hear(path, labels=str(tmp_path / "own.txt"))
    assert own.labels == ("v", "w", "x", "y", "z")
    assert "class names from" not in said


def test_optimums_config_is_found_above_its_folder_onnx(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    path = save(PLAIN, tmp_path / "onnx" / "model.onnx")
    names = ", ".join(f'"{number}": "{name}"' for number, name in enumerate(FIVE))
    (tmp_path / "config.json").write_text(f'{{"id2label": {{{names}}}}}')
    assert resolve(path).labels == FIVE


@pytest.mark.parametrize(
    ("files", "metadata"),
    [
        ({"labels.txt": "a\nb\nc"}, {}),
        ({}, {"names": "{0: 'a', 2: 'b', 3: 'c', 4: 'd', 5: 'e'}"}),
        ({}, {"names": "__import__('os').getcwd()"}),
        ({}, {"names": "[[[[" * 500}),
        ({"config.json": "{"}, {}),
        ({"config.json": '["id2label"]'}, {}),
        ({"labels.txt": "a\n\nb\nc\nd"}, {}),
        ({}, {"names": "{1e999: 'a'}"}),
        ({}, {"names": '["a", "b", "c", "d", "\\ud800"]'}),
        ({}, {"names": "['a', 'b', 'c']"}),
        ({}, {"classes": '{"0": "a", "1": "b", "2": "c"}'}),
    ],
)
def test_class_names_that_do_not_fit_are_left(
    tmp_path: Path, files: dict[str, str], metadata: dict[str, str]
) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    with_metadata(path, **metadata)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, said = resolve_and_hear(path)
    assert found.labels == ("0", "1", "2", "3", "4")
    told = [len(labels_in(text)) for text in metadata.values()]
    has_three = files.get("labels.txt") == "a\nb\nc" or told == [3]
    assert ("has 3 class names, and" in said) == has_three


# Text that is nearly what Python prints, or is it.
LITERALS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.integers() | st.floats() | st.complex_numbers() | st.text(), inner)
    ),
    max_leaves=8,
)


@hypothesis.given(
    LITERALS.map(repr) | LITERALS.map(repr).map(lambda text: text[1:] + "\\d") | st.text()
)
@hypothesis.example("{1e999: 'a'}")
@hypothesis.example("{-1e999: 'a'}")
@hypothesis.example("{" * 100_000)
@hypothesis.example("-" * 100_000 + "1")
@hypothesis.example("[" + "9" * 10_000 + "]")
@hypothesis.example("{[]: 1}")
@hypothesis.example("\0")
@hypothesis.example("{1j: 'a'}")
def test_any_text_for_class_names_gives_some_or_none(text: str) -> None:
    for name in labels_in(text):
        assert name.strip()
        name.encode()


# ---- validate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (PLAIN, {"preprocess": {"resize": 40, "mean": [0.5]}}),
        (PLAIN, {"preprocess": None}),
        (PLAIN, {"preprocess": PREPROCESS | {"crop": 64}}),
        (PLAIN.but(size=(-1, -1)), {}),
        (PLAIN.but(size=("h", "w")), {}),
        (PLAIN.but(channels="c", size=("h", "w")), {}),
        (PLAIN.but(channels=4), {}),
        (PLAIN.but(output_type="int64"), {}),
        (PLAIN.but(num_classes=1), {}),
        (PLAIN.but(features="vector"), {}),
        (PLAIN, {"output_name": "nothing"}),
        (PLAIN.but(scores="probabilities"), {"activation": "softmax"}),
    ],
    ids=lambda value: "" if isinstance(value, Classifier) else None,
)
def test_validate_refuses_what_a_run_refuses_in_the_same_words(
    tmp_path: Path, model: Classifier, spec: dict[str, Any]
) -> None:
    path = save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError) as run:
        resolve(path, **spec)
    with pytest.raises(ModelError) as validated:
        check_model(spec_of(path, **spec))
    assert str(validated.value) == str(run.value)


def test_validate_counts_the_jobs_labels(tmp_path: Path) -> None:
    path = save(PLAIN, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match="found 1,000 names for a model of 5 classes"):
        check_model(spec_of(path, labels="imagenet"))


@pytest.mark.parametrize(
    ("spec", "known"), [({}, "2 classes"), ({"activation": "none"}, "1 class;")]
)
def test_validate_counts_the_labels_of_one_output(
    tmp_path: Path, spec: dict[str, Any], known: str
) -> None:
    path = save(ONE.but(scores="sigmoid"), tmp_path / "own.onnx")
    (tmp_path / "own.txt").write_text("a\nb\nc\n")
    with pytest.raises(ModelError, match=f"found 3 names for a model of {known}"):
        check_model(spec_of(path, labels=str(tmp_path / "own.txt"), **spec))
    (tmp_path / "own.txt").write_text("a\n" if spec else "a\nb\n")
    check_model(spec_of(path, labels=str(tmp_path / "own.txt"), **spec))


# ---- always the same answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "is_blind"), [("20", True), ("4", True), ("2", True), ("20", False)]
)
def test_a_model_that_says_the_same_of_every_image_is_warned_of(
    batchclf: Batchclf, tmp_path: Path, limit: str, is_blind: bool
) -> None:
    model = build(PLAIN.but(size=(32, 32)))
    if is_blind:
        kernel = next(one for one in model.graph.initializer if one.name == "kernel")
        bias = next(one for one in model.graph.initializer if one.name == "bias")
        for weight, value in ((kernel, 0), (bias, 1)):
            values = np.full(list(weight.dims), value, np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "own.onnx")
    job = write_job(tmp_path, model={"onnx": "own.onnx", "preprocess": PREPROCESS}, batch_size=3)
    done = batchclf("run", job, "--limit", limit)
    assert done.exit_code == 0, done.stderr
    warned = "different images all got one and the same answer, '0' with score 0.2:" in done.stderr
    assert warned == (is_blind and limit != "2")
    assert done.stderr.count("WARNING") == warned
