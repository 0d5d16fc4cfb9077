"""How a user's ONNX graph ends: in a softmax, a sigmoid, what was picked, or plain numbers.

It is read from the operators before a tensor, back to those that have weights: an activation may
come in its parts, in 8 bits, as a mean of several, or with arithmetic after it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import onnx

from batchclf.models.graph import attribute

Ending = Literal["softmax", "sigmoid", "derived", "unknown"]
"""What numbers are; derived: computed from a softmax or sigmoid, and neither now, or
0 and 1 from a comparison."""

PASS_ON = frozenset(
    (
        *(
            "Cast",
            "CastLike",
            "Identity",
            "Flatten",
            "Reshape",
            "Squeeze",
            "Unsqueeze",
            "Transpose",
        ),
        *("QuantizeLinear", "DequantizeLinear", "Clip", "Dropout", "Slice", "Gather", "Split"),
    )
)
"""Operators that hand scores on, some of them or all, as what they are."""
_PASS_ALL = PASS_ON - {"QuantizeLinear", "DequantizeLinear"}
"""Those of them that change no number."""
_ENDINGS: Mapping[str, Ending] = {
    "Softmax": "softmax",
    "QLinearSoftmax": "softmax",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "sigmoid",
    "QLinearSigmoid": "sigmoid",
}
_PICKERS = ("TopK", "ArgMax", "ArgMin", "NonMaxSuppression")
"""Operators that give places or a few values, no score for each class."""
_JOINERS = ("Concat", "Gather", "GatherElements", "GatherND", "SequenceConstruct")
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or")
_ELEMENTWISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Mean", "Sum", "Where"),
        *("Exp", "Log", "Sqrt", "Neg", "Abs", "Sign", "Reciprocal", "Round", "Floor", "Ceil"),
        *("Sigmoid", "HardSigmoid", "Softmax", "LogSoftmax", "Tanh", "Relu", "LeakyRelu", "Elu"),
        *("Softplus", "Erf", *_COMPARISONS),
        *("QLinearSoftmax", "QLinearSigmoid", "QLinearAdd", "QLinearMul", "Expand", "Tile"),
    )
)
"""Operators without weights, whose numbers are of the same classes as what they take."""
_EXTREMES = ("ReduceMax", "ReduceMin", "ReduceMean")
_MEANS = ("ReduceMean", "GlobalAveragePool", "QLinearGlobalAveragePool", "AveragePool")
_LARGEST = ("ReduceMax", "GlobalMaxPool", "MaxPool")
_FLAT = ("Gemm", "QGemm", "Flatten", "GlobalAveragePool", "GlobalMaxPool")
"""Operators whose second axis is that of the classes."""
_SUMS = ("ReduceSum", "ReduceL1")
_LINEAR = ("Add", "Sub", "Mul", "Div", "Neg", "Sum", "Mean")
_OF_TWO = ("Add", "Sub", "Mul", "Div")
"""Operators of two inputs; a file may say anything."""
_DERIVING = (*_LINEAR, "Pow", "Sqrt", "Min", "Max", "QLinearAdd", "QLinearMul", "Round")
_FARTHEST = 32
"""Operators that an ending is looked for through."""


class Makers(dict[str, onnx.NodeProto]):
    """The node that makes each tensor of a graph, and what is constant in it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__(
            (name, node)
            for node in graph.node
            if len(node.input) == 2 or node.op_type not in _OF_TWO
            for name in node.output
            if name
        )
        self.constants = {one.name: one for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.output:
                self.constants[node.output[0]] = _value_of(node.attribute[0])

    def is_constant(self, name: str) -> bool:
        """Whether no image changes a tensor."""
        *_, first = chain(name, self)
        return first in self.constants

    def scalar(self, name: str) -> float | None:
        """A constant of one number, in 8 bits too; None: it is no such thing."""
        *_, name = chain(name, self, _PASS_ALL)
        node = self.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return self._number(name)
        value, scale, zero = ([*map(self._number, node.input), 0.0])[:3]
        return None if value is None or not scale or zero is None else (value - zero) * scale

    def _number(self, name: str) -> float | None:
        *_, name = chain(name, self, _PASS_ALL)
        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.dims) != 1 or tensor.external_data:
            return None
        try:
            return float(onnx.numpy_helper.to_array(tensor).ravel()[0])
        except (ValueError, TypeError):  # text, or not the bytes of its type
            return None


