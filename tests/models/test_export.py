"""torchvision models as ONNX: PyTorch's answers at any batch size, or no model.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from batchclf.errors import ModelError
from batchclf.images.decode import Decoder
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.results.records import Preprocess
from batchclf.runtime.classifier import open_classifier, open_reference
from batchclf.spec.job import ModelSpec, PreprocessSpec
from tests.conftest import (
    BY_HAND,
    DIGITS_MODEL,
    MOBILENET_WEIGHTS,
    ONLY_IN_CI,
    PHOTOS,
    ROOT,
    Batchclf,
    data,
    write_job,
)
from tests.tiny import CPU

torch = pytest.importorskip("torch")
zoo = pytest.importorskip("torchvision.models")
functional = pytest.importorskip("torchvision.transforms.functional")

from batchclf.models import export  # noqa: E402
from batchclf.models.zoo import torchvision  # noqa: E402

Array = NDArray[Any]

QUICK = ("alexnet", "resnet18", "squeezenet1_1")
SLOW = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
)


def pytorch_logits(model: export.BuiltModel, pixels_NHWC: Array) -> Array:
    """What PyTorch gives for each image alone, after torchvision's own `Normalize`."""
    rows = []
    with torch.inference_mode():
        for pixels_HWC in pixels_NHWC:
            image_CHW = functional.to_tensor(pixels_HWC)
            image_CHW = functional.normalize(
                image_CHW, list(model.preprocess.mean or ()), list(model.preprocess.std or ())
            )
            rows.append(model.module(image_CHW[None])[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=ONLY_IN_CI) for name in SLOW)])
def test_a_model_of_each_family_gives_pytorchs_logits_at_any_batch_size(
    tmp_path: Path, name: str
) -> None:
    model = torchvision.build(ModelSpec(name=name, weights="none", num_classes=10))
    checked = export.export_model(model, tmp_path, batch_size=4, open_reference=open_reference)
    assert checked == (1, 2, 3, 4)
    assert os.listdir(tmp_path) == ["model.onnx"]
    height, width = model.preprocess.crop
    pixels_NHWC = np.random.default_rng(1).integers(0, 256, (9, height, width, 3), np.uint8)
    pixels_NHWC[::2] //= 3
    expected_NK = pytorch_logits(model, pixels_NHWC)
    classify = open_classifier(tmp_path / "model.onnx", CPU)
    scale = float(np.abs(expected_NK).max())
    spread = float(np.ptp(expected_NK, axis=0).max())
    for size in (1, 5, 9):
        found_NK = classify(pixels_NHWC[:size])
        error = float(np.abs(found_NK - expected_NK[:size]).max())
        assert error <= 1e-3 * scale
        assert error <= 0.02 * spread, "too far off to tell images apart"


# ---- real weights --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobilenet() -> ResolvedModel:
    spec = {"name": "mobilenet_v2", "weights": str(data(MOBILENET_WEIGHTS)), "labels": "imagenet"}
    return resolve_model(
        ModelSpec.model_validate(spec), batch_size=16, open_reference=open_reference, log=print
    )


def test_real_mobilenet_agrees_with_pytorch_on_250_photos(mobilenet: ResolvedModel) -> None:
    """From file to logits: our decoder and ONNX Runtime, against PIL, torchvision and PyTorch."""
    paths = sorted(data(PHOTOS).glob("*.JPEG"))
    assert len(paths) == 250
    module = zoo.mobilenet_v2()
    module.load_state_dict(torch.load(MOBILENET_WEIGHTS, weights_only=True))
    module.eval()
    transforms = zoo.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    expected_NK = []
    with torch.inference_mode():
        for path in paths:
            with Image.open(path) as image:
                expected_NK.append(module(transforms(image.convert("RGB"))[None])[0].numpy())
    decode = Decoder(mobilenet.preprocess)
    pixels_NHWC = np.zeros((len(paths), 224, 224, 3), np.uint8)
    for path, slot_HWC in zip(paths, pixels_NHWC, strict=True):
        assert decode(path.read_bytes(), path.name.encode(), slot_HWC).failure is None
    classify = open_classifier(mobilenet.bundle.model_path, CPU)
    found_NK = np.concatenate(
        [classify(pixels_NHWC[start : start + 7]) for start in range(0, len(paths), 7)]
    )
    np.testing.assert_allclose(found_NK, np.stack(expected_NK), rtol=1e-3, atol=1e-4)
    assert (found_NK.argmax(1) == np.stack(expected_NK).argmax(1)).sum() == 250


