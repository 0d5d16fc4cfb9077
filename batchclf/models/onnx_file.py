"""A user's own ONNX classifier to a bundle.

What the file tells is read from it (layout, type, size, batch, classes, logits or probabilities);
what it cannot tell (resize, mean, std) is asked for. Nodes are put before the graph so that it
takes uint8 pixels NHWC, and after it so that it gives float32 scores NK.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
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
from batchclf.models.found_labels import METADATA_KEYS, labels_in
from batchclf.models.graph import QUANTISED, Names, inner_graphs, save_model, taken_by
from batchclf.models.labels import require_label_count
from batchclf.models.onnx_ends import Makers
from batchclf.models.onnx_input import Feed, ImageInput, image_input, preprocess_of
from batchclf.models.onnx_load import load_graph, load_model
from batchclf.models.onnx_scores import (
    SHAPES,
    Meaning,
    Pair,
    ScoreTensor,
    meaning_of,
    nodes_after,
    paired,
    refuse_second,
    rows_of,
    score_tensor,
)
from batchclf.results.records import Activation, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
"""Operators that scale a batch by its own largest value, so that its rows depend on each other."""
_PREFIX = "batchclf_"
_LARGEST_BAKED = 1024
"""A first dimension beyond it in a Reshape is no batch."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """What `wrap_onnx` found out about the model it wrote."""

    preprocess: Preprocess
    num_classes: int
    activation: Activation
    fixed_batch: int | None
    checked_batches: tuple[int, ...]
    arithmetic: Literal["fp32", "fp16", "int8"]
    labels: tuple[str, ...]
    """Class names that the file itself gives; empty: none."""
    labels_origin: str
    """Where in the file they are."""


def check_file(path: Path, spec: ModelSpec, labels: tuple[str, ...]) -> None:
    """Refuse a file for all that can be told without running it.

    Args:
        labels: the class names that the job gives; empty: none.

    Raises:
        ModelError: as `wrap_onnx`.
    """
    model = load_graph(path)
    image = image_input(path, model, spec)
    preprocess_of(path, image, spec.preprocess or PreprocessSpec())
    tensor = score_tensor(str(path), model, spec.output_name)
    refuse_second(str(path), tensor, spec.activation)
    known = tensor.num_classes or 0
    if known == 1 and tensor.ending in ("derived", "unknown"):
        settled(spec.activation, 1, f"model.onnx: {path}")
    if known == 1 and spec.activation != "none":
        known = 2  # one number with a sigmoid speaks for the second of two
    if labels and known:
        require_label_count(labels, known, str(spec.labels))


def wrap_onnx(
    path: Path,
    spec: ModelSpec,
    folder: Path,
    *,
    batch_size: int,
    open_reference: OpenReference,
    log: Log,
) -> WrappedModel:
    """Write `path` to `folder`/model.onnx with uint8 NHWC input and NK scores, and check it.

    Raises:
        ModelError: no ONNX classifier of images, or something about it has to be told.
    """
    model = load_model(path, log)
    image = image_input(path, model, spec)
    preprocess = preprocess_of(path, image, spec.preprocess or PreprocessSpec())
    tensor = _as_floats(model, score_tensor(str(path), model, spec.output_name))
    _keep_only(model, tensor.name)
    arithmetic = _arithmetic(model, image)
    if any(node.op_type in DYNAMIC for node in _all_nodes(model.graph)):
        image = _one_at_a_time(path, model, image, log)
    feed = Feed(image, preprocess, is_literal=arithmetic != "fp32")
    pixels_NHWC = sample_pixels(*image.crop)
    with _original(path, model, tensor, folder, open_reference) as run:
        original = _Original(path, run, feed.array(pixels_NHWC))
        fixed_batch = _fixed_batch(original, model, image.fixed_batch, batch_size, log)
        outputs_NK, row_length = original.rows(fixed_batch or 1)
    meaning = meaning_of(str(path), tensor, outputs_NK, spec.activation)
    expected_NK = paired(outputs_NK, meaning.pair)
    _tell(path, image, tensor, meaning, expected_NK, log)
    wrapping = _Wrapping(feed, tensor.name, meaning.pair, fixed_batch, row_length)
    wrapping.put_around(model)
    target = folder / MODEL_FILE
    save_model(model, target)
    checked = (fixed_batch,) if fixed_batch else _sizes(batch_size)
    with _named(path, target):
        run = open_reference(target)
        for size in checked:
            _check(path, run(tiled(pixels_NHWC, size)), tiled(expected_NK, size), arithmetic)
    labels, origin = _labels(path, model, tensor, expected_NK.shape[1], log)
    return WrappedModel(
        preprocess,
        int(expected_NK.shape[1]),
        meaning.activation,
        fixed_batch,
        checked,
        arithmetic,
        labels,
        origin,
    )


def _check(
    path: Path, found_NK: np.ndarray[Any, Any], expected_NK: np.ndarray[Any, Any], arithmetic: str
) -> None:
    size = len(expected_NK)
    try:
        assert_same_scores(
            found_NK, expected_NK, f"{path}, batch of {size}", is_half=arithmetic == "fp16"
        )
    except ModelError as error:
        if size == 1:
            raise
        raise ModelError(
            f"{error}. Images in a batch change each other's answers, as where a "
            "BatchNormalization was exported in training mode: export it again after model.eval(), "
            "or with a batch of 1"
        ) from error


def _arithmetic(model: onnx.ModelProto, image: ImageInput) -> Literal["fp32", "fp16", "int8"]:
    """What the file's own graph computes in."""
    if any(node.op_type in QUANTISED for node in model.graph.node):
        return "int8"
    types = {image.type, *(tensor.data_type for tensor in model.graph.initializer)}
    return "fp16" if TensorProto.FLOAT16 in types else "fp32"


