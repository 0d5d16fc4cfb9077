"""Channels scaled so that the 8 bits of a tensor serve all of them alike; the model stays the same.

A positive factor per channel goes into the weights before a tensor and out of those after it.
Method: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.1, with calibrated peaks for the activations and the balance between
activation and weight of SmoothQuant (Xiao et al. 2023, equation 4). Before a depthwise
convolution, whose weights have scales of their own, the factors cost nothing, and a range per
tensor is as good as one per channel.

Array shapes: C channels.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from batchclf.models.graph import Floats, Graph, attribute, is_depthwise

Peaks = Callable[[Sequence[str]], dict[str, Floats]]
"""Measures the largest magnitude per channel of the tensors named."""
_BALANCE = 0.5
"""SmoothQuant's alpha: how the factor of a channel is shared between activation and weight."""
_LARGEST_FACTOR = 64.0
_SCALABLE = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
"""Operators that commute with a positive factor per channel."""


@dataclass(slots=True)
class _ChannelGroup:
    """Tensors that share their channels, from the convolutions that make them to those that sum."""

    tensors: list[str] = field(default_factory=list)
    sources: list[onnx.NodeProto] = field(default_factory=list)
    depthwise: list[onnx.NodeProto] = field(default_factory=list)
    dense: list[onnx.NodeProto] = field(default_factory=list)
    ceiling: float | None = None
    is_closed: bool = True
    """Whether nothing but these nodes sees the channels, so that they may be scaled."""


def equalize(graph: Graph, names: set[str], peaks_of: Peaks) -> None:
    """Scale channels so that those of a tensor use its 8 bits alike; the model stays the same."""
    groups = [
        group
        for group in _channel_groups(graph, names)
        if group.is_closed and group.sources and (group.depthwise or group.dense)
    ]
    for group in groups:
        group.tensors = [name for name in group.tensors if not graph.is_rectified(name, names)]
    peaks = peaks_of([name for group in groups for name in group.tensors])
    for group in groups:
        peak_C = np.max([peaks[name] for name in group.tensors], axis=0)
        factor_C = _factors(graph, group, peak_C).astype(np.float32)
        for node in group.sources:
            graph.weights[node.input[1]] *= factor_C[:, None, None, None]
            graph.weights[node.input[2]] *= factor_C
        for node in group.depthwise:
            graph.weights[node.input[1]] /= factor_C[:, None, None, None]
        for node in group.dense:
            graph.weights[node.input[1]] /= factor_C[None, :, None, None]


def _factors(graph: Graph, group: _ChannelGroup, peak_C: Floats) -> Floats:
    """What to multiply each channel of a group by."""
    if group.ceiling is not None:
        # Scaled up to where the Clip cuts: it still never cuts below the calibrated peak.
        ceiling = group.ceiling
        return np.asarray(ceiling / np.clip(peak_C, ceiling / _LARGEST_FACTOR, ceiling))
    peak_C = np.maximum(peak_C, max(float(peak_C.max()) / _LARGEST_FACTOR**2, 1e-12))
    if not group.dense:
        factor_C = 1 / peak_C
    else:
        columns = []
        for node in group.dense:
            weight = np.abs(graph.weights[node.input[1]]).max((2, 3))
            columns.append((weight / np.maximum(weight.max(1, keepdims=True), 1e-12)).max(0))
        column_C = np.max(columns, axis=0)
        column_C = np.maximum(column_C, max(float(column_C.max()) / _LARGEST_FACTOR**2, 1e-12))
        factor_C = column_C ** (1 - _BALANCE) / peak_C**_BALANCE
    return np.asarray(factor_C / np.exp(np.log(factor_C).mean()))


def _channel_groups(graph: Graph, names: set[str]) -> list[_ChannelGroup]:
    """Every tensor of the graph, in groups that one factor per channel can run through."""
    group_of = _joined(graph)
    for node in graph.nodes:
        for name in node.output:
            group = group_of[name]
            group.tensors.append(name)
            if node.op_type == "Conv" and node.name in names:
                group.sources.append(node)
            elif not _carries_channels(graph, node):
                group.is_closed = False
        for place, name in enumerate(node.input):
            if name in graph.producer:
                _add_sink(graph, group_of[name], node, place, is_chosen=node.name in names)
    for value in graph.model.graph.output:
        group_of[value.name].is_closed = False
    groups = list({id(group): group for group in group_of.values()}.values())
    for group in groups:
        if group.ceiling is not None and group.dense:
            group.is_closed = False  # a factor below 1 would lift the ceiling
    return groups


def _joined(graph: Graph) -> dict[str, _ChannelGroup]:
    """An empty group for each tensor, the same for those between which factors pass."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for node in graph.nodes:
        if _carries_channels(graph, node):
            for name in node.input if node.op_type == "Add" else node.input[:1]:
                root[find(name)] = find(node.output[0])
    groups: dict[str, _ChannelGroup] = defaultdict(_ChannelGroup)
    return {name: groups[find(name)] for name in graph.producer}


def _carries_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a factor per channel may be applied after the node as well as before it."""
    if node.op_type == "Add":
        return all(name in graph.producer for name in node.input)
    if node.op_type == "Clip":
        low, high = graph.bounds(node)
        return low == 0 < high < math.inf
    return node.op_type in _SCALABLE


def _add_sink(
    graph: Graph, group: _ChannelGroup, node: onnx.NodeProto, place: int, *, is_chosen: bool
) -> None:
    if _carries_channels(graph, node):
        if node.op_type == "Clip":
            _, high = graph.bounds(node)
            group.ceiling = min(high, group.ceiling or high)
        return
    if node.op_type == "Conv" and is_chosen and place == 0:
        if is_depthwise(graph, node):
            group.depthwise.append(node)
            return
        if attribute(node, "group", 1) == 1:
            group.dense.append(node)
            return
    group.is_closed = False
