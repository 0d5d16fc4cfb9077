"""The guide's models of one's own: each as its library makes it, run as it stands there."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, Batchclf, read_records, write_job

torch = pytest.importorskip("torch")
zoo = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SECTION = (
    (ROOT / "docs" / "models.md")
    .read_text()
    .partition("## Your own model")[2]
    .partition("\n## ")[0]
)
TRAINED, ONNX, TIMM, TRANSFORMERS = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
PHOTOS = sorted((ROOT / "samples" / "photos").iterdir())
FLOWERS = ("daisy", "rose", "tulip", "iris", "poppy")

Answer = Callable[[Image.Image], Any]
"""A library's own scores of a photo, by class."""


@pytest.fixture(autouse=True)
def _same_weights() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def answering(module: Any, prepare: Callable[[Image.Image], Any]) -> Answer:
    module.eval()

    def answer(image: Image.Image) -> Any:
        with torch.inference_mode():
            found = module(prepare(image.convert("RGB")))
        return getattr(found, "logits", found)[0].softmax(0).numpy()

    return answer


def resnet18() -> tuple[Any, Answer]:
    """With 5 classes, as after fine-tuning, and what it answers with torchvision's transforms."""
    module = zoo.resnet18(num_classes=len(FLOWERS))
    transforms = zoo.ResNet18_Weights.DEFAULT.transforms()
    return module, answering(module, lambda image: transforms(image)[None])


def fine_tuned(folder: Path) -> Answer:
    module, answer = resnet18()
    torch.save(module.state_dict(), folder / "flowers.pth")
    return answer


def exported(folder: Path) -> Answer:
    module, answer = resnet18()
    torch.onnx.export(
        module,
        (torch.zeros(2, 3, 224, 224),),
        folder / "flowers.onnx",
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    return answer


def trained_with_timm(folder: Path) -> Answer:
    module = timm.create_model("resnet18", num_classes=len(FLOWERS))
    torch.save({"epoch": 9, "state_dict": module.state_dict()}, folder / "model_best.pth.tar")
    config = timm.data.resolve_model_data_config(module)
    transforms = timm.data.create_transform(**config, is_training=False)
    return answering(module, lambda image: transforms(image)[None])


def trained_with_transformers(folder: Path) -> Answer:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=dict(enumerate(FLOWERS)),
    )
    module = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessor()
    module.save_pretrained(folder / "my-vit")
    processor.save_pretrained(folder / "my-vit")
    return answering(
        module, lambda image: processor(images=image, return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize(
    ("block", "train"),
    [
        (TRAINED, fine_tuned),
        (ONNX, exported),
        (TIMM, trained_with_timm),
        (TRANSFORMERS, trained_with_transformers),
    ],
    ids=["fine-tuned", "ONNX", "timm", "transformers"],
)
def test_a_model_of_ones_own_runs_as_the_guide_says_and_gives_its_librarys_scores(
    block: str, train: Callable[[Path], Answer], batchclf: Batchclf, tmp_path: Path
) -> None:
    answer = train(tmp_path)
    (tmp_path / "flowers.txt").write_text("".join(f"{name}\n" for name in FLOWERS))
    job = write_job(tmp_path, input=str(PHOTOS[0].parent), **yaml.safe_load(block))
    for done in (batchclf("validate", job), batchclf("run", job)):
        assert done.exit_code == 0, done.stderr
    records = read_records(tmp_path / "out")
    assert [record["path"] for record in records] == [path.name for path in PHOTOS]
    for record, path in zip(records, PHOTOS, strict=True):
        found = {one["label"]: one["score"] for one in record["predictions"]}
        expected = answer(Image.open(path))
        assert list(found) == [FLOWERS[index] for index in np.argsort(-expected)]
        assert [found[name] for name in FLOWERS] == pytest.approx(expected.tolist(), abs=1e-3)
