"""The golden check: a session that gives other answers than the bundle does not start a job."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchclf.errors import ModelError, ProviderError
from batchclf.models.bundle import (
    GOLDEN_FILE,
    Bundle,
    BundleMeta,
    model_files,
    sha256_of,
    write_bundle,
)
from batchclf.models.checks import Run, sample_pixels
from batchclf.models.golden import check_golden, read_golden, write_golden
from batchclf.results.records import Pixels, Precision, Preprocess, Scores
from tests.conftest import MOBILENET_WEIGHTS, Batchclf, data
from tests.tiny import write_classifier, write_tiny_job

NUM_CLASSES = 50
NOISE = np.random.default_rng(1).normal(size=(NUM_CLASSES,)).astype(np.float32)
WEIGHTS_PK = np.random.default_rng(0).normal(size=(4 * 4 * 3, NUM_CLASSES)).astype(np.float32)
PIXELS_NHWC = np.random.default_rng(2).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)


def classify(pixels_NHWC: Pixels) -> Scores:
    rows_NP = (pixels_NHWC.reshape(len(pixels_NHWC), -1) / 255).astype(np.float32)
    scores_NK: Scores = rows_NP @ WEIGHTS_PK
    return scores_NK


def noisy(size: float) -> Callable[[Pixels], Scores]:
    return lambda pixels_NHWC: classify(pixels_NHWC) + np.float32(size) * NOISE


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_of(tmp_path / "bundle", classify, PIXELS_NHWC)


def bundle_of(folder: Path, run: Run, pixels_NHWC: Pixels, rounded: Run | None = None) -> Bundle:
    """A bundle of nothing but the answers of `run`."""

    def build(folder: Path) -> BundleMeta:
        (folder / "model.onnx").write_bytes(b"not opened here")
        height, width = pixels_NHWC.shape[1:3]
        return BundleMeta(
            name="linear",
            source={},
            preprocess=Preprocess(height, (height, width), "bilinear", None, None),
            labels=tuple(map(str, range(run(pixels_NHWC).shape[1]))),
            activation="softmax",
            files=model_files(folder),
            golden_sha256=write_golden(folder, run, pixels_NHWC, rounded=rounded),
        )

    return write_bundle(folder, build)


def test_the_reference_images_and_their_scores_come_back(bundle: Bundle) -> None:
    pixels_NHWC, scores_NK = read_golden(bundle)
    np.testing.assert_array_equal(pixels_NHWC, PIXELS_NHWC)
    np.testing.assert_allclose(scores_NK, classify(PIXELS_NHWC), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 7])
def test_the_models_own_answers_pass_at_any_batch_size(
    bundle: Bundle, batch_size: int | None
) -> None:
    sizes = []

    def counting(pixels_NHWC: Pixels) -> Scores:
        sizes.append(len(pixels_NHWC))
        return classify(pixels_NHWC)

    check_golden(bundle, counting, where="here", batch_size=batch_size)
    assert set(sizes) == {batch_size or len(PIXELS_NHWC)}
    assert sum(sizes) >= len(PIXELS_NHWC)


@pytest.mark.parametrize(
    ("precision", "noise"), [("fp32", 1e-5), ("fp16", 3e-2), ("bf16", 0.3), ("int8", 1.0)]
)
def test_the_rounding_of_each_precision_passes(
    bundle: Bundle, precision: Precision, noise: float
) -> None:
    check_golden(bundle, noisy(noise), where="here", precision=precision)


@pytest.mark.parametrize(
    ("precision", "noise"), [("fp32", 1e-2), ("fp16", 0.5), ("bf16", 8.0), ("int8", 8.0)]
)
def test_other_answers_are_refused_at_each_precision(
    bundle: Bundle, precision: Precision, noise: float
) -> None:
    with pytest.raises(ProviderError, match="linear on here: gives other answers") as refused:
        check_golden(bundle, noisy(noise), where="here", precision=precision)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    "broken",
    [
        lambda pixels_NHWC: classify(255 - pixels_NHWC),
        lambda pixels_NHWC: classify(pixels_NHWC[..., ::-1]),
        lambda pixels_NHWC: classify(pixels_NHWC[::-1]),
        lambda pixels_NHWC: np.zeros_like(classify(pixels_NHWC)),
        lambda pixels_NHWC: classify(pixels_NHWC) * np.float32(np.nan),
        lambda pixels_NHWC: classify(pixels_NHWC)[:, :-1],
        lambda pixels_NHWC: classify(pixels_NHWC)[:1],
    ],
    ids=["inverted", "BGR", "rows turned", "zeros", "NaN", "a class short", "a row only"],
)
def test_a_broken_session_is_refused_at_each_precision(
    bundle: Bundle, precision: Precision, broken: Callable[[Pixels], Scores]
) -> None:
    with pytest.raises(ProviderError):
        check_golden(bundle, broken, where="here", precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pytorchs_own_rounding_of_trained_weights_passes(
    tmp_path: Path, precision: Precision
) -> None:
    """On what MobileNetV2 is most sensitive to: smooth gradients, among the reference images."""
    torch = pytest.importorskip("torch")
    zoo = pytest.importorskip("torchvision.models")
    module = zoo.mobilenet_v2()
    module.load_state_dict(torch.load(data(MOBILENET_WEIGHTS), weights_only=True))
    module.eval()
    mean_C, std_C = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def answers(dtype: Any, pixels_NHWC: Pixels) -> Scores:
        inputs_NHWC = (torch.from_numpy(pixels_NHWC) / 255 - mean_C) / std_C
        with torch.inference_mode():
            scores_NK = module.to(dtype)(inputs_NHWC.permute(0, 3, 1, 2).to(dtype))
        found_NK: Scores = scores_NK.float().numpy()
        return found_NK

    bundle = bundle_of(
        tmp_path / "bundle", partial(answers, torch.float32), sample_pixels(224, 224)
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    check_golden(bundle, partial(answers, dtype), where="here", precision=precision)


@pytest.mark.parametrize(
    ("own", "precision", "passing", "refused"),
    [
        (0.02, "bf16", 0.05, 0.13),  # a model that rounding hardly moves
        (0.1, "bf16", 0.27, 0.35),
        (0.1, "fp16", 0.03, 0.06),
        (0.5, "bf16", 0.8, 1.0),
        (0.5, "int8", 0.5, 0.6),  # int8 answers are those of another model
    ],
)
def test_a_session_may_round_as_much_as_its_own_model_is_sensitive_to(
    tmp_path: Path, own: float, precision: Precision, passing: float, refused: float
) -> None:
    def moved(share: float) -> Run:
        """`classify` with an error of that share of its scores' length, centred over classes."""

        def run(pixels_NHWC: Pixels) -> Scores:
            scores_NK = classify(pixels_NHWC)
            length_N = np.linalg.norm(scores_NK - scores_NK.mean(1, keepdims=True), axis=1)
            noise_K = NOISE - NOISE.mean()
            noise_K /= np.linalg.norm(noise_K)
            scores_NK += np.float32(share) * length_N[:, None] * noise_K
            return scores_NK

        return run

    bundle = bundle_of(tmp_path / "bundle", classify, PIXELS_NHWC, moved(own))
    check_golden(bundle, moved(passing), where="here", precision=precision)
    with pytest.raises(ProviderError, match="is rounding"):
        check_golden(bundle, moved(refused), where="here", precision=precision)
    for size in (2, 7):
        check_golden(bundle, moved(passing), where="here", precision=precision, batch_size=size)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_was_silently_computed_in_fp32_is_refused(
    bundle: Bundle, precision: Precision
) -> None:
    with pytest.raises(ProviderError, match=rf"{precision} was asked for, but here computed in"):
        check_golden(bundle, classify, where="here", precision=precision)