def _tell(
    path: Path,
    image: ImageInput,
    tensor: ScoreTensor,
    meaning: Meaning,
    scores_NK: np.ndarray[Any, Any],
    log: Log,
) -> None:
    """Say what was read from the graph and is not plain."""
    if image.num_channels == 1:
        log(f"{path}: takes one channel, so images are made grey")
    if tensor.note:
        log(f"{path}: {tensor.note}")
    if meaning.note:
        log(f"{path}: {meaning.note}")
    if meaning.pair == "complement":
        log(
            f"{path}: ends with a Sigmoid over one number: two classes, and it is the score of the "
            "second"
        )
    elif tensor.ending == "sigmoid" and scores_NK.shape[1] == 1:
        log(f"{path}: ends with a Sigmoid over one number, which is the score")
    elif tensor.ending == "sigmoid":
        log(
            f"{path}: ends with a Sigmoid: {scores_NK.shape[1]:,} labels that do not exclude each "
            "other, each with a score of its own"
        )


def _labels(
    path: Path, model: onnx.ModelProto, tensor: ScoreTensor, num_classes: int, log: Log
) -> tuple[tuple[str, ...], str]:
    """The class names in the file that are as many as its classes, and where they are."""
    found = [(tensor.labels, "its ZipMap")]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    for key in METADATA_KEYS:
        found.append((labels_in(metadata.get(key, "")), f"its metadata ({key})"))
    for labels, origin in found:
        if len(labels) == num_classes:
            return labels, origin
        if labels:
            log(
                f"{path}: {origin} has {len(labels):,} class names, and the model has "
                f"{num_classes:,} classes: not used"
            )
    return (), ""


# ---- the model as it is --------------------------------------------------------------------------


def _as_floats(model: onnx.ModelProto, tensor: ScoreTensor) -> ScoreTensor:
    """The score tensor; of one of 8 bits, what its numbers stand for."""
    if not tensor.quantised:
        return tensor
    name = Names(model.graph).new(f"{tensor.name}_as_floats")
    inputs = [tensor.name, *tensor.quantised]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, [name]))
    return replace(tensor, name=name)


