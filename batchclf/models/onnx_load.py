"""A user's ONNX file to a model in memory, with the weights of the files beside it.

Those are read here and not by onnx or ONNX Runtime, which differ between versions in the links that
they follow: only files that `check_onnx` has passed, opened once each, compared by identity.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import TensorProto

from batchclf.errors import ModelError
from batchclf.models.graph import inner_graphs
from batchclf.models.onnx_guard import check_onnx

OLDEST_OPSET = 7
"""First opset whose Mul and Add broadcast as NumPy does."""
_DEFAULT_DOMAIN = ("", "ai.onnx")


def load_graph(path: Path) -> onnx.ModelProto:
    """The file without the weights of other files, its functions inlined.

    Raises:
        ModelError: no ONNX model, or one of an opset that is too old.
    """
    try:
        # Named, since `check_onnx` saw protocol buffers and a suffix may mean text to onnx.
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"model.onnx: {path}: cannot be read: {error.strerror}") from None
    except (DecodeError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(24)
        raise ModelError(
            f"model.onnx: {path}: not an ONNX model: it starts with {start!r}; "
            "download or export it again"
        ) from error
    if not model.graph.node:
        raise ModelError(f"model.onnx: {path}: not an ONNX model: its graph is empty")
    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAIN), 0
    )
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"model.onnx: {path}: found opset {opset}; {OLDEST_OPSET} or later is needed: "
            "export it again with a newer opset"
        )
    return _inlined(path, model) if model.functions else model


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the nodes of its functions in their place, as ONNX Runtime sees them."""
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"model.onnx: {path}: its functions cannot be inlined: {error}; export it again"
        ) from error


def load_model(path: Path, log: Callable[[str], None]) -> onnx.ModelProto:
    """The file with all its weights in it; `log` hears of links that lead to them.

    Raises:
        ModelError: as `load_graph` and `check_onnx`, or weights that cannot be read.
    """
    weights = {file.location: file for file in check_onnx(path, "model.onnx: ", may_link=True)}
    for file in weights.values():
        if file.is_link:
            log(f"{path}: a link beside it leads to its weights: {file.path}")
    model = load_graph(path)
    with ExitStack() as stack:
        opened: dict[str, BinaryIO] = {}
        for tensor in _tensors(model.graph):
            if tensor.data_location != TensorProto.EXTERNAL:
                del tensor.external_data[:]
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            if location not in weights:
                raise ModelError(f"model.onnx: {path}: was replaced while it was read; run again")
            try:
                if location not in opened:
                    opened[location] = stack.enter_context(weights[location].open())
                _fill(tensor, opened[location], entries)
            except OSError as error:
                raise ModelError(
                    f"model.onnx: {weights[location].path}: cannot be read: {error.strerror}"
                ) from None
    return model


def _fill(tensor: TensorProto, file: BinaryIO, entries: dict[str, str]) -> None:
    file.seek(int(entries.get("offset") or 0))
    length = entries.get("length")
    tensor.raw_data = file.read(int(length)) if length else file.read()
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant tensor of a graph, and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for inner in inner_graphs(node):
            yield from _tensors(inner)