def test_labels_and_preprocessing_come_with_the_weights(mobilenet: ResolvedModel) -> None:
    assert mobilenet.bundle.meta.activation == "softmax"
    assert mobilenet.bundle.meta.fixed_batch is None
    assert mobilenet.bundle.meta.source["weights"] == MOBILENET_WEIGHTS.name
    assert mobilenet.preprocess.crop == (224, 224)
    assert (mobilenet.preprocess.resize, mobilenet.preprocess.interpolation) == (256, "bilinear")


def test_an_exported_model_holds_no_path_of_the_machine_that_exported_it(
    mobilenet: ResolvedModel,
) -> None:
    """Else the same model has another digest elsewhere, and no job could be resumed there."""
    content = mobilenet.bundle.model_path.read_bytes()
    for path in (ROOT, Path(torch.__file__).parent.parent):
        assert os.fsencode(path) not in content
    assert b".py" not in content


@BY_HAND
def test_the_same_model_exported_twice_has_the_same_digest(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    """Else a job could not be resumed after the cache was emptied."""
    digests = []
    for number, cache in enumerate((os.environ["BATCHCLF_CACHE_DIR"], str(tmp_path / "cache"))):
        job = write_job(tmp_path, output=str(tmp_path / f"out {number}"), model=DIGITS_MODEL)
        done = batchclf("run", job, "--limit", "2", env={"BATCHCLF_CACHE_DIR": cache})
        assert done.exit_code == 0, done.stderr
        run = json.loads((tmp_path / f"out {number}" / "run.json").read_bytes())
        digests.append(run["fingerprint"]["model"])
    assert digests[0] == digests[1]


def test_every_weights_transforms_are_taken_over() -> None:
    for name in zoo.list_models(module=zoo):
        for member in zoo.get_model_weights(name):
            preset = member.transforms()
            found = torchvision._preprocess(member, None)
            assert len(preset.resize_size) == len(preset.crop_size) == 1
            assert found.resize == preset.resize_size[0]
            assert found.crop == (preset.crop_size[0],) * 2
            assert found.interpolation == preset.interpolation.value
            assert found.mean == tuple(preset.mean)
            assert found.std == tuple(preset.std)


def test_each_part_of_the_preprocessing_can_be_replaced_alone() -> None:
    member = zoo.ResNet18_Weights.IMAGENET1K_V1
    default = torchvision._preprocess(member, None)
    for key, value, expected in (
        ("resize", 300, 300),
        ("resize", (300, 200), (300, 200)),
        ("crop", 64, (64, 64)),
        ("crop", (64, 32), (64, 32)),
        ("mean", (0.1, 0.2, 0.3), (0.1, 0.2, 0.3)),
        ("std", (0.1, 0.2, 0.3), (0.1, 0.2, 0.3)),
        ("interpolation", "bicubic", "bicubic"),
    ):
        found = torchvision._preprocess(member, PreprocessSpec.model_validate({key: value}))
        assert getattr(found, key) == expected
        for other in {"resize", "crop", "mean", "std", "interpolation"} - {key}:
            assert getattr(found, other) == getattr(default, other)


# ---- what is refused -----------------------------------------------------------------------------


def untrained(name: str, crop: int) -> export.BuiltModel:
    preprocess = PreprocessSpec(crop=crop)
    return torchvision.build(
        ModelSpec(name=name, weights="none", num_classes=3, preprocess=preprocess)
    )


def small_model() -> export.BuiltModel:
    return untrained("squeezenet1_1", 64)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda NK: NK + 0.1, "batch of 1: gives other answers", id="shifted"),
        pytest.param(lambda NK: NK * np.nan, "batch of 1: gives other", id="NaN"),
        pytest.param(
            lambda NK: NK if len(NK) != 3 else NK[::-1], "batch of 3: gives", id="batch of 3 turned"
        ),
        pytest.param(
            lambda NK: NK if len(NK) != 6 else NK[:1].repeat(6, 0),
            "batch of 6",
            id="first repeated",
        ),
        pytest.param(lambda NK: NK[:2], "batch of 3: gives scores of shape", id="baked batch of 2"),
    ],
)
def test_an_export_that_answers_otherwise_at_any_size_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Array], Array],
    message: str,
) -> None:
    model = small_model()
    monkeypatch.setattr(export, "_export", lambda *arguments, **options: None)

    def open_spoilt(path: Path, output: str | None = None) -> Callable[[Array], Array]:
        return lambda pixels_NHWC: spoil(pytorch_logits(model, pixels_NHWC))

    with pytest.raises(ModelError, match=message):
        export.export_model(model, tmp_path, batch_size=6, open_reference=open_spoilt)


