"""What a graph's last operators are together: an activation, what was picked, or neither.

Array shapes: N images of a batch, K classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from batchclf.errors import ModelError
from batchclf.models.resolve import check_model
from tests.models.onnx_models import build, constants, with_tail
from tests.models.test_onnx_file import resolve
from tests.models.test_onnx_forms import (
    ONE,
    PLAIN,
    assert_as_by_hand,
    float_value,
    quantise,
    resolve_and_hear,
    spec_of,
)

node = helper.make_node
Nodes = list[onnx.NodeProto]


def with_ending(path: Path, tail: Nodes, width: int = 5, *, one: bool = False) -> Path:
    """A model of 5 classes (or one output), its scores spread about 0, and `tail` after them."""
    model = build(ONE if one else PLAIN)
    constants(
        model,
        k=np.array([3]),
        axis=np.array([1]),
        none=np.float32(0),
        half=np.float32(0.5),
        unit=np.float32(1),
        two=np.float32(2),
        hundred=np.float32(100),
        weights=np.linspace(0.5, 1.5, 1 if one else 5, dtype=np.float32),
        q_scale=np.float32(1 / 256),
        q_zero=np.uint8(0),
    )
    shifted = node("Sub", ["before", "unit"], ["logits"])
    onnx.save(with_tail(model, [shifted, *tail], [float_value("answer", ["batch", width])]), path)
    return path


# ---- what was picked -----------------------------------------------------------------------------

SOFTMAX = node("Softmax", ["logits"], ["inside"], axis=1)
TOP = node("TopK", ["inside", "k"], ["values", "places"], axis=1)
MOST = node("ReduceMax", ["inside"], ["most"], axes=[1])
LEAST = node("ReduceMin", ["inside"], ["least"], axes=[1])
PLACES = node("Cast", ["places"], ["floats"], to=TensorProto.FLOAT)
BEST = [
    node("ArgMax", ["inside"], ["place"], axis=1),
    node("Cast", ["place"], ["best"], to=TensorProto.FLOAT),
    node("Mul", ["best", "unit"], ["best_2"]),
]
PICKED: dict[str, tuple[Nodes, int]] = {
    "softmax of the values": ([SOFTMAX, TOP, node("Softmax", ["values"], ["answer"])], 3),
    "sigmoid of the values": ([SOFTMAX, TOP, node("Sigmoid", ["values"], ["answer"])], 3),
    "values in percent": ([SOFTMAX, TOP, node("Mul", ["values", "hundred"], ["answer"])], 3),
    "places from 1": ([SOFTMAX, TOP, PLACES, node("Add", ["floats", "unit"], ["answer"])], 3),
    "best score and its place": (
        [SOFTMAX, MOST, *BEST, node("Concat", ["most", "best_2"], ["answer"], axis=1)],
        2,
    ),
    "best and worst score": (
        [SOFTMAX, MOST, LEAST, node("Concat", ["most", "least"], ["answer"], axis=1)],
        2,
    ),
}


@pytest.mark.parametrize("form", PICKED)
def test_arithmetic_does_not_make_scores_of_what_was_picked(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", *PICKED[form])
    with pytest.raises(ModelError, match=r"picked.*model\.output_name: inside"):
        resolve(path)
    with pytest.raises(ModelError, match="picked"):
        check_model(spec_of(path))
    assert resolve(path, output_name="inside").bundle.meta.activation == "none"


SCORES: dict[str, Nodes] = {
    "all but the largest made small": [
        node("TopK", ["logits", "k"], ["values", "places"], axis=1),
        node("ReduceMin", ["values"], ["least"], axes=[1]),
        node("Less", ["logits", "least"], ["is_small"]),
        node("Where", ["is_small", "none", "logits"], ["answer"]),
    ],
    "mixture of experts": [
        node("TopK", ["logits", "k"], ["values", "places"], axis=1),
        node("Softmax", ["values"], ["gates"], axis=1),
        node("ReduceMax", ["gates"], ["gate"], axes=[1]),
        node("Mul", ["logits", "gate"], ["answer"]),
    ],
    "less the largest": [
        node("ReduceMax", ["logits"], ["most"], axes=[1]),
        node("Sub", ["logits", "most"], ["answer"]),
    ],
}


@pytest.mark.parametrize("form", SCORES)
def test_scores_in_which_something_picked_takes_part_are_scores(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", SCORES[form])
    found = resolve(path)
    assert found.bundle.meta.activation == "softmax"
    assert_as_by_hand(found, path)


# ---- activations ---------------------------------------------------------------------------------

MINUS = [node("Neg", ["logits"], ["minus"]), node("Exp", ["minus"], ["exp"])]
PARTS = [*MINUS, node("Add", ["exp", "unit"], ["below"])]
EXP = [node("Exp", ["logits"], ["above"]), node("ReduceSum", ["above", "axis"], ["below"])]
LOG = [node("LogSoftmax", ["logits"], ["log"], axis=1)]
P = node("Sigmoid", ["logits"], ["p"])
S = node("Softmax", ["logits"], ["p"], axis=1)
OTHER = node("Mul", ["logits", "weights"], ["others"])
P2 = node("Sigmoid", ["others"], ["p2"])
S2 = node("Softmax", ["others"], ["p2"], axis=1)
JOIN = node("Concat", ["p", "p2"], ["answer"], axis=1)
MEAN = [node("Add", ["p", "p2"], ["both"]), node("Div", ["both", "two"], ["answer"])]
STACK = [
    *[node("Unsqueeze", [one, "axis"], [f"{one}_1"]) for one in ("p", "p2")],
    node("Concat", ["p_1", "p2_1"], ["stack"], axis=1),
    node("ReduceMean", ["stack"], ["answer"], axes=[1], keepdims=0),
]
TANH = [
    node("Mul", ["logits", "half"], ["x"]),
    node("Tanh", ["x"], ["tanh"]),
    node("Mul", ["tanh", "half"], ["small"]),
    node("Add", ["small", "half"], ["answer"]),
]
SIGMOIDS: dict[str, Nodes] = {
    "divided": [*PARTS, node("Div", ["unit", "below"], ["answer"])],
    "reciprocal": [*PARTS, node("Reciprocal", ["below"], ["answer"])],
    "constants in nodes": [
        *MINUS,
        node("Constant", [], ["one"], value_float=1.0),
        node("CastLike", ["one", "exp"], ["one_2"]),
        node("Add", ["one_2", "exp"], ["below"]),
        node("Div", ["one_2", "below"], ["answer"]),
    ],
    "tanh": TANH,
    "mean": [P, OTHER, P2, *MEAN],
    "stacked mean": [P, OTHER, P2, *STACK],
    "complement": [P, node("Sub", ["unit", "p"], ["answer"])],
}
SOFTMAXES: dict[str, Nodes] = {
    "mean": [S, OTHER, S2, *MEAN],
    "stacked mean": [S, OTHER, S2, *STACK],
    "of logarithms, in 8 bits": [*LOG, node("Exp", ["log"], ["p"]), *quantise("p", "answer")],
    "times the reciprocal, in 8 bits": [
        *EXP,
        node("Reciprocal", ["below"], ["over"]),
        node("Mul", ["above", "over"], ["p"]),
        *quantise("p", "answer"),
    ],
}
DERIVED: dict[str, Nodes] = {
    "percent": [S, node("Mul", ["p", "hundred"], ["answer"])],
    "root": [S, node("Pow", ["p", "half"], ["answer"])],
    "weighted, in 8 bits": [S, node("Mul", ["p", "weights"], ["w"]), *quantise("w", "answer")],
    "decisions": [
        P,
        node("Greater", ["p", "half"], ["is_over"]),
        node("Cast", ["is_over"], ["answer"], to=TensorProto.FLOAT),
    ],
    "product of two": [P, OTHER, P2, node("Mul", ["p", "p2"], ["answer"])],
}


@pytest.mark.parametrize("form", SIGMOIDS)
def test_a_sigmoid_is_seen_in_its_parts_and_in_a_mean(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", SIGMOIDS[form])
    found, said = resolve_and_hear(path)
    assert found.bundle.meta.activation == "none"
    assert "5 labels that do not exclude each other" in said
    assert_as_by_hand(found, path)
    with pytest.raises(ModelError, match="ends with a Sigmoid already"):
        resolve(path, activation="sigmoid")


@pytest.mark.parametrize("form", ["divided", "reciprocal", "constants in nodes", "tanh"])
def test_a_sigmoid_in_its_parts_over_one_number_is_the_score_of_the_second_of_two(
    tmp_path: Path, form: str
) -> None:
    path = with_ending(tmp_path / "own.onnx", SIGMOIDS[form], 1, one=True)
    found, said = resolve_and_hear(path)
    assert found.labels == ("0", "1")
    assert found.bundle.meta.activation == "none"
    assert "it is the score of the second" in said
    with pytest.raises(ModelError, match="ends with a Sigmoid already"):
        resolve(path, activation="sigmoid")
    alone, said = resolve_and_hear(path, activation="none")
    assert alone.labels == ("0",)
    assert "Sigmoid over one number, which is the score" in said


@pytest.mark.parametrize("reduction", ["ReduceMax", "ReduceMean"])
def test_the_largest_of_several_sigmoids_is_not_the_score_of_the_second_of_two(
    tmp_path: Path, reduction: str
) -> None:
    path = with_ending(tmp_path / "own.onnx", [P, node(reduction, ["p"], ["answer"], axes=[1])], 1)
    with pytest.raises(ModelError, match="gives one number per image"):
        resolve(path)


@pytest.mark.parametrize("form", SOFTMAXES)
def test_a_softmax_is_seen_in_its_parts_and_in_a_mean(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", SOFTMAXES[form])
    found = resolve(path)
    assert found.bundle.meta.activation == "none"
    assert_as_by_hand(found, path)
    with pytest.raises(ModelError, match="ends with a Softmax already"):
        resolve(path, activation="softmax")


@pytest.mark.parametrize("form", DERIVED)
def test_arithmetic_on_probabilities_gets_no_softmax_and_is_said(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", DERIVED[form])
    found, said = resolve_and_hear(path)
    assert found.bundle.meta.activation == "none"
    assert "made from a softmax, a sigmoid or a comparison, and taken as they are" in said
    assert_as_by_hand(found, path)


@pytest.mark.parametrize(
    ("heads", "said"),
    [([P, OTHER, P2], "10 labels that do not"), ([S, OTHER, S2], "made from a softmax")],
    ids=["sigmoid", "softmax"],
)
def test_the_probabilities_of_several_heads_are_kept(
    tmp_path: Path, heads: Nodes, said: str
) -> None:
    path = with_ending(tmp_path / "own.onnx", [*heads, JOIN], 10)
    found, heard = resolve_and_hear(path)
    assert found.bundle.meta.activation == "none"
    assert said in heard
    assert_as_by_hand(found, path)


UNKNOWN: dict[str, Nodes] = {
    "error function": [node("Erf", ["before"], ["answer"])],
    "parts of 100": [
        node("Relu", ["before"], ["relu"]),
        node("ReduceSum", ["relu", "axis"], ["sum"]),
        node("Div", ["relu", "sum"], ["share"]),
        node("Mul", ["share", "hundred"], ["answer"]),
    ],
    "about 0": [P, node("Mul", ["p", "two"], ["q"]), node("Sub", ["q", "unit"], ["answer"])],
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_numbers_that_may_be_probabilities_are_asked_about(tmp_path: Path, form: str) -> None:
    path = with_ending(tmp_path / "own.onnx", UNKNOWN[form])
    with pytest.raises(
        ModelError, match=r"found scores of .*per image; say with model\.activation"
    ):
        resolve(path)
    for given in ("none", "softmax", "sigmoid"):
        found, said = resolve_and_hear(path, activation=given)
        assert found.bundle.meta.activation == given
        is_between = form == "error function"
        assert ("WARNING: model.activation" in said) == (given != "none" and is_between)


@pytest.mark.parametrize("given", [{}, {"activation": "softmax"}])
def test_a_graph_that_goes_round_or_on_and_on_is_no_traceback(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    doubled = [node("Add", [f"x{at}", f"x{at}"], [f"x{at + 1}"]) for at in range(3000)]
    start, stop = node("Neg", ["logits"], ["x0"]), node("Mul", ["x3000", "none"], ["answer"])
    path = with_ending(tmp_path / "own.onnx", [start, *doubled, stop])
    check_model(spec_of(path, **given))
    scaled = [
        node("DequantizeLinear", ["b", "q_scale"], ["a"]),
        node("DequantizeLinear", ["a", "q_scale"], ["b"]),
        node("Constant", [], ["text"], value_string="one"),
        node("Mul", ["logits", "text"], ["c"]),
        node("Mul", ["c", "b"], ["answer"]),
    ]
    with pytest.raises(ModelError):
        resolve(with_ending(path, scaled), **given)
    round_about = [node("Add", ["answer", "p"], ["x"]), node("Mul", ["x", "x"], ["answer"])]
    with pytest.raises(ModelError):
        resolve(with_ending(path, [S, *round_about]), **given)
