"""Models without their weights: what each is made of, which decides where its nodes run.

    python -m tests.gpu_standin.skeletons NAME=MODEL.onnx ...

writes the skeletons of exported models (`batchclf export`) into skeletons.zip.
"""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

SKELETONS = Path(__file__).parent / "skeletons.zip"
_MOST = 64
"""Values that are kept of a tensor: shapes, axes, scales."""
_NARROW = {4096: 128, 3072: 128}
"""Hidden layers of classifiers and transformers: nothing but time depends on how wide they are."""


def main(models: Sequence[str]) -> None:
    with zipfile.ZipFile(SKELETONS, "w", zipfile.ZIP_LZMA) as archive:
        for name, path in sorted(one.split("=", 1) for one in models):
            member = zipfile.ZipInfo(f"{name}.onnx")  # of no particular time
            member.compress_type = zipfile.ZIP_LZMA
            archive.writestr(member, _without_weights(Path(path)).SerializeToString())


def names() -> list[str]:
    """The models that there are skeletons of."""
    with zipfile.ZipFile(SKELETONS) as archive:
        return [Path(member).stem for member in archive.namelist()]


def write_model(name: str, path: Path) -> Path:
    """A model with zeros for its weights: all of them are one hole in a file beside it."""
    with zipfile.ZipFile(SKELETONS) as archive:
        model = onnx.load_model_from_string(archive.read(f"{name}.onnx"))
    hole = path.with_suffix(".zeros")
    weights = [tensor for tensor in model.graph.initializer if _is_weight(tensor)]
    sizes = [4 * int(np.prod(tensor.dims, dtype=np.int64)) for tensor in weights]
    with hole.open("wb") as file:
        file.truncate(max(sizes))
    for tensor, size in zip(weights, sizes, strict=True):
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", hole.name), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def _without_weights(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {})
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            dims = [_NARROW.get(size, size) for size in tensor.dims]
            bare = TensorProto(name=tensor.name, dims=dims, data_type=tensor.data_type)
            tensor.CopyFrom(bare)
    return model


def _is_weight(tensor: TensorProto) -> bool:
    is_float = tensor.data_type == TensorProto.FLOAT
    return is_float and int(np.prod(tensor.dims, dtype=np.int64)) > _MOST


if __name__ == "__main__":
    main(sys.argv[1:])
