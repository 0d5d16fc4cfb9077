"""Which tensor of a user's ONNX graph holds the class scores, and what its numbers mean.

Both are read from the graph: what an output is made of says more than its name or its sums.
Whatever cannot be told is asked for, with what to write.

Array shapes: N images of a batch, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.graph import NodeChain, attribute
from batchclf.models.onnx_ends import PASS_ON, Ending, Makers, behind, chain, ending_of, picker
from batchclf.results.records import Activation

Pair = Literal["", "complement", "logits"]
"""Two classes of one output: from a probability p, (1 - p, p); from a logit z, (0, z)."""

_UNSETTLED = ("derived", "unknown")
"""Endings that do not say what the numbers are."""
_WRAPPERS = ("SequenceMap", "SplitToSequence", "SequenceConstruct", "Optional")
"""Operators around a tensor in an output that is none itself."""
_SCALE_AND_ZERO: Mapping[str, tuple[int, int]] = {
    "QuantizeLinear": (1, 2),
    "QLinearSoftmax": (3, 4),
    "QLinearSigmoid": (3, 4),
    "QLinearGlobalAveragePool": (3, 4),
    "QLinearAdd": (6, 7),
    "QLinearConv": (6, 7),
    "QLinearMatMul": (6, 7),
    "QGemm": (7, 8),
}
"""Operators with an 8-bit output, and which of their inputs say what its numbers stand for."""
SHAPES = "[N, C], [N, C, 1, 1], [N, 1, 1, C], [N, 1, C] or [C]"
"""Those of class scores, for messages."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_BYTES = (TensorProto.UINT8, TensorProto.INT8)
_TELLING_NAMES = ("logits", "probabilities", "probs", "scores", "output_probability")
"""Names of the class scores in the exports of Optimum, skl2onnx and many others."""


@dataclass(frozen=True, slots=True)
class ScoreTensor:
    """A tensor of the graph that holds the class scores."""

    name: str
    ending: Ending
    quantised: tuple[str, ...] = ()
    """Of an 8-bit tensor: the names of its scale and zero point."""
    labels: tuple[str, ...] = ()
    """Class names that the graph itself gives."""
    num_classes: int | None = None
    """As the file declares it; None: it does not."""
    note: str = ""
    """Why this tensor, where that is not plain; for the log."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What is still to be done with the numbers of a score tensor."""

    activation: Activation
    pair: Pair = ""
    note: str = ""
    """What else was seen, for the log."""


# ---- which tensor --------------------------------------------------------------------------------


def score_tensor(what: str, model: onnx.ModelProto, wanted: str | None) -> ScoreTensor:
    """The tensor with the class scores: the one wanted, or the one output that can be it.

    Args:
        what: names the file, for messages.
        wanted: the job's `model.output_name`: an output, or any tensor inside the graph.

    Raises:
        ModelError: there is none, or several; the message lists them with what to write.
    """
    graph = model.graph
    makers = Makers(graph)
    outputs = {value.name: value for value in graph.output}
    if wanted is not None:
        if wanted not in outputs and wanted not in makers:
            raise ModelError(
                f"model.output_name: found {wanted!r}; neither an output of {what} nor a tensor "
                f"inside it. {_listed(graph, makers)}"
            )
        value = outputs.get(wanted, onnx.ValueInfoProto(name=wanted))
        maker = makers.get(wanted)
        if maker is not None and maker.op_type == "ZipMap" and maker.input:
            return _inside_zip_map(maker, makers, outputs)
        _refuse_picked(what, wanted, makers)
        return _tensor(value, makers)
    candidates = [_candidate(value, makers, outputs) for value in graph.output]
    found = _only(tuple(one for one in candidates if one is not None), makers)
    if found is not None:
        return found
    for value in graph.output:
        _refuse_picked(what, value.name, makers)
    raise ModelError(
        f"model.onnx: {what}: "
        + (
            "several outputs may be class scores; say which with model.output_name. "
            if any(candidates)
            else f"no output has the shape of class scores, {SHAPES}, in floating point. "
        )
        + _listed(graph, makers)
    )


