"""Models without their weights: what each is made of, which decides where its nodes run.

    python -m tests.gpu_standin.skeletons [NAME ...]

exports the models in skeletons.zip anew, and torchvision's NAME as well, and writes their
skeletons; with torch, in some minutes.
"""

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

SKELETONS = Path(__file__).parent / "skeletons.zip"
_MOST = 64
"""Values that are kept of a tensor: shapes, axes, scales."""
_NARROW = {4096: 128, 3072: 128}
"""Hidden layers of classifiers and transformers: nothing but time depends on how wide they are."""


def main(more: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / SKELETONS.name
        with zipfile.ZipFile(made, "w", zipfile.ZIP_LZMA) as archive:
            for name in sorted({*names(), *more}):
                print(name, file=sys.stderr)
                member = zipfile.ZipInfo(f"{name}.onnx")  # of no particular time
                member.compress_type = zipfile.ZIP_LZMA
                archive.writestr(member, exported(name, Path(folder)).SerializeToString())
        shutil.copy(made, SKELETONS)


def exported(name: str, folder: Path) -> onnx.ModelProto:
    """The skeleton of one of torchvision's models, as it is exported now."""
    from batchclf.models.export import export_model
    from batchclf.models.zoo import torchvision
    from batchclf.runtime.classifier import open_reference
    from batchclf.spec.job import ModelSpec
    from tests.sweep import wake

    built = torchvision.build(ModelSpec(name=name, weights="none"))
    wake(built)  # biases of zeros, as they are before training, are left out
    export_model(built, folder, batch_size=2, open_reference=open_reference)
    return _without_weights(folder / "model.onnx")


def kept(name: str) -> onnx.ModelProto:
    """A skeleton as it was exported once."""
    with zipfile.ZipFile(SKELETONS) as archive:
        return onnx.load_model_from_string(archive.read(f"{name}.onnx"))


def outline(model: onnx.ModelProto) -> list[object]:
    """What a model is made of, one node after the other, whatever its values are called."""
    shapes = {one.name: (*one.dims, one.data_type) for one in model.graph.initializer}
    return [
        (
            *(node.domain, node.op_type, len(node.output)),
            tuple(shapes.get(name) for name in node.input),
            tuple(sorted(one.SerializeToString() for one in node.attribute)),
        )
        for node in model.graph.node
    ]


def names() -> list[str]:
    """The models that there are skeletons of."""
    with zipfile.ZipFile(SKELETONS) as archive:
        return [Path(member).stem for member in archive.namelist()]


def write_model(name: str, path: Path) -> Path:
    """A model with zeros for its weights: all of them are one hole in a file beside it."""
    model = kept(name)
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
