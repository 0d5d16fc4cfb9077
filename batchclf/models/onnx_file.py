"""A user's own ONNX classifier to a bundle.

What the file tells is read from it (layout, type, size, batch, classes, logits or probabilities);
what it cannot tell (resize, mean, std) is asked for. Nodes are put before the graph so that it
takes uint8 pixels NHWC, and after it so that it gives float32 scores NK.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.bundle import MODEL_FILE
from batchclf.models.checks import (
    OpenReference,
    Run,
    assert_same_scores,
    sample_pixels,
    tiled,
)
from batchclf.models.graph import QUANTISED, save_model
from batchclf.results.records import Activation, Pixels, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

OLDEST_OPSET = 7
"""First opset whose Mul and Add broadcast as NumPy does."""
_PASS_ON = ("Cast", "Identity", "Flatten", "Reshape", "Squeeze")
"""Operators that hand scores on as they are."""
_PREFIX = "batchclf_"
_INPUT_TYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.UINT8: np.dtype(np.uint8),
}


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """What `wrap_onnx` found out about the model it wrote."""

    preprocess: Preprocess
    num_classes: int
    activation: Activation
    fixed_batch: int | None
    checked_batches: tuple[int, ...]
    arithmetic: Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, slots=True)
class _Input:
    """The one image input of a graph."""

    name: str
    type: int
    layout: str
    crop: tuple[int, int]
    fixed_batch: int | None


def wrap_onnx(
    path: Path, spec: ModelSpec, folder: Path, *, batch_size: int, open_reference: OpenReference
) -> WrappedModel:
    """Write `path` to `folder`/model.onnx with uint8 NHWC input and NK scores, and check it.

    `check_onnx` has passed it: onnx and ONNX Runtime open whatever files it names.

    Raises:
        ModelError: no ONNX classifier of RGB images, or something about it has to be told.
    """
    model = _load(path)
    given = spec.preprocess or PreprocessSpec()
    image = _image_input(path, model, spec, given)
    preprocess = _preprocess(path, image, given)
    output = _score_output(path, model, spec.output_name)
    original = open_reference(path, output)
    _rename_earlier_wrapping(model)
    image, output = replace(image, name=_renamed(image.name)), _renamed(output)
    pixels_NHWC = sample_pixels(*image.crop)
    feed = _as_fed(pixels_NHWC, image, preprocess)
    expected_NK = _scores(path, _run_rows(original, feed, image.fixed_batch))
    is_probability = _is_probability(path, model, output, expected_NK)
    _wrap(model, image, preprocess, output)
    target = folder / MODEL_FILE
    save_model(model, target)
    checked = (image.fixed_batch,) if image.fixed_batch else tuple(sorted({1, 2, 3, batch_size}))
    run = open_reference(target)
    arithmetic = _arithmetic(model, image)
    for size in checked:
        found_NK = run(tiled(pixels_NHWC, size))
        assert_same_scores(
            found_NK,
            tiled(expected_NK, size),
            f"{path}, batch of {size}",
            is_half=arithmetic == "fp16",
        )
    return WrappedModel(
        preprocess,
        int(expected_NK.shape[1]),
        "none" if is_probability else settled(spec.activation, expected_NK.shape[1], str(path)),
        image.fixed_batch,
        checked,
        arithmetic,
    )


def _arithmetic(model: onnx.ModelProto, image: _Input) -> Literal["fp32", "fp16", "int8"]:
    """What the file's own graph computes in."""
    if any(node.op_type in QUANTISED for node in model.graph.node):
        return "int8"
    types = {image.type, *(tensor.data_type for tensor in model.graph.initializer)}
    return "fp16" if TensorProto.FLOAT16 in types else "fp32"


# ---- reading what the file tells -----------------------------------------------------------------


def _load(path: Path) -> onnx.ModelProto:
    try:
        # Named, since `check_onnx` saw protocol buffers and a suffix may mean text to onnx.
        model = onnx.load(path, format="protobuf")
    except OSError as error:
        raise ModelError(f"model.onnx: {path}: cannot be read: {error.strerror}") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(24)
        raise ModelError(
            f"model.onnx: {path}: not an ONNX model: it starts with {start!r}; "
            "download or export it again"
        ) from error
    if not model.graph.node:
        raise ModelError(f"model.onnx: {path}: not an ONNX model: its graph is empty")
    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0
    )
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"model.onnx: {path}: found opset {opset}; {OLDEST_OPSET} or later is needed: "
            "export it again with a newer opset"
        )
    return model


