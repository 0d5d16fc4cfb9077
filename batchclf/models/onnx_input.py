"""The image input of a user's ONNX graph: what the file tells of it, and how pixels are made of it.

Array shapes: N images of a batch, H rows, W columns, C colour channels (3, or 1 of a grey model).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from batchclf.errors import ModelError
from batchclf.models.graph import NodeChain
from batchclf.results.records import Pixels, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

_TYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.UINT8: np.dtype(np.uint8),
}
_AXES = (("NCHW", 1), ("NHWC", 3))
"""Layouts, and the axis of each on which the channels are."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The one image input of a graph."""

    name: str
    type: int
    layout: str
    num_channels: int
    crop: tuple[int, int]
    fixed_batch: int | None


def image_input(path: Path, model: onnx.ModelProto, spec: ModelSpec) -> ImageInput:
    """What the file, and where it is silent the job, says of the input.

    Raises:
        ModelError: no input of images, or something about it has to be told.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(
            f"model.onnx: {path}: found {len(inputs)} inputs ({names}); an image classifier has one"
        )
    value = inputs[0]
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        types = {number: name for name, number in TensorProto.DataType.items()}
        found = types.get(tensor.elem_type, f"values of an unknown type ({tensor.elem_type})")
        raise ModelError(
            f"model.onnx: {path}: input {value.name} takes {found}; "
            "float32, float16 or uint8 can be fed"
        )
    # Some exporters write -1 for a dimension that is open.
    dims = [max(0, dim.dim_value) for dim in tensor.shape.dim]
    if len(dims) != 4:
        raise ModelError(
            f"model.onnx: {path}: input {value.name} has {len(dims)} dimensions; "
            "images are fed as NCHW or NHWC"
        )
    layout = _layout(path, dims, spec.layout)
    height, width = (dims[2], dims[3]) if layout == "NCHW" else (dims[1], dims[2])
    given = spec.preprocess or PreprocessSpec()
    return ImageInput(
        value.name,
        tensor.elem_type,
        layout,
        dims[dict(_AXES)[layout]] or 3,
        _crop(path, (height, width), given.crop_size),
        dims[0] or None,
    )


def _layout(path: Path, dims: list[int], given: str | None) -> str:
    possible = [layout for layout, axis in _AXES if dims[axis] in (0, 1, 3)]
    sure = [layout for layout, axis in _AXES if dims[axis] == 3]
    sure = sure or [layout for layout, axis in _AXES if dims[axis] == 1]
    if given is not None and given in possible:
        return given
    shape = " x ".join(str(dim) if dim else "?" for dim in dims)
    if given is not None or not possible:
        raise ModelError(
            f"model.onnx: {path}: the input is {shape}: no 3 colour channels, nor 1 for grey"
            + (f", in layout {given}" if given else "; RGB and grey images can be fed")
        )
    if len(sure) != 1:
        raise ModelError(
            f"model.onnx: {path}: the input is {shape}, which may be NCHW or NHWC; "
            "say which with model.layout"
        )
    return sure[0]


def _crop(path: Path, size: tuple[int, int], asked: tuple[int, int] | None) -> tuple[int, int]:
    if asked is None:
        if 0 in size:
            raise ModelError(
                f"model.onnx: {path}: the input's height and width are open; "
                "give model.preprocess.crop, such as 224"
            )
        return size
    for have, want in zip(size, asked, strict=True):
        if have not in (0, want):
            raise ModelError(
                f"model.preprocess.crop: found {asked[0]} x {asked[1]}, "
                f"but {path} takes {size[0]} x {size[1]}"
            )
    return asked


def preprocess_of(path: Path, image: ImageInput, given: PreprocessSpec) -> Preprocess:
    """The preprocessing that the job gives for a file, which does not say itself.

    Raises:
        ModelError: what is missing, or does not go with the file's input.
    """
    takes_bytes = image.type == TensorProto.UINT8
    needed = ("resize",) if takes_bytes else ("resize", "mean", "std")
    missing = [f"model.preprocess.{key}" for key in needed if getattr(given, key) is None]
    if missing:
        raise ModelError(
            f"model.onnx: {path}: an ONNX file does not say how its images are prepared; give "
            f"{', '.join(missing)} (models trained as torchvision's: resize: 256, "
            "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], of pixels in 0..1; "
            "mean: [0, 0, 0], std: [1, 1, 1] for plain 0..1)"
        )
    if takes_bytes and (given.mean is not None or given.std is not None):
        raise ModelError(
            f"model.preprocess: {path} takes uint8 pixels as they are; remove mean and std"
        )
    if image.num_channels == 1:
        _require_grey(path, given)
    assert given.resize is not None
    return Preprocess(
        given.resize,
        image.crop,
        given.interpolation or "bilinear",
        given.mean,
        given.std,
        "grey" if image.num_channels == 1 else given.channels or "rgb",
    )


def _require_grey(path: Path, given: PreprocessSpec) -> None:
    if given.channels not in (None, "grey"):
        raise ModelError(
            f"model.preprocess.channels: found {given.channels}, but {path} takes one channel: grey"
        )
    for key in ("mean", "std"):
        if len(set(getattr(given, key) or (0,))) > 1:
            raise ModelError(
                f"model.preprocess.{key}: found one number per colour, but {path} takes one "
                f"channel; give one number, such as {key}: [0.5]"
            )


@dataclass(frozen=True, slots=True)
class Feed:
    """How uint8 pixels NHWC become what a graph's input takes, in NumPy and as nodes alike."""

    image: ImageInput
    preprocess: Preprocess
    is_literal: bool
    """Whether the nodes divide, subtract and divide in float32, as torchvision's transforms do to
    the last bit, or only multiply and add, which is 0.05 ms an image less (224 x 224, one thread).

    What is rounded to 8 bits next must be the former: with mean and std 0.5 every byte lies
    half-way between two steps, and the last bit decides (on 165 of 768 otherwise).
    """

    def array(self, pixels_NHWC: Pixels) -> np.ndarray[Any, Any]:
        """Pixels as a script of the user's prepares them: float32 throughout, then cast."""
        fed: np.ndarray[Any, Any] = pixels_NHWC
        if self.image.num_channels == 1:
            fed = fed[..., :1]
        elif self.preprocess.channels == "bgr":
            fed = fed[..., ::-1]
        if self.preprocess.mean is not None and self.preprocess.std is not None:
            mean_C, std_C = self._per_channel(self.preprocess.mean, self.preprocess.std)
            fed = (fed.astype(np.float32) / np.float32(255) - mean_C) / std_C
        if self.image.layout == "NCHW":
            fed = fed.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(fed.astype(_TYPES[self.image.type]))

    def nodes(self, pixels: str) -> list[onnx.NodeProto]:
        """Nodes from the tensor `pixels`, uint8 NHWC with 3 channels, to the graph's own input."""
        chain = NodeChain(pixels)
        name = pixels
        if self.image.num_channels == 1:
            name = chain.add("Gather", name, chain.constant(np.array([0])), axis=3)
        elif self.preprocess.channels == "bgr":
            name = chain.add("Gather", name, chain.constant(np.array([2, 1, 0])), axis=3)
        if self.image.layout == "NCHW":
            name = chain.add("Transpose", name, perm=[0, 3, 1, 2])
        if self.preprocess.mean is not None:
            name = chain.add("Cast", name, to=TensorProto.FLOAT)
            for operator, values in self._steps():
                name = chain.add(operator, name, chain.constant(values))
        if self.image.type == TensorProto.FLOAT16:
            name = chain.add("Cast", name, to=TensorProto.FLOAT16)
        if not chain.made:
            chain.add("Identity", name)
        return chain.ended(self.image.name)

    def _steps(self) -> list[tuple[str, np.ndarray[Any, Any]]]:
        """Operators of the normalisation, each with its constant, in the shape of the layout."""
        assert self.preprocess.mean is not None
        assert self.preprocess.std is not None
        if self.is_literal:
            mean_C, std_C = self._per_channel(self.preprocess.mean, self.preprocess.std)
            steps = [("Div", np.array([255], np.float32)), ("Sub", mean_C), ("Div", std_C)]
        else:
            mean, std = (np.array(one) for one in (self.preprocess.mean, self.preprocess.std))
            scale_C, shift_C = self._per_channel(1 / (255 * std), -mean / std)
            steps = [("Mul", scale_C), ("Add", shift_C)]
        to_fit = (-1, 1, 1) if self.image.layout == "NCHW" else (-1,)
        return [(operator, values.reshape(to_fit)) for operator, values in steps]

    def _per_channel(self, *values: Any) -> list[np.ndarray[Any, Any]]:
        """Float32 constants, one number where it is the same for all channels."""
        found = (np.array(one, np.float32) for one in values)
        return [one[:1] if (one == one[0]).all() else one for one in found]
