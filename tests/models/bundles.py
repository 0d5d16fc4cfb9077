"""Bundles of real models, and the pixels of real images for them.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from batchclf.images.decode import Decoder
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.results.records import Pixels, Scores
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import DIGITS_MODEL, MOBILENET_WEIGHTS, data


def digits_model() -> ResolvedModel:
    """The sample model of handwritten digits; exported once per session."""
    return _resolve(**DIGITS_MODEL)


def mobilenet_model() -> ResolvedModel:
    """MobileNetV2 with real weights, or a skip."""
    return _resolve(name="mobilenet_v2", weights=str(data(MOBILENET_WEIGHTS)))


def _resolve(**spec: Any) -> ResolvedModel:
    return resolve_model(
        ModelSpec(**spec), batch_size=8, open_reference=open_reference, log=lambda _: None
    )


def pixels_of(folder: Path, model: ResolvedModel) -> Pixels:
    """All images below `folder` as `model` takes them, in the order of their names."""
    decoder = Decoder(model.preprocess, mode="exact", exif_transpose=False, max_pixels=100_000_000)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    pixels_NHWC = np.empty((len(paths), *model.preprocess.crop, 3), np.uint8)
    failures = [
        loaded.failure
        for path, slot_HWC in zip(paths, pixels_NHWC, strict=True)
        if (loaded := decoder(path.read_bytes(), path.name.encode(), slot_HWC)).failure
    ]
    assert failures == []
    return pixels_NHWC


def scores_of(model: Path, pixels_NHWC: Pixels, size: int = 10) -> Scores:
    """What an ONNX file gives on the CPU, in batches of `size`."""
    run = open_reference(model)
    starts = range(0, len(pixels_NHWC), size)
    return np.concatenate([run(pixels_NHWC[start : start + size]) for start in starts])