def _image_input(
    path: Path, model: onnx.ModelProto, spec: ModelSpec, given: PreprocessSpec
) -> _Input:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(
            f"model.onnx: {path}: found {len(inputs)} inputs ({names}); an image classifier has one"
        )
    value = inputs[0]
    tensor = value.type.tensor_type
    if tensor.elem_type not in _INPUT_TYPES:
        types = {number: name for name, number in TensorProto.DataType.items()}
        found = types.get(tensor.elem_type, f"values of an unknown type ({tensor.elem_type})")
        raise ModelError(
            f"model.onnx: {path}: input {value.name} takes {found}; "
            "float32, float16 or uint8 can be fed"
        )
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in tensor.shape.dim]
    if len(dims) != 4:
        raise ModelError(
            f"model.onnx: {path}: input {value.name} has {len(dims)} dimensions; "
            "images are fed as NCHW or NHWC"
        )
    layout = _layout(path, dims, spec.layout)
    height, width = (dims[2], dims[3]) if layout == "NCHW" else (dims[1], dims[2])
    return _Input(
        value.name,
        tensor.elem_type,
        layout,
        _crop(path, (height, width), given.crop),
        dims[0] if dims[0] > 0 else None,
    )


def _layout(path: Path, dims: list[int], given: str | None) -> str:
    possible = [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if dims[axis] in (0, 3)]
    sure = [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if dims[axis] == 3]
    if given is not None and given in possible:
        return given
    shape = " x ".join(str(dim) if dim else "?" for dim in dims)
    if given is not None or not possible:
        raise ModelError(
            f"model.onnx: {path}: the input is {shape}: no 3 colour channels"
            + (f" in layout {given}" if given else "; RGB images can be fed")
        )
    if len(sure) != 1:
        raise ModelError(
            f"model.onnx: {path}: the input is {shape}, which may be NCHW or NHWC; "
            "say which with model.layout"
        )
    return sure[0]


def _crop(
    path: Path, size: tuple[int, int], given: int | tuple[int, int] | None
) -> tuple[int, int]:
    asked = (given, given) if isinstance(given, int) else given
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


def _preprocess(path: Path, image: _Input, given: PreprocessSpec) -> Preprocess:
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
    assert given.resize is not None
    return Preprocess(
        given.resize,
        image.crop,
        given.interpolation or "bilinear",
        given.mean,
        given.std,
        given.channels or "rgb",
    )


def _score_output(path: Path, model: onnx.ModelProto, wanted: str | None) -> str:
    names = [value.name for value in model.graph.output]
    if wanted is not None:
        if wanted not in names:
            raise ModelError(
                f"model.output_name: found {wanted!r}; the outputs of {path} are {', '.join(names)}"
            )
        return wanted
    candidates = [str(value.name) for value in model.graph.output if _may_be_scores(value)]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(names)
    raise ModelError(
        f"model.onnx: {path}: "
        + (
            f"several outputs may be class scores ({found}); say which with model.output_name"
            if candidates
            else f"no output ({found}) has the shape of class scores, [N, C] or [N, C, 1, 1]"
        )
    )


def _may_be_scores(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        return False
    if not tensor.HasField("shape"):
        return True
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in tensor.shape.dim]
    if len(dims) == 2:
        return True
    return len(dims) == 4 and all(dim in (0, 1) for dim in dims[2:])


# ---- running and judging -------------------------------------------------------------------------


