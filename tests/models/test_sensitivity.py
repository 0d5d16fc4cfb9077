"""How far a model's answers move when what its layers take is rounded to bf16."""

from pathlib import Path

import numpy as np
import pytest

from batchclf.errors import ModelError
from batchclf.models.bundle import GOLDEN_FILE, open_bundle
from batchclf.models.checks import Run
from batchclf.models.golden import check_golden
from batchclf.models.resolve import Log, ResolvedModel, resolve_model
from batchclf.models.sensitivity import open_rounded
from batchclf.models.variants import Conversion, resolve_variant
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec, PreprocessSpec
from tests.models.bundles import digits_model, pixels_of, scores_of
from tests.models.onnx_models import Classifier, save
from tests.tiny import DIGITS


def test_a_bundle_says_how_far_rounding_moves_each_of_its_answers() -> None:
    with np.load(digits_model().bundle.folder / GOLDEN_FILE) as arrays:
        error_N = arrays["bf16_error_N"]
        assert error_N.shape == (len(arrays["scores_NK"]),)
    assert ((error_N > 1e-4) & (error_N < 0.2)).all()


def test_the_rounded_model_is_off_by_the_steps_of_8_bits() -> None:
    model = digits_model()
    pixels_NHWC = pixels_of(DIGITS, model)[::20]
    expected_NK = scores_of(model.bundle.model_path, pixels_NHWC)
    found_NK = open_rounded(model.bundle.folder, open_reference)(pixels_NHWC)
    relative = np.abs(found_NK - expected_NK).max() / np.abs(expected_NK).max()
    assert 2**-12 < relative < 2**-4
    assert (found_NK.argmax(1) == expected_NK.argmax(1)).mean() > 0.95


@pytest.mark.parametrize(
    "model",
    [
        Classifier(opset=7, weights_are_inputs=True),
        Classifier(opset=11, depth=3),
        Classifier(depth=3),
    ],
    ids=["oldest opset", "before bfloat16", "layers without names"],
)
def test_a_users_model_of_any_opset_is_measured(tmp_path: Path, model: Classifier) -> None:
    folder = resolved(save(model, tmp_path / "own.onnx"), print).bundle.folder
    with np.load(folder / GOLDEN_FILE) as arrays:
        error_N = arrays["bf16_error_N"]
    assert ((error_N > 1e-5) & (error_N < 0.2)).all()


def test_a_model_that_cannot_be_rounded_is_taken_without_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Run:
        raise ModelError("not accepted")

    monkeypatch.setattr("batchclf.models.sensitivity.open_rounded", refuse)
    said: list[str] = []
    model = resolved(save(Classifier(), tmp_path / "own.onnx"), said.append)
    with np.load(model.bundle.folder / GOLDEN_FILE) as arrays:
        assert sorted(arrays) == ["pixels_NHWC", "scores_NK"]
    assert any("cannot be measured (not accepted)" in line for line in said)


def test_a_model_converted_to_fp16_says_of_its_answers_what_its_base_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = digits_model().bundle
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    conversion = Conversion(
        sample=lambda: pytest.fail("fp16 needs no images"),
        sample_digest=lambda: pytest.fail("fp16 needs no images"),
        open_reference=open_reference,
        threads=1,
        made_by={},
        log=print,
    )
    half = open_bundle(resolve_variant(base, "fp16", conversion).folder)
    with np.load(base.folder / GOLDEN_FILE) as ours, np.load(half.folder / GOLDEN_FILE) as theirs:
        assert sorted(ours) == sorted(theirs) == ["bf16_error_N", "pixels_NHWC", "scores_NK"]
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    check_golden(half, open_reference(half.model_path), where="here", precision="fp16")


def resolved(path: Path, log: Log) -> ResolvedModel:
    """A model prepared anew, in a cache of its own."""
    spec = ModelSpec(
        onnx=path, preprocess=PreprocessSpec(resize=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHCLF_CACHE_DIR", str(path.parent / "cache"))
        return resolve_model(spec, batch_size=4, open_reference=open_reference, log=log)