def _value_of(given: onnx.AttributeProto) -> onnx.TensorProto:
    """The value of a Constant as a tensor."""
    match given.name:
        case "value_float":
            return onnx.numpy_helper.from_array(np.array(given.f))
        case "value_int":
            return onnx.numpy_helper.from_array(np.array(given.i))
        case "value_floats":
            return onnx.numpy_helper.from_array(np.array(given.floats, np.float64))
        case "value_ints":
            return onnx.numpy_helper.from_array(np.array(given.ints, np.int64))
    return given.t


def chain(name: str, makers: Makers, through: frozenset[str] = PASS_ON) -> Iterator[str]:
    """A tensor, and backwards all that it was before it was handed on."""
    yield name
    seen = {name}
    node = makers.get(name)
    while node is not None and node.op_type in through and node.input:
        name = node.input[0]
        if name in seen:  # a file may say anything
            return
        seen.add(name)
        yield name
        node = makers.get(name)


def behind(name: str, makers: Makers) -> onnx.NodeProto | None:
    """The node that computed a tensor's numbers, and does not only hand them on."""
    *_, last = chain(name, makers)
    return makers.get(last)


# ---- what was picked -----------------------------------------------------------------------------


def picker(name: str, makers: Makers) -> onnx.NodeProto | None:
    """The node that picked classes, or boxes, where an output holds what it picked.

    Arithmetic of what was picked is no score for each class either; arithmetic that has scores in
    it too is one (all but the largest made 0; a mixture of experts). The largest and the smallest
    score joined are picked, but a largest that is subtracted before a softmax is not.
    """
    picked: dict[str, onnx.NodeProto] = {}
    extremes: dict[str, onnx.NodeProto] = {}
    scores: set[str] = set()
    for tensor in _inputs_first(name, makers):
        node = makers.get(tensor)
        if node is None or not node.input:
            continue
        inputs = _data(node)
        found = [picked[one] for one in inputs if one in picked]
        reduced = [extremes[one] for one in inputs if one in extremes]
        is_mixed = not scores.isdisjoint(inputs)
        if node.op_type in _PICKERS:
            picked[tensor] = node
        elif node.op_type in _EXTREMES and _is_over_classes(node, makers):
            extremes[tensor] = node
        elif found and (node.op_type in _JOINERS or not is_mixed):
            picked[tensor] = found[0]
        elif is_mixed or not _is_seen_through(node):
            scores.add(tensor)
        elif reduced and node.op_type == "Concat":
            picked[tensor] = reduced[0]
        elif reduced:
            extremes[tensor] = reduced[0]
    return picked.get(name)


def _inputs_first(name: str, makers: Makers) -> Iterator[str]:
    """A tensor after all that it is computed from without weights."""
    seen: set[str] = set()
    waiting = [(name, False)]
    while waiting:
        tensor, is_ready = waiting.pop()
        if is_ready:
            yield tensor
        elif tensor not in seen:
            seen.add(tensor)
            waiting.append((tensor, True))
            node = makers.get(tensor)
            if node is not None and _is_seen_through(node):
                waiting += [(one, False) for one in _data(node)]


def _is_seen_through(node: onnx.NodeProto) -> bool:
    return node.op_type in PASS_ON or node.op_type in _ELEMENTWISE or node.op_type in _JOINERS


def _data(node: onnx.NodeProto) -> list[str]:
    """The inputs with numbers of images, not those that say a shape or a place."""
    handed_on = node.op_type in PASS_ON and node.op_type != "Gather"
    return list(node.input[:1] if handed_on else node.input)


def _is_over_classes(node: onnx.NodeProto, makers: Makers) -> bool:
    """Whether a reduction is one over the classes for certain, and not over pixels or tokens."""
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        only = makers.scalar(node.input[1])
        axes = [] if only is None else [only]
    if not axes or list(axes) not in ([1], [-1]):
        return False
    name = node.input[0]
    for _ in range(_FARTHEST):
        before = makers.get(name)
        if before is None:
            return False
        if before.op_type in _FLAT:
            return True
        if before.op_type not in _ELEMENTWISE and before.op_type not in ("MatMul", "Cast"):
            return False
        name = next((one for one in before.input if one in makers), "")
    return False