def golden_of(bundle: Bundle, scores_NK: Scores) -> Bundle:
    """The same bundle with other reference scores."""
    pixels_NHWC = PIXELS_NHWC[: len(scores_NK)]
    rows = iter(scores_NK)
    digest = write_golden(bundle.folder, lambda _: next(rows)[None], pixels_NHWC)
    return Bundle(bundle.folder, bundle.meta.model_copy(update={"golden_sha256": digest}))


@pytest.mark.parametrize(
    ("expected", "rounded", "garbage"),
    [
        ([[5.0], [-4.0], [3.0]], [[5.1], [-4.1], [2.9]], [[9.0], [-9.0], [77.0]]),
        (
            [[0.02, -0.02], [3.0, -3.0], [-2.0, 2.0]],
            [[-0.03, 0.03], [2.8, -2.9], [-2.1, 2.0]],
            [[1e-6, -1e-6], [-900.0, 900.0], [900.0, -900.0]],
        ),
        (
            [[0.02, -0.02, 0], [3.0, -3.0, 1], [-2.0, 2.0, 1]],
            [[-0.03, 0.03, 0], [2.8, -2.9, 1], [-2.1, 2.0, 1]],
            [[3.0, -3.0, 1], [0.02, -0.02, 0], [-2.0, 2.0, 1]],
        ),
    ],
    ids=["1 class", "2 classes", "3 classes"],
)
def test_few_classes_are_judged_by_the_size_of_the_error(
    bundle: Bundle,
    expected: list[list[float]],
    rounded: list[list[float]],
    garbage: list[list[float]],
) -> None:
    few = golden_of(bundle, np.array(expected, np.float32))
    check_golden(few, lambda _: np.array(rounded, np.float32), where="here", precision="int8")
    with pytest.raises(ProviderError):
        check_golden(few, lambda _: np.array(garbage, np.float32), where="here", precision="int8")


