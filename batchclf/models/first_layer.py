"""The first convolutions on the uint8 pixels themselves: their 8 bits are the quantised input.

A graph makes colours of pixels p by a matrix and a shift, A p + b (normalisation, and whatever else
is done to one pixel at a time), and convolves them with weights W. W (A p + b) is (W A) p + W b: a
convolution of the pixels. Only the border differs, where the zeros stand for a grey that is no
black pixel: so pixels of that grey are put around the image.

On provider cpu the steps of a normalisation, on rows of 3 channels, cost 1.1 ms per image of
224 x 224 where the convolutions of a MobileNetV2 take 2.9; the border costs 0.01.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB); of weights, O output channels, K
channels of A p + b.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from batchclf.models.graph import Floats, Graph, NodeChain, attribute, is_layer, reached
from batchclf.results.records import Pixels

PIXEL_RANGE = (0.0, 1.0)
"""Of the float32 pixels that the first convolutions take, 1/255 of the uint8 ones. With a scale of
1, OpenVINO (2025.4) removes the quantisation and computes the convolution in float32."""
_SLACK = 1e-5
"""Of the largest colour: more than float32 rounds in a normalisation."""

Tensors = Callable[[Sequence[str]], Iterator[dict[str, Floats]]]
"""Tensors of a graph, for one batch after another."""


def probe_pixels(shape_NHWC: Sequence[int]) -> Pixels:
    """A light and a dark image of noise, uint8 NHWC, to find out what a graph makes of a pixel."""
    size = (2, *shape_NHWC[1:])
    noise_NHWC: Pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    noise_NHWC[1] //= 2  # what depends on a whole image makes other colours of the same pixel
    return noise_NHWC


def take_pixels(graph: Graph, probe_NHWC: Pixels, tensors: Tensors) -> list[str]:
    """Let the first convolutions take pixels; their weights change so that the answers stay.

    Args:
        graph: with biases; changed in place: make another of its model afterwards.
        probe_NHWC: `probe_pixels`, on which `tensors` runs the graph.

    Returns:
        The float32 tensors that they take, of the range `PIXEL_RANGE`. None, and the graph as it
        was, where something else takes the colours too, a colour depends on more than its own
        pixel, or no pixel's colour is the 0 of the border.
    """
    first = _first_convolutions(graph)
    if not first:
        return []
    name = first[0].input[0]
    colours = _colours(probe_NHWC, [batch[name] for batch in tensors([name])])
    if colours is None:
        return []
    pads = [attribute(node, "pads", [0, 0, 0, 0]) for node in first]
    grey_C = colours.grey()
    if grey_C is None:
        if any(map(any, pads)):
            return []
        grey_C = np.zeros(3, np.uint8)  # there is no border
    chain = NodeChain("pixel_input", graph.names)
    for node, sides in zip(first, pads, strict=True):
        _fold(graph, node, colours)
        pixels = _bordered(chain, graph.model.graph.input[0].name, probe_NHWC, sides, grey_C)
        step, zero = np.array(1 / 255, np.float32), np.array(0, np.uint8)
        # In this order: ONNX Runtime leaves out what surrounds a Transpose, so that the
        # convolution takes the uint8 pixels.
        floats = chain.add("DequantizeLinear", pixels, chain.constant(step), chain.constant(zero))
        node.input[0] = chain.add("Transpose", floats, perm=[0, 3, 1, 2])
    graph.flush()
    _replace_nodes(graph.model.graph, [*chain.made, *graph.nodes])
    return [node.input[0] for node in first]


def _first_convolutions(graph: Graph) -> list[onnx.NodeProto]:
    """All that takes the colours, if that is convolutions over all their channels; else none."""
    layers = {node.name for node in graph.nodes if is_layer(graph, node)}
    first = graph.by_name(layers - reached(graph.nodes, layers))
    takers = graph.consumers[first[0].input[0]] if first else []
    are_all = len(first) == len(takers) and all(
        node.op_type == "Conv"
        and node.input[0] == first[0].input[0]
        and attribute(node, "group", 1) == 1
        and attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        for node in first
    )
    return first if are_all else []


# ---- what the graph makes of a pixel -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Colours:
    """What a graph makes of each pixel, whose channels count from 0 to 255."""

    matrix_KC: NDArray[np.float64]
    shift_K: NDArray[np.float64]

    def grey(self) -> NDArray[np.uint8] | None:
        """The pixel, of shape C, nearest to the colour 0; None: no pixel is that dark or light.

        Rounding it loses half a step of 8 bits at most, no more than the 8 bits of colours would.
        """
        exact_C = -np.linalg.lstsq(self.matrix_KC, self.shift_K)[0]
        largest = (np.abs(self.matrix_KC).sum(1) * 255 + np.abs(self.shift_K)).max()
        left_K = self.matrix_KC @ exact_C + self.shift_K
        grey_C = np.round(exact_C)
        if np.abs(left_K).max() > _SLACK * largest or not (0 <= grey_C.min() <= grey_C.max() < 256):
            return None
        return grey_C.astype(np.uint8)


def _colours(pixels_NHWC: Pixels, batches: Sequence[Floats]) -> _Colours | None:
    """How the colours NKHW are made of pixels; None: not of one pixel each, or not linearly."""
    colours_NKHW = np.concatenate(batches)[: len(pixels_NHWC)].astype(np.float64)
    if colours_NKHW.ndim != 4 or colours_NKHW.shape[2:] != pixels_NHWC.shape[1:3]:
        return None
    expected = colours_NKHW.transpose(0, 2, 3, 1).reshape(-1, colours_NKHW.shape[1])
    rows = np.c_[pixels_NHWC.reshape(-1, 3), np.ones(len(expected))]
    solved = np.linalg.lstsq(rows, expected)[0].astype(np.float64)
    if np.abs(rows @ solved - expected).max() > _SLACK * np.abs(expected).max():
        return None
    return _Colours(solved[:3].T, solved[3])


# ---- the graph -----------------------------------------------------------------------------------


def _fold(graph: Graph, convolution: onnx.NodeProto, colours: _Colours) -> None:
    """Let a convolution without a border take pixels of `PIXEL_RANGE` instead of colours."""
    weight, bias = convolution.input[1:3]
    weight_OKHW = graph.weights[weight].astype(np.float64)
    shift_O = weight_OKHW.sum((2, 3)) @ colours.shift_K
    graph.weights[bias] = (graph.weights[bias] + shift_O).astype(np.float32)
    weight_OCHW = np.einsum("okhw,kc->ochw", weight_OKHW, 255 * colours.matrix_KC)
    graph.weights[weight] = weight_OCHW.astype(np.float32)
    kept = [found for found in convolution.attribute if found.name != "pads"]
    del convolution.attribute[:]
    convolution.attribute.extend(kept)


def _bordered(
    chain: NodeChain,
    pixels: str,
    probe_NHWC: Pixels,
    pads: Sequence[int],
    grey_C: NDArray[np.uint8],
) -> str:
    """Append nodes that put grey around uint8 pixels; returns the tensor's name.

    By Expand and Concat, since Pad knows one value for all channels.
    """
    if not any(pads):
        return pixels
    _, height, width, _ = probe_NHWC.shape
    top, left, bottom, right = pads
    num_images = chain.add("Shape", pixels)
    num_images = chain.add("Gather", num_images, chain.constant(np.array([0])))
    grey = chain.constant(grey_C)

    def strips(rows: int, columns: int) -> list[str]:
        if not rows * columns:
            return []
        rest = chain.constant(np.array([rows, columns, 3]))
        return [chain.add("Expand", grey, chain.add("Concat", num_images, rest, axis=0))]

    wide = [*strips(height, left), pixels, *strips(height, right)]
    middle = chain.add("Concat", *wide, axis=2)
    whole_width = left + width + right
    return chain.add(
        "Concat", *strips(top, whole_width), middle, *strips(bottom, whole_width), axis=1
    )


def _replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give the graph these nodes, without those on which no output depends."""
    maker = {name: node for node in nodes for name in node.output}
    needed: set[str] = set()
    asked = [value.name for value in graph.output]
    while asked:
        name = asked.pop()
        if name in maker and name not in needed:
            needed.add(name)
            asked += maker[name].input
    living = [deepcopy(node) for node in nodes if needed.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(living)