class ClampedTwice(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Both clamps take one tensor: the exporter gives their bounds the same names."""

    def forward(self, pixels_NCHW: Any) -> Any:
        means_NK = pixels_NCHW.mean((2, 3)) * 2
        half = means_NK.maximum(torch.tensor(-0.5)).minimum(torch.tensor(0.5))
        return half + 2 * means_NK.maximum(torch.tensor(-0.25)).minimum(torch.tensor(0.75))


def test_a_tensor_that_is_clamped_twice_keeps_the_bounds_of_both(tmp_path: Path) -> None:
    preprocess = Preprocess(16, (16, 16), "bilinear", (0.5,) * 3, (0.25,) * 3)
    model = export.BuiltModel(ClampedTwice().eval(), preprocess, ("a", "b", "c"))
    checked = export.export_model(model, tmp_path, batch_size=4, open_reference=open_reference)
    assert checked == (1, 2, 3, 4)


@pytest.mark.parametrize(("name", "crop"), [("vit_b_32", 100), ("inception_v3", 32)])
def test_a_crop_that_the_model_does_not_take_is_refused_by_its_key(name: str, crop: int) -> None:
    with pytest.raises(
        ModelError, match=rf"{name} does not take {crop} x {crop} pixels \(model\.p"
    ):
        untrained(name, crop)


def test_a_crop_that_pretrained_weights_do_not_take_is_refused_by_its_key(tmp_path: Path) -> None:
    model = small_model()
    tiny = export.BuiltModel(
        model.module,
        torchvision._preprocess(zoo.SqueezeNet1_1_Weights.DEFAULT, PreprocessSpec(crop=8)),
        model.labels,
    )
    with pytest.raises(ModelError, match=r"does not take 8 x 8 pixels \(model\.preprocess\.crop\)"):
        export.export_model(tiny, tmp_path, batch_size=2, open_reference=open_reference)


def test_torch_and_torchvision_that_do_not_match_are_named_with_the_mending_command(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    shadow = tmp_path / "shadow" / "torchvision"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    environment = {
        "PYTHONPATH": str(tmp_path / "shadow"),
        "BATCHCLF_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = batchclf("run", write_job(tmp_path), "--json", env=environment)
    assert done.exit_code == 2
    assert "cannot be imported together: operator torchvision::nms" in done.json["error"]
    assert "pip install --force-reinstall 'batchclf[export]'" in done.json["error"]
    assert "Traceback" not in done.stderr