def test_probabilities_that_are_0_and_1_at_any_precision_are_no_proof_of_fp32(
    bundle: Bundle,
) -> None:
    sure = golden_of(bundle, np.array([[1, 0], [0, 1]], np.float32))
    meta = sure.meta.model_copy(update={"activation": "none"})
    found_NK = np.array([[1 - 1e-7, 1e-7], [1e-7, 1 - 1e-7]], np.float32)
    check_golden(Bundle(sure.folder, meta), lambda _: found_NK, where="here", precision="fp16")


def test_a_session_may_round_more_than_its_precision_where_that_is_said(bundle: Bundle) -> None:
    check_golden(bundle, noisy(3e-2), where="here", rounding="fp16")
    check_golden(bundle, classify, where="here", rounding="fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_scores_that_are_all_higher_are_refused_where_a_sigmoid_follows(
    bundle: Bundle, precision: Precision
) -> None:
    """A softmax does not see it, a sigmoid makes another score of it."""

    def shifted(pixels_NHWC: Pixels) -> Scores:
        return classify(pixels_NHWC) + np.float32(8)

    check_golden(bundle, shifted, where="here", precision=precision)
    meta = bundle.meta.model_copy(update={"activation": "sigmoid"})
    with pytest.raises(ProviderError, match="gives other answers"):
        check_golden(Bundle(bundle.folder, meta), shifted, where="here", precision=precision)


def test_a_model_that_gives_every_class_the_same_score_passes(bundle: Bundle) -> None:
    def constant(pixels_NHWC: Pixels) -> Scores:
        return np.zeros((len(pixels_NHWC), NUM_CLASSES), np.float32)

    meta = bundle.meta.model_copy(
        update={"golden_sha256": write_golden(bundle.folder, constant, PIXELS_NHWC)}
    )
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    for precision in precisions:
        check_golden(Bundle(bundle.folder, meta), constant, where="here", precision=precision)


def test_a_cached_model_that_was_swapped_is_found_before_the_first_record(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    """Its digest is right, as after a cache was filled wrongly; only its answers tell."""
    cache = tmp_path / "cache"
    env = {**os.environ, "BATCHCLF_CACHE_DIR": str(cache)}
    job = write_tiny_job(tmp_path)
    assert batchclf("run", job, "--limit", "2", env=env).exit_code == 0
    (found,) = (cache / "bundles").glob("*/model.json")
    other = tmp_path / "other"
    other.mkdir()
    write_classifier(other / "other.onnx", seed=1)
    other_job = write_tiny_job(other, name="other.yaml")
    shutil.copyfile(other / "other.onnx", other / "tiny.onnx")
    exported = tmp_path / "exported"
    assert batchclf("export", other_job, exported, env=env).exit_code == 0
    shutil.copyfile(exported / "model.onnx", found.parent / "model.onnx")
    meta = json.loads(found.read_bytes())
    meta["files"]["model.onnx"] = sha256_of(exported / "model.onnx")
    found.write_text(json.dumps(meta))
    done = batchclf("run", job, "-o", tmp_path / "again", env=env)
    assert done.exit_code == 4, done.stderr
    assert "gives other answers than its source" in done.stderr
    assert not (tmp_path / "again" / "predictions.jsonl").exists()


def _npy_of(num_bytes: int) -> bytes:
    """The beginning of an .npy file that says it holds so many bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (num_bytes,)}
    )
    return header.getvalue()


def _zipped(path: Path, *parts: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("pixels_NHWC.npy", "w", force_zip64=True) as member:
            for part in parts:
                member.write(part)
        archive.writestr("scores_NK.npy", b"")


HOSTILE: dict[str, Callable[[Path], object]] = {
    "no archive": lambda path: path.write_bytes(b"golden"),
    "other arrays": lambda path: np.savez(path, a=np.zeros(3)),
    "objects": lambda path: np.savez(
        path, pixels_NHWC=np.array([{}], object), scores_NK=np.zeros((1, 2))
    ),
    "another size": lambda path: np.savez(
        path, pixels_NHWC=np.zeros((1, 9, 8, 3), np.uint8), scores_NK=np.zeros((1, 2))
    ),
    "errors of more images": lambda path: np.savez(
        path,
        pixels_NHWC=np.zeros((1, 8, 8, 3), np.uint8),
        scores_NK=np.zeros((1, 2)),
        bf16_error_N=np.zeros(2),
    ),
    "a size that is not there": lambda path: _zipped(path, _npy_of(10**13)),
    "a bomb": lambda path: _zipped(path, *[bytes(10**6)] * 1001),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_reference_answers_that_are_none_are_refused(bundle: Bundle, kind: str) -> None:
    HOSTILE[kind](bundle.folder / GOLDEN_FILE)
    with pytest.raises(ModelError, match=r"golden\.npz: holds no reference answers"):
        read_golden(bundle)