def _keep_only(model: onnx.ModelProto, output: str) -> None:
    """Leave what one tensor is made of; other outputs cost time, and may be no tensors."""
    graph = model.graph
    makers = Makers(graph)
    needed: set[str] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        if (node := makers.get(name)) is not None:
            waiting += taken_by(node)
    nodes = [node for node in graph.node if needed.intersection(node.output)]
    outputs = [value for value in graph.output if value.name == output]
    weights = {one.name for one in graph.initializer} - needed
    for kept, whole in (
        (nodes, graph.node),
        ([one for one in graph.input if one.name not in weights], graph.input),
        ([one for one in graph.initializer if one.name in needed], graph.initializer),
        (outputs or [onnx.ValueInfoProto(name=output)], graph.output),
    ):
        del whole[:]
        whole.extend(kept)


@contextmanager
def _original(
    path: Path,
    model: onnx.ModelProto,
    tensor: ScoreTensor,
    folder: Path,
    open_reference: OpenReference,
) -> Iterator[Run]:
    """The user's model as a function, from its own input to the score tensor."""
    with tempfile.TemporaryDirectory(prefix=".original-", dir=folder.parent) as temporary:
        file = Path(temporary) / MODEL_FILE
        save_model(model, file)
        if (Path(temporary) / f"{MODEL_FILE}.data").exists():  # then the model has lost its weights
            onnx.load_external_data_for_model(model, temporary)
        with _named(path, file):
            run = open_reference(file, tensor.name)
            yield run


@contextmanager
def _named(path: Path, copy: Path) -> Iterator[None]:
    """Let errors about a copy speak of the file that the user knows."""
    try:
        yield
    except ModelError as error:
        told = str(error).replace(str(copy), str(path))
        raise ModelError(told if "model.onnx: " in told else f"model.onnx: {told}") from error


@dataclass(frozen=True, slots=True)
class _Original:
    """The user's model, and a few images as it takes them."""

    path: Path
    run: Run
    feed: np.ndarray[Any, Any]

    def answering(self, sizes: Iterable[int]) -> Iterator[int]:
        """The batch sizes, of these, for which it gives one row for each image.

        A row is as long as that of one image alone, where it answers for one: the classes of one
        image are no numbers of as many images.
        """
        length = self._row_length(1)
        for size in sizes:
            found = length if size == 1 else self._row_length(size)
            if found is not None and (length is None or found == length):
                yield size

    def _row_length(self, size: int) -> int | None:
        """Numbers for each image of a batch; None: it takes no such batch, or gives no rows."""
        try:
            rows_NK = rows_of(self.run(tiled(self.feed, size)), size)
        except ModelError:
            return None
        return None if rows_NK is None else rows_NK.shape[1]

    def rows(self, size: int) -> tuple[np.ndarray[Any, Any], int | None]:
        """Its answer for each image, which no other image in the batch can colour, of shape NK.

        And K, where it gives the classes of one image without an axis for the batch.
        """
        found = [self.run(np.repeat(row[None], size, axis=0)) for row in self.feed]
        rows = [rows_of(scores, size) for scores in found]
        kept = [row_NK[:1] for row_NK in rows if row_NK is not None]
        if len(kept) < len(found):
            raise ModelError(
                f"model.onnx: {self.path}: gives an output of shape {found[0].shape} for a batch "
                f"of {size}; class scores are {SHAPES}; name another output, or a tensor "
                "inside the graph, in model.output_name"
            )
        scores_NK = np.concatenate(kept)
        has_batch = found[0].ndim > 1 or found[0].shape == (size,)
        return scores_NK, None if has_batch else scores_NK.shape[1]


# ---- batches -------------------------------------------------------------------------------------