def _as_fed(pixels_NHWC: Pixels, image: _Input, preprocess: Preprocess) -> np.ndarray[Any, Any]:
    """The sample as the original model wants it, computed in float64 and then cast."""
    fed: np.ndarray[Any, Any] = pixels_NHWC
    if preprocess.channels == "bgr":
        fed = fed[..., ::-1]
    if preprocess.mean is not None and preprocess.std is not None:
        fed = (fed / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    if image.layout == "NCHW":
        fed = fed.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(fed.astype(_INPUT_TYPES[image.type]))


def _run_rows(
    original: Run, feed: np.ndarray[Any, Any], fixed_batch: int | None
) -> np.ndarray[Any, Any]:
    """The original's answer for each row alone: the reference that no batch size can colour."""
    size = fixed_batch or 1
    return np.concatenate([original(np.repeat(row[None], size, axis=0))[:1] for row in feed])


def _scores(path: Path, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if scores.ndim == 4 and scores.shape[2:] == (1, 1):
        scores = scores[:, :, 0, 0]
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ModelError(
            f"model.onnx: {path}: gives an output of shape {scores.shape}; "
            "class scores are [N, C] or [N, C, 1, 1], with at least 2 classes"
        )
    return scores.astype(np.float32)


def _is_probability(
    path: Path, model: onnx.ModelProto, output: str, scores_NK: np.ndarray[Any, Any]
) -> bool:
    """Rows of probabilities are not negative and add up to 1; logits of three images never do."""
    makers = {name: node for node in model.graph.node for name in node.output}
    last = makers.get(output)
    while last is not None and last.op_type in _PASS_ON and last.input:
        last = makers.get(last.input[0])
    if last is not None and last.op_type == "Sigmoid":
        raise ModelError(
            f"model.onnx: {path}: ends with a Sigmoid, so its classes do not exclude each other; "
            "batchclf ranks classes that do"
        )
    sums_N = scores_NK.sum(axis=1)
    return bool((scores_NK >= 0).all() and np.allclose(sums_N, 1, atol=5e-3))


# ---- wrapping ------------------------------------------------------------------------------------


def _rename_earlier_wrapping(model: onnx.ModelProto) -> None:
    """Give values of an earlier wrapping other names, so that ours are free."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [_renamed(name) for name in names]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.name = _renamed(value.name)


def _renamed(name: str) -> str:
    return f"inner_{name}" if name.startswith(_PREFIX) else name


def _wrap(model: onnx.ModelProto, image: _Input, preprocess: Preprocess, output: str) -> None:
    graph = model.graph
    before = _nodes_before(image, preprocess)
    after = _nodes_after(output)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    height, width = image.crop
    batch: int | str = image.fixed_batch or "batch"
    pixels = helper.make_tensor_value_info(
        f"{_PREFIX}pixels", TensorProto.UINT8, [batch, height, width, 3]
    )
    kept = [value for value in graph.input if value.name != image.name]
    del graph.input[:]
    graph.input.extend([pixels, *kept])
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(f"{_PREFIX}scores", TensorProto.FLOAT, [batch, None])
    )


def _nodes_before(image: _Input, preprocess: Preprocess) -> list[onnx.NodeProto]:
    """uint8 NHWC to the original input: layout, float, multiply and add, type."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    constants: list[onnx.NodeProto] = []
    if preprocess.channels == "bgr":
        order = onnx.numpy_helper.from_array(np.array([2, 1, 0]))
        constants.append(helper.make_node("Constant", [], [f"{_PREFIX}order"], value=order))
        steps.append(("Gather", [f"{_PREFIX}order"], {"axis": 3}))
    if image.layout == "NCHW":
        steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    if preprocess.mean is not None and preprocess.std is not None:
        std_C = np.array(preprocess.std)
        shape = (1, 3, 1, 1) if image.layout == "NCHW" else (1, 1, 1, 3)
        for name, values_C in (
            ("scale", 1 / (255 * std_C)),
            ("shift", -np.array(preprocess.mean) / std_C),
        ):
            value = onnx.numpy_helper.from_array(values_C.astype(np.float32).reshape(shape))
            constants.append(helper.make_node("Constant", [], [f"{_PREFIX}{name}"], value=value))
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        steps.append(("Mul", [f"{_PREFIX}scale"], {}))
        steps.append(("Add", [f"{_PREFIX}shift"], {}))
    if image.type == TensorProto.FLOAT16:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT16}))
    if not steps:
        steps.append(("Identity", [], {}))
    return [*constants, *_chain(steps, f"{_PREFIX}pixels", image.name, "in")]


def _nodes_after(output: str) -> list[onnx.NodeProto]:
    """The original scores to float32 of shape NK."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Flatten", [], {"axis": 1}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
    ]
    return _chain(steps, output, f"{_PREFIX}scores", "out")


def _chain(
    steps: list[tuple[str, list[str], dict[str, Any]]], first: str, last: str, tag: str
) -> list[onnx.NodeProto]:
    names = [first, *(f"{_PREFIX}{tag}_{number}" for number in range(1, len(steps))), last]
    return [
        helper.make_node(operator, [names[number], *extra], [names[number + 1]], **attributes)
        for number, (operator, extra, attributes) in enumerate(steps)
    ]
