"""What the tests of the libraries' models share: photos, and a built model exported."""

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchclf.images.decode import Decoder
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.results.records import Pixels, Preprocess
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import PHOTOS, ROOT

ENOUGH_PHOTOS = 50
LEAST_SPREAD = 0.01
"""Of a logit between photos, over the largest |logit|: below, a match says little."""


def photos() -> list[Path]:
    """The sample photos, and 50 of the larger test data where it is present."""
    found = sorted((ROOT / "samples" / "photos").glob("*.jpg"))
    if PHOTOS.is_dir():
        found += sorted(PHOTOS.rglob("*.*"))[:ENOUGH_PHOTOS]
    return found


def decoded(preprocess: Preprocess, path: Path) -> Pixels:
    """What a job's decoder makes of a photo, HWC."""
    slot_HWC = np.empty((*preprocess.crop, 3), np.uint8)
    assert Decoder(preprocess)(path.read_bytes(), b"x", slot_HWC).failure is None
    return slot_HWC


def written(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def resolved(name: str, **keys: Any) -> ResolvedModel:
    """The model, exported and checked, as a run has it."""
    return resolve_model(
        ModelSpec.model_validate({"name": name, **keys}),
        batch_size=4,
        open_reference=open_reference,
        log=lambda text: None,
    )


def scores_of(model: ResolvedModel, paths: list[Path]) -> np.ndarray[Any, Any]:
    """Logits NK of the exported model for photos, as a run computes them."""
    run = open_reference(model.bundle.model_path)
    pixels_NHWC = np.stack([decoded(model.preprocess, path) for path in paths])
    return np.concatenate(
        [run(pixels_NHWC[start : start + 4]) for start in range(0, len(paths), 4)]
    )


def assert_same_answers(found_NK: Any, expected_NK: Any) -> None:
    """The same first class for every photo, and logits within the tolerance of the export."""
    from batchclf.models.checks import assert_same_scores

    assert_same_scores(found_NK, np.asarray(expected_NK), "photos")
    np.testing.assert_array_equal(found_NK.argmax(1), np.asarray(expected_NK).argmax(1))
    spread = np.ptp(found_NK, axis=0).max() / np.abs(found_NK).max()
    assert spread > LEAST_SPREAD, "the logits hardly depend on the photo"


@pytest.fixture
def fake_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the hub, and no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # Its retries take half a minute.
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
    return tmp_path / "hub"


def ask_hub_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub, which reads HF_ENDPOINT when it is imported, ask at `url`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