def _one_at_a_time(path: Path, model: onnx.ModelProto, image: ImageInput, log: Log) -> ImageInput:
    """Declare a batch of 1, whatever the file declares: its nodes compute what they are given."""
    log(
        f"{path}: is quantised dynamically, so images in a batch would change each other's "
        "answers: it runs on one image at a time (batches of 1)"
    )
    (value,) = (one for one in model.graph.input if one.name == image.name)
    value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    return replace(image, fixed_batch=1)


def _fixed_batch(
    original: _Original, model: onnx.ModelProto, fixed: int | None, batch_size: int, log: Log
) -> int | None:
    """The one batch size that the model is to be run at; None: any will do."""
    if fixed is not None:
        return fixed
    all_sizes = _sizes(batch_size)
    if tuple(original.answering(all_sizes)) == all_sizes:
        return None
    sizes = _batches_to_try(model, batch_size)
    found = next(original.answering(sizes), None)
    if found is None:
        original.rows(1)  # says why not
        raise ModelError(
            f"model.onnx: {original.path}: answers for no batch of {', '.join(map(str, sizes))} "
            "images; export it again with a batch that is open, or of 1"
        )
    log(
        f"{original.path}: its batch is open in name only: {found} is the largest of "
        f"{', '.join(map(str, sizes))} that works, so it runs in batches of {found}"
    )
    return found


def _sizes(batch_size: int) -> tuple[int, ...]:
    """Batch sizes at which a model of any is checked."""
    return tuple(sorted({1, 2, 3, batch_size}))


def _batches_to_try(model: onnx.ModelProto, batch_size: int) -> list[int]:
    """The job's batch size and its halves, largest first; then sizes that a Reshape holds."""
    sizes = [batch_size >> shift for shift in range(batch_size.bit_length())]
    shapes = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) == 1
    }
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            shapes[node.output[0]] = node.attribute[0].t
    baked: set[int] = set()
    for node in model.graph.node:
        if node.op_type in ("Reshape", "Expand") and node.input[1] in shapes:
            first = onnx.numpy_helper.to_array(shapes[node.input[1]]).ravel()[:1]
            baked.update(int(size) for size in first if 1 < size <= _LARGEST_BAKED)
    smaller = sorted((size for size in baked if size <= batch_size), reverse=True)
    larger = sorted(size for size in baked if size > batch_size)
    return list(dict.fromkeys([*sorted({*sizes, *smaller}, reverse=True), *larger]))


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from _all_nodes(inner)


# ---- wrapping ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wrapping:
    """What is put around a graph."""

    feed: Feed
    output: str
    pair: Pair
    fixed_batch: int | None
    row_length: int | None

    def put_around(self, model: onnx.ModelProto) -> None:
        """Let the graph take uint8 pixels NHWC and give float32 scores NK."""
        graph = model.graph
        _rename_earlier_wrapping(graph)
        image = replace(self.feed.image, name=_renamed(self.feed.image.name))
        before = replace(self.feed, image=image).nodes(f"{_PREFIX}pixels")
        output = _renamed(self.output)
        after = nodes_after(output, f"{_PREFIX}scores", self.pair, self.row_length)
        nodes = [*before, *graph.node, *after]
        del graph.node[:]
        graph.node.extend(nodes)
        batch: int | str = self.fixed_batch or "batch"
        pixels = helper.make_tensor_value_info(
            f"{_PREFIX}pixels", TensorProto.UINT8, [batch, *image.crop, 3]
        )
        kept = [value for value in graph.input if value.name != image.name]
        del graph.input[:]
        graph.input.extend([pixels, *kept])
        del graph.output[:]
        graph.output.append(
            helper.make_tensor_value_info(f"{_PREFIX}scores", TensorProto.FLOAT, [batch, None])
        )


def _rename_earlier_wrapping(graph: onnx.GraphProto) -> None:
    """Give values of an earlier wrapping other names, so that ours are free."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [_renamed(name) for name in names]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = _renamed(value.name)


def _renamed(name: str) -> str:
    return f"inner_{name}" if name.startswith(_PREFIX) else name