def _candidate(
    value: onnx.ValueInfoProto, makers: Makers, outputs: Mapping[str, onnx.ValueInfoProto]
) -> ScoreTensor | None:
    """The class scores that an output gives or wraps; None: it cannot be them."""
    maker = makers.get(value.name)
    if maker is not None and maker.op_type == "ZipMap" and maker.input:
        found = _inside_zip_map(maker, makers, outputs)
        return None if found.name in outputs else found
    if not value.type.HasField("tensor_type") or picker(value.name, makers) is not None:
        return None
    tensor = value.type.tensor_type
    is_quantised = tensor.elem_type in _BYTES and _scale_and_zero(value.name, makers)
    if tensor.elem_type not in _FLOATS and not is_quantised:
        return None
    dims = _dims(value)
    # Which of several open dimensions has the classes is seen when the model runs.
    known = [dim for dim in (dims or [])[1:] if dim > 1]
    if dims is not None and (not dims or len(known) > 1 or (known and 0 in dims[2:])):
        return None
    return _tensor(value, makers)


def _only(candidates: tuple[ScoreTensor, ...], makers: Makers) -> ScoreTensor | None:
    """The one to take; None: there is none, or nothing tells them apart."""
    if len(candidates) == 1:
        return candidates[0]
    others = ", ".join(one.name for one in candidates)
    for one in candidates:
        if one.ending in _UNSETTLED:
            continue
        end = behind(one.name, makers)
        inner = set(chain(end.input[0], makers)) if end is not None and end.input else set()
        if all(other is one or other.name in inner for other in candidates):
            return _noted(
                one, f"takes {one.name}, the {one.ending} of the other outputs ({others})"
            )
    telling = [one for one in candidates if one.name.lower() in _TELLING_NAMES]
    if len(telling) == 1:
        return _noted(telling[0], f"takes {telling[0].name} for the class scores, of {others}")
    return None


def _noted(one: ScoreTensor, note: str) -> ScoreTensor:
    return ScoreTensor(one.name, one.ending, one.quantised, one.labels, one.num_classes, note)


def _inside_zip_map(
    node: onnx.NodeProto, makers: Makers, outputs: Mapping[str, onnx.ValueInfoProto]
) -> ScoreTensor:
    """The tensor of which a ZipMap makes one dictionary per image, with its keys as labels."""
    inner = node.input[0]
    keys = attribute(node, "classlabels_strings", ()) or attribute(node, "classlabels_int64s", ())
    keys = keys if isinstance(keys, list) else []
    labels = tuple(
        key.decode(errors="replace") if isinstance(key, bytes) else str(key) for key in keys
    )
    found = _tensor(outputs.get(inner, onnx.ValueInfoProto(name=inner)), makers)
    note = f"takes {inner}, the tensor inside the dictionaries of {node.output[0]}"
    return ScoreTensor(
        inner, found.ending, found.quantised, labels, found.num_classes or len(labels) or None, note
    )


def _tensor(value: onnx.ValueInfoProto, makers: Makers) -> ScoreTensor:
    dims = _dims(value) or []
    sizes = [dim for dim in dims[1:] if dim != 1]
    num_classes = sizes[0] if len(sizes) == 1 and sizes[0] else None
    if len(dims) > 1 and not sizes:
        num_classes = 1
    is_bytes = value.type.tensor_type.elem_type in _BYTES or not value.type.HasField("tensor_type")
    return ScoreTensor(
        value.name,
        ending_of(value.name, makers),
        _scale_and_zero(value.name, makers) if is_bytes else (),
        num_classes=num_classes,
    )