# ---- an activation -------------------------------------------------------------------------------


def ending_of(name: str, makers: Makers) -> Ending:
    """The activation that a tensor has behind it, through what hands its numbers on."""
    return _Endings(makers).of(name)


_Sum = tuple[dict[str, float], float]
"""Factors of tensors, and what is added to them."""


class _Endings:
    """Endings of tensors, each looked for once."""

    def __init__(self, makers: Makers) -> None:
        self._makers = makers
        self._known: dict[str, Ending] = {}
        self._sums: dict[str, _Sum] = {}

    def of(self, name: str, depth: int = 0) -> Ending:
        *_, name = chain(name, self._makers)
        node = self._makers.get(name)
        if node is None or not node.input or depth > _FARTHEST:
            return "unknown"
        if name not in self._known:
            self._known[name] = "unknown"  # of a graph that goes round
            self._known[name] = self._computed(name, node, depth + 1)
        return self._known[name]

    def _computed(self, name: str, node: onnx.NodeProto, depth: int) -> Ending:
        operator = node.op_type
        if operator in _ENDINGS:
            return _ENDINGS[operator]
        if operator == "Exp":
            return "softmax" if self._is_log_softmax(node.input[0]) else "unknown"
        if operator in (*_MEANS, *_LARGEST):
            return self._reduced(node, depth)
        if operator in _COMPARISONS:
            return "derived"
        if operator == "Concat":
            return self._joined(node, depth)
        fraction = self._fraction(node)
        found = self._of_fraction(*fraction, depth) if fraction else "unknown"
        return self._combined(name, node, depth) if found == "unknown" else found

    def _reduced(self, node: onnx.NodeProto, depth: int) -> Ending:
        """Of a mean or the largest over pixels, tokens or models; over classes it is neither."""
        if node.op_type.startswith("Reduce") and _is_over_classes(node, self._makers):
            return "unknown"
        inner = self.of(node.input[0], depth)
        return "derived" if inner == "softmax" and node.op_type in _LARGEST else inner

    def _combined(self, name: str, node: onnx.NodeProto, depth: int) -> Ending:
        """Of arithmetic with constants, or of several activations."""
        factors, added = self._sum(name, depth)
        if list(factors) != [name]:
            cores = [behind(one, self._makers) for one in factors]
            weights = list(factors.values())
            if [one and one.op_type for one in cores] == ["Tanh"]:
                is_sigmoid = _is_near(added, 0.5) and _is_near(weights[0], 0.5)
                return "sigmoid" if is_sigmoid else "unknown"
            kinds = {self.of(one, depth) for one in factors}
            if len(kinds) == 1 and _is_near(added, 0) and _is_near(sum(weights), 1):
                return kinds.pop() if min(weights) >= 0 else _derived(kinds)
            if kinds == {"sigmoid"} and _is_near(added, 1) and weights == [-1]:
                return "sigmoid"
            return _derived(kinds)
        if node.op_type not in _DERIVING:
            return "unknown"
        inputs = [one for one in node.input if one and not self._makers.is_constant(one)]
        return _derived({self.of(one, depth) for one in inputs})

    def _joined(self, node: onnx.NodeProto, depth: int) -> Ending:
        """Of several heads; p beside 1 - p is a distribution."""
        kinds = {self.of(one, depth) for one in node.input}
        if kinds == {"sigmoid"}:
            sums = [self._sum(one, depth) for one in node.input]
            is_pair = len(sums) == 2 and sums[0][0].keys() == sums[1][0].keys()
            weights = sorted(value for factors, _ in sums for value in factors.values())
            return "softmax" if is_pair and weights == [-1, 1] else "sigmoid"
        # Stacked for a mean, softmaxes stay what they are.
        makers = [self._makers.get(one) for one in node.input]
        is_stack = all(one is not None and one.op_type == "Unsqueeze" for one in makers)
        if kinds == {"softmax"} and (is_stack or len(node.input) == 1):
            return "softmax"
        return _derived(kinds)

    def _is_log_softmax(self, name: str) -> bool:
        """Whether a tensor's exponentials add up to 1."""
        node = behind(name, self._makers)
        if node is None or node.op_type != "Sub":
            return node is not None and node.op_type == "LogSoftmax"
        taken = behind(node.input[1], self._makers)
        if taken is not None and taken.op_type == "Log" and taken.input:
            below = behind(taken.input[0], self._makers)
            return below is not None and below.op_type == "ReduceSum"
        return taken is not None and taken.op_type == "ReduceLogSumExp"

    def _fraction(self, node: onnx.NodeProto) -> tuple[str | None, str] | None:
        """What is above (None: 1) and below the line, if a node divides."""
        if node.op_type == "Div":
            above = node.input[0]
            return (None if self._makers.scalar(above) == 1 else above), node.input[1]
        if node.op_type == "Reciprocal":
            return None, node.input[0]
        if node.op_type == "Mul":
            for above, other in (node.input, node.input[::-1]):
                divided = behind(other, self._makers)
                if divided is not None and divided.op_type == "Reciprocal" and divided.input:
                    return above, divided.input[0]
        return None

    def _of_fraction(self, above: str | None, below: str, depth: int) -> Ending:
        """Of 1 / (1 + exp(-x)), exp(x) / (1 + exp(x)), and of x / sum(x)."""
        factors, added = self._sum(below, depth)
        exponents = [behind(one, self._makers) for one in factors]
        operators = [one.op_type for one in exponents if one is not None]
        if operators == ["Exp"] and _is_near(added, 1) and list(factors.values()) == [1]:
            is_same = above is not None and behind(above, self._makers) == exponents[0]
            return "sigmoid" if above is None or is_same else "unknown"
        divisor = behind(below, self._makers)
        if above is None or divisor is None or not divisor.input or divisor.op_type not in _SUMS:
            return "unknown"
        top, summed = behind(above, self._makers), behind(divisor.input[0], self._makers)
        if top is None or top != summed:
            return "unknown"
        is_positive = top.op_type == "Exp" or self.of(above, depth) != "unknown"
        return "softmax" if is_positive else "unknown"

    def _sum(self, name: str, depth: int) -> _Sum:
        """A tensor as a sum of others, each with a factor, and a constant."""
        *_, name = chain(name, self._makers)
        if name not in self._sums:
            self._sums[name] = ({name: 1.0}, 0.0)
            node = self._makers.get(name)
            if node is not None and node.op_type in _LINEAR and depth <= _FARTHEST:
                found = self._terms(node, depth + 1)
                if found is not None and len(found[0]) <= _FARTHEST:
                    self._sums[name] = found
        return self._sums[name]

    def _terms(self, node: onnx.NodeProto, depth: int) -> _Sum | None:
        scalars = [self._makers.scalar(one) for one in node.input]
        if node.op_type in ("Mul", "Div"):
            factor = next((one for one in reversed(scalars) if one is not None), None)
            if factor is None or (node.op_type == "Div" and (not factor or scalars[1] is None)):
                return None
            at = 0 if scalars[0] is None else 1
            return _scaled(
                self._sum(node.input[at], depth), 1 / factor if node.op_type == "Div" else factor
            )
        signs = {"Neg": [-1.0], "Sub": [1.0, -1.0]}.get(node.op_type, [1.0] * len(node.input))
        if node.op_type == "Mean":
            signs = [1 / len(node.input)] * len(node.input)
        factors: dict[str, float] = {}
        added = 0.0
        for one, scalar, sign in zip(node.input, scalars, signs, strict=True):
            inner = ({}, scalar) if scalar is not None else self._sum(one, depth)
            terms, constant = _scaled(inner, sign)
            added += constant
            for tensor, factor in terms.items():
                factors[tensor] = factors.get(tensor, 0.0) + factor
        return factors, added


def _scaled(one: _Sum, factor: float) -> _Sum:
    factors, added = one
    return {tensor: value * factor for tensor, value in factors.items()}, added * factor


def _is_near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, abs_tol=1e-2)


def _derived(kinds: set[Ending]) -> Ending:
    return "derived" if kinds and "unknown" not in kinds else "unknown"