def _dims(value: onnx.ValueInfoProto) -> list[int] | None:
    """An output's dimensions, 0 where one is open; None: the file does not say."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    return [max(0, dim.dim_value) for dim in tensor.shape.dim]


def _scale_and_zero(name: str, makers: Makers) -> tuple[str, ...]:
    """Names of the scale and the zero point of an 8-bit tensor; empty: it has none."""
    for tensor in chain(name, makers, through=PASS_ON - {"QuantizeLinear", "DequantizeLinear"}):
        node = makers.get(tensor)
        places = _SCALE_AND_ZERO.get(node.op_type) if node is not None else None
        if node is not None and places is not None:
            return tuple(node.input[place] for place in places if place < len(node.input))
    return ()


# ---- what is refused -----------------------------------------------------------------------------


def _refuse_picked(what: str, name: str, makers: Makers) -> None:
    node = picker(name, makers)
    if node is None:
        return
    if node.op_type == "NonMaxSuppression":
        raise ModelError(
            f"model.onnx: {what}: output {name} comes from NonMaxSuppression, so this is a "
            "detector of objects; batchclf runs classifiers, whose output is one score per class"
        )
    raise ModelError(
        f"model.onnx: {what}: output {name} is what {node.op_type} picked, not a score for each "
        f"class; take the tensor that it picked from: model.output_name: {node.input[0]}"
    )


def _listed(graph: onnx.GraphProto, makers: Makers) -> str:
    """Every output with its type and shape, and what to write for it or the tensor inside it."""
    lines = []
    for value in graph.output:
        inner, node = value.name, makers.get(value.name)
        while node is not None and node.op_type in _WRAPPERS and node.input:
            inner, node = node.input[0], makers.get(node.input[0])
        line = f"\n  {value.name}, {_described(value)}"
        if (picked := picker(value.name, makers)) is not None:
            line += f", what {picked.op_type} picked from: model.output_name: {picked.input[0]}"
        elif not value.type.HasField("tensor_type"):
            line += f", around a tensor: model.output_name: {inner}" if inner != value.name else ""
        elif value.type.tensor_type.elem_type in _FLOATS:
            line += f": model.output_name: {value.name}"
        lines.append(line)
    return "The outputs are" + "".join(lines)


def _described(value: onnx.ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return str(kind or "of no type").removesuffix("_type")
    tensor = value.type.tensor_type
    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    names |= {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
    name = names.get(tensor.elem_type, "of an unknown type")
    if not tensor.HasField("shape"):
        return f"{name} of any shape"
    dims = (str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim)
    return f"{name} [{', '.join(dims)}]"


# ---- what its numbers mean -----------------------------------------------------------------------


def meaning_of(
    what: str, tensor: ScoreTensor, scores_NK: np.ndarray[Any, Any], given: Activation | None
) -> Meaning:
    """What makes scores of a tensor's numbers, by the graph, the job, or the numbers.

    Args:
        scores_NK: float32, of a few different images.
        given: the job's `model.activation`.

    Raises:
        ModelError: the job's activation would be the second, one output cannot be a score, or
            nothing tells whether the numbers are logits.
    """
    num_outputs = scores_NK.shape[1]
    refuse_second(what, tensor, given)
    if tensor.ending == "softmax" and num_outputs == 1:
        raise ModelError(
            f"model.onnx: {what}: ends with a Softmax over one number per image, which is always "
            "1; export it with a Sigmoid, or without the Softmax, or name the tensor before it in "
            "model.output_name and say model.activation: sigmoid"
        )
    if tensor.ending == "sigmoid" and num_outputs == 1 and given is None:
        return Meaning("none", "complement")
    if tensor.ending not in _UNSETTLED:
        return Meaning("none")
    if given is None and num_outputs > 1:
        if _adds_up(scores_NK):
            return Meaning("none")
        if tensor.ending == "derived" and (scores_NK >= 0).all():
            note = (
                f"its scores, {_range_of(scores_NK)}, are made from a softmax, a sigmoid or a "
                "comparison, and taken as they are"
            )
            return Meaning("none", note=note)
        _refuse_doubtful(what, tensor, scores_NK)
    activation = settled(given, num_outputs, f"model.onnx: {what}")
    pair: Pair = "logits" if num_outputs == 1 and given == "sigmoid" else ""
    return Meaning(activation, pair, _second_warning(given, scores_NK))


def _refuse_doubtful(what: str, tensor: ScoreTensor, scores_NK: np.ndarray[Any, Any]) -> None:
    """Refuse to guess an activation for numbers that look like the result of one.

    Raises:
        ModelError: the numbers lie between 0 and 1, or are parts of one same sum.
    """
    sums_N = scores_NK.sum(axis=1)
    is_share = len(sums_N) > 1 and np.allclose(sums_N, sums_N[0], rtol=5e-3) and sums_N[0] > 0
    # Numbers that are all the same say nothing: a model that sees nothing, and is warned of later.
    is_positive = bool((scores_NK >= 0).all()) and np.ptp(scores_NK) > 0
    is_likely = is_positive and (is_share or bool((scores_NK <= 1).all()))
    if is_likely or tensor.ending == "derived":
        raise ModelError(
            f"model.onnx: {what}: cannot tell logits from probabilities: found scores "
            f"{_range_of(scores_NK)}, which add up to {sums_N.min():.4g} to {sums_N.max():.4g} per "
            "image; say with model.activation what makes scores of them: none (they are "
            "probabilities already), softmax or sigmoid"
        )


def _second_warning(given: Activation | None, scores_NK: np.ndarray[Any, Any]) -> str:
    """What to say of an activation that the job asks for and that may be the second."""
    if given in (None, "none") or not ((scores_NK >= 0) & (scores_NK <= 1)).all():
        return ""
    return (
        f"WARNING: model.activation: {given} is applied to numbers {_range_of(scores_NK)}; if they "
        "are probabilities already, the scores will be wrong: then say none"
    )


def _range_of(scores_NK: np.ndarray[Any, Any]) -> str:
    return f"of {scores_NK.min():.4g} to {scores_NK.max():.4g}"


def refuse_second(what: str, tensor: ScoreTensor, given: Activation | None) -> None:
    """Refuse an activation on top of one.

    Raises:
        ModelError: the graph ends with a softmax or a sigmoid already, and the job asks for one.
    """
    if tensor.ending not in _UNSETTLED and given in ("softmax", "sigmoid"):
        raise ModelError(
            f"model.activation: found {given}, but {what} ends with a {tensor.ending.capitalize()} "
            "already; leave it out"
        )


def _adds_up(scores_NK: np.ndarray[Any, Any]) -> bool:
    """Rows of probabilities are not negative and add up to 1; logits of three images never do."""
    return bool((scores_NK >= 0).all() and np.allclose(scores_NK.sum(axis=1), 1, atol=5e-3))


# ---- rows of scores ------------------------------------------------------------------------------


def rows_of(scores: np.ndarray[Any, Any], num_images: int) -> np.ndarray[Any, Any] | None:
    """What a model gave for a batch as float32 of shape NK; None: not one row per image.

    Takes NK with any axes of length 1 around K, N (one number per image), and K or a number alone
    for one image.
    """
    if scores.ndim < 2 and num_images == 1:
        return scores.reshape(1, -1).astype(np.float32)
    if scores.ndim == 0 or scores.shape[0] != num_images or not scores.size:
        return None
    if sum(size > 1 for size in scores.shape[1:]) > 1:
        return None
    return scores.reshape(num_images, -1).astype(np.float32)


def paired(scores_NK: np.ndarray[Any, Any], pair: Pair) -> np.ndarray[Any, Any]:
    """Scores as `nodes_after` makes them: of one output, those of two classes."""
    if not pair:
        return scores_NK
    first_N1 = 1 - scores_NK if pair == "complement" else np.zeros_like(scores_NK)
    return np.concatenate([first_N1, scores_NK], axis=1)


def nodes_after(
    tensor: str, output: str, pair: Pair, row_length: int | None
) -> list[onnx.NodeProto]:
    """Nodes from the score tensor to `output`, float32 of shape NK.

    Args:
        row_length: K, where the tensor of one image has no axis for the batch; None: it has one.
    """
    nodes = NodeChain(output)
    name = tensor
    if row_length is None:
        name = nodes.add("Flatten", name, axis=1)
    else:
        name = nodes.add("Reshape", name, nodes.constant(np.array([-1, row_length])))
    name = nodes.add("Cast", name, to=TensorProto.FLOAT)
    if pair == "complement":
        first = nodes.add("Sub", nodes.constant(np.ones((1, 1), np.float32)), name)
        nodes.add("Concat", first, name, axis=1)
    elif pair == "logits":
        nodes.add("Concat", nodes.add("Sub", name, name), name, axis=1)
    return nodes.ended(output)
