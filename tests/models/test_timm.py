"""timm's models: its own pixels and logits, weights from files and from the hub, clear refusals.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchclf.errors import ModelError, WeightsUnavailable
from batchclf.images.decode import Decoder
from batchclf.models.resolve import check_model
from batchclf.spec.job import ModelSpec, PreprocessSpec
from tests.conftest import ONLY_IN_CI, ROOT, Batchclf, read_records, write_job
from tests.images.common import picture
from tests.models.hub import hub
from tests.models.zoo_common import (
    ask_hub_at,
    assert_same_answers,
    fake_hub_cache,
    photos,
    resolved,
    scores_of,
    written,
)
from tests.tiny import DIGITS

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

from batchclf.models.zoo import build, check  # noqa: E402
from batchclf.models.zoo import timm as ours  # noqa: E402
from tests import sweep  # noqa: E402
from tests.sweep import Row, Swept  # noqa: E402

__all__ = ["fake_hub_cache"]
SWEPT = Swept("timm", "timm/", list, "Some of timm's models", "timm.md")
SWEPT_PAGE = "docs/reference/timm.md"
MAX_EXPORT_S = 60.0
"""As it took when the table was made."""
SMALL = "test_vit"
"""160 x 160 pixels, 0.4 million parameters."""


def named(name: str, **keys: Any) -> Any:
    return build(ModelSpec.model_validate({"name": f"timm/{name}", "weights": "none", **keys}))


def data_config(name: str) -> dict[str, Any]:
    cfg = timm.models.get_pretrained_cfg(name)
    config: dict[str, Any] = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    return config


# ---- pixels --------------------------------------------------------------------------------------


def kinds_of_preprocessing() -> dict[tuple[Any, ...], str]:
    """One pretrained model of each kind of preprocessing that timm has."""
    kinds: dict[tuple[Any, ...], str] = {}
    for name in timm.list_pretrained():
        config = data_config(name)
        kinds.setdefault(tuple(value for key, value in config.items() if key != "std"), name)
    return kinds


def test_the_pixels_of_every_preprocessing_in_timm_are_those_of_its_own_transforms() -> None:
    image = picture(347, 251)
    data = written(image)
    kinds = [name for key, name in kinds_of_preprocessing().items() if "border" not in key]
    assert len(kinds) > 100
    for name in kinds:
        config = data_config(name)
        pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
        preprocess = ours._preprocess(name, pretrained_cfg, None)
        assert preprocess.mean == tuple(config["mean"])
        assert preprocess.std == tuple(config["std"])
        if max(preprocess.crop) > 600:
            continue  # nothing new, and slow
        expected_CHW = timm.data.create_transform(**config, normalize=False)(image)
        found_HWC = np.empty((*preprocess.crop, 3), np.uint8)
        assert Decoder(preprocess)(data, b"x", found_HWC).failure is None
        np.testing.assert_array_equal(found_HWC, np.moveaxis(expected_CHW.numpy(), 0, -1), name)


def test_a_crop_of_the_jobs_own_changes_the_resize_with_it_as_timms_img_size_does() -> None:
    model = named("test_resnet", preprocess={"crop": 96})
    assert model.preprocess.crop == (96, 96)
    config = timm.data.resolve_data_config(
        {"img_size": 96}, pretrained_cfg=timm.models.get_pretrained_cfg("test_resnet").to_dict()
    )
    assert timm.data.create_transform(**config).transforms[0].size == model.preprocess.resize
    fixed = named(SMALL, preprocess={"crop": 96})
    assert fixed.module.pos_embed.shape[1] == 96 // 16 * 96 // 16 + 1


def test_border_padding_is_refused_unless_the_job_says_how_to_resize_instead() -> None:
    name = next(
        name for name in timm.list_pretrained() if data_config(name)["crop_mode"] == "border"
    )
    spec = ModelSpec.model_validate({"name": f"timm/{name}", "weights": "none"})
    with pytest.raises(ModelError, match=r"CenterCropOrPad \(crop_mode: border.*give model\.prep"):
        check(spec)
    given = spec.model_copy(update={"preprocess": PreprocessSpec(resize=70, crop=64)})
    check(given)
    pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
    assert ours._preprocess(name, pretrained_cfg, given.preprocess).resize == 70


# ---- logits --------------------------------------------------------------------------------------

EXPORTED = ("test_vit", "test_convnext", "test_efficientnet", "test_resnet")
SLOWLY = [
    pytest.param(name, marks=ONLY_IN_CI) for name in ("test_byobnet", "test_nfnet", "test_mambaout")
]


@pytest.mark.parametrize("name", [*EXPORTED, *SLOWLY])
def test_photos_get_the_answers_of_timm_with_its_own_transforms(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model(name, num_classes=7).eval()
    weights = tmp_path / "own.safetensors"
    safetensors.save_file(theirs.state_dict(), weights)
    model = resolved(f"timm/{name}", weights=str(weights))
    assert model.labels == tuple("0123456")
    assert model.bundle.meta.source["timm"] == timm.__version__
    config = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**config, is_training=False)
    paths = photos()
    with torch.inference_mode():
        expected_NK = torch.cat(
            [theirs(transform(Image.open(path).convert("RGB"))[None]) for path in paths]
        )
    assert_same_answers(scores_of(model, paths), expected_NK)


def quick_families() -> list[str]:
    """A model of each family that timm.md says matches, but for those that export for long."""
    page = (ROOT / SWEPT_PAGE).read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    return [
        row[1]
        for row in rows
        if len(row) > 12 and row[3].startswith("matches") and float(row[11]) <= MAX_EXPORT_S
    ]


@pytest.mark.parametrize("name", [pytest.param(one, marks=ONLY_IN_CI) for one in quick_families()])
def test_a_model_of_each_family_exports_and_gives_its_own_logits(name: str) -> None:
    model = resolved(f"timm/{name}", weights="none", num_classes=10)
    assert model.bundle.meta.verified_batches == (1, 2, 3, 4)


def test_nearly_all_families_are_among_those_of_the_table() -> None:
    assert len(quick_families()) > 70


def test_attention_is_built_from_what_onnx_has() -> None:
    blocks = [part for part in named(SMALL).module.modules() if hasattr(part, "fused_attn")]
    assert blocks
    assert not any(block.fused_attn for block in blocks)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_from_a_file_are_timms_to_the_bit(tmp_path: Path) -> None:
    state = timm.create_model(SMALL, num_classes=5).state_dict()
    torch.save({"state_dict": state, "epoch": 3, "arch": SMALL}, tmp_path / "own.pth.tar")
    model = named(SMALL, weights=str(tmp_path / "own.pth.tar"))
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert model.labels == tuple("01234")
    with pytest.raises(ModelError, match=r"num_classes: found 9, but the head in .* has 5"):
        named(SMALL, weights=str(tmp_path / "own.pth.tar"), num_classes=9)
    with pytest.raises(ModelError, match=r"does not fit test_resnet: tensors .*another model\?"):
        named("test_resnet", weights=str(tmp_path / "own.pth.tar"))


def test_weights_of_another_image_size_are_refused_with_the_key_that_helps(tmp_path: Path) -> None:
    state = timm.create_model(SMALL, img_size=96).state_dict()
    path = tmp_path / "own.safetensors"
    safetensors.save_file(state, path)
    with pytest.raises(ModelError, match=r"images of another size, give model\.preprocess\.crop"):
        named(SMALL, weights=str(path))
    assert named(SMALL, weights=str(path), preprocess={"crop": 96}).preprocess.crop == (96, 96)


def test_the_random_weights_of_none_are_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    first, second = (named(SMALL, num_classes=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(before, torch.random.get_rng_state())


def test_labels_are_timms_own_names_of_its_classes() -> None:
    config = timm.models.get_pretrained_cfg
    assert ours._labels(config("test_vit.r160_in1k"))[281] == "tabby, tabby cat"
    assert len(ours._labels(config("convnext_tiny.in12k"))) == 11821
    assert ours._labels(config("vit_base_patch16_clip_224.openai")) == ()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "timm/resnet81"}, r"has no model 'resnet81'; did you mean .*timm/resnet"),
        (
            {"name": "timm/hf-hub:me/mine"},
            r"found timm/hf-hub:me/mine, but .*`hf download me/mine`, then give name: timm/ARCHIT",
        ),
        ({"name": "timm/hf-hub:timm/resnet18.a1_in1k"}, r"own: give timm/resnet18\.a1_in1k$"),
        ({"name": "timm/local-dir:mine"}, r"; give name: timm/ARCHITECTURE .*mean, std, interpol"),
        (
            {"name": "timm/resnet18.a1_in2k"},
            r"model\.name: .*'a1_in2k'; did you mean a1",
        ),
        (
            {"name": "timm/resnet18", "weights": "a1"},
            r"model\.weights: .*Known are a1_in1k, a2",
        ),
        (
            {"name": "timm/resnet18.a1_in1k", "weights": "a2_in1k"},
            r"found 'a2_in1k', but model\.name says 'a1_in1k'",
        ),
        ({"name": "timm/vit_base_patch14_dinov2.lvd142m"}, r"have no classes, only features"),
        ({"name": "timm/vit_base_patch16_clip_224.openai"}, r"give 512 numbers without names"),
        ({"name": "timm/vgg11", "num_classes": 10}, r"found 10, but vgg11 has 1000"),
        (
            {"name": f"timm/{SMALL}", "weights": "none", "num_classes": 1},
            r"gives one number per image",
        ),
        ({"name": "timm/resnet18", "transform_input": True}, r"timm's resnet18 has no such option"),
        (
            {"name": f"timm/{SMALL}", "weights": "none", "num_classes": 1},
            rf"timm/{SMALL}: gives one number per image",
        ),
    ],
)
def test_what_timm_has_not_is_refused_with_what_it_has(keys: dict[str, Any], message: str) -> None:
    spec = ModelSpec.model_validate(keys)
    for refuse in (build, check):
        with pytest.raises(ModelError, match=message):
            refuse(spec)


def test_where_timm_is_not_installed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from batchclf.errors import UsageError

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "timm" else found(name)
    )
    with pytest.raises(UsageError, match=r"needs timm: pip install 'batchclf\[export,timm\]'"):
        check_model(ModelSpec(name="timm/resnet18"))


def test_the_page_of_a_sweep_tells_what_was_not_run_from_what_was() -> None:
    rows = {"a": Row("a"), "b": Row("b", error="refused")}
    begun = sweep.page(SWEPT, ["a", "b", "c"], rows, {})
    assert "1 of the 2 models that were run export (the other 1 of 3 were not run) with" in begun
    all_run = sweep.page(SWEPT, ["a", "b"], rows, {})
    assert "1 of 2 models export with a dynamic batch axis" in all_run


def test_a_sweep_keeps_the_rows_of_its_page_that_it_did_not_measure() -> None:
    rows = {name: Row(name, crop=64, spread=0.5) for name in ("a", "b", "b (as built)")}
    before = sweep.page(SWEPT, ["a", "b", "c"], rows, {})
    kept = sweep.kept_lines(SWEPT, before)
    assert sorted(kept) == sorted(rows), "what was not run is not kept"
    assert sweep.page(SWEPT, ["a", "b", "c"], {}, kept) == before
    after = sweep.page(SWEPT, ["a", "b", "c"], {"b": Row("b", error="refused")}, kept)
    assert "1 of the 2 models that were run export (the other 1 of 3" in after
    assert "| b |  | refused |" in after
    with pytest.raises(ValueError, match=r"not made with torch .*; measure all models anew"):
        sweep.kept_lines(SWEPT, before.replace("onnx ", "onnx 0"))


def test_the_page_of_timms_models_and_the_readme_give_the_counts_of_its_table() -> None:
    kept = (ROOT / SWEPT_PAGE).read_text()
    rows = [line.split(" | ") for line in kept.splitlines() if line.startswith("| ")][1:]
    families = [cells for cells in rows if not cells[0].endswith(sweep.AS_BUILT)]
    accepted = sum(cells[2].startswith(sweep.MATCHES) for cells in families)
    assert re.search(rf"^{accepted} of (the )?\d+ models ", kept, re.M)
    readme = (ROOT / "README.md").read_text()
    assert f"[{accepted} of its {len(families)} families](docs/reference/timm.md)" in readme


# ---- the download --------------------------------------------------------------------------------


def test_a_run_downloads_timms_weights_from_the_hub_once(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model(SMALL).eval()
    folder = tmp_path / "repository"
    folder.mkdir()
    safetensors.save_file(theirs.state_dict(), folder / "model.safetensors")
    model = {"name": f"timm/{SMALL}.r160_in1k"}
    job = write_job(tmp_path, model=model)
    with hub({f"timm/{SMALL}.r160_in1k": folder}) as (url, asked):
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        done = batchclf("run", job, "--limit", "3", "--json", env=env)
    assert done.exit_code == 0, done.stderr
    assert sum(line.startswith("GET /timm") for line in asked) == 1, asked
    record = read_records(tmp_path / "out")[0]
    label = record["predictions"][0]["label"]
    assert label in timm.data.ImageNetInfo().label_descriptions()
    with Image.open(DIGITS / record["path"]) as image:
        config = timm.data.resolve_model_data_config(theirs)
        pixels_NCHW = timm.data.create_transform(**config)(image.convert("RGB"))[None]
    with torch.inference_mode():
        scores_K = theirs(pixels_NCHW).softmax(1)[0]
    assert record["predictions"][0]["index"] == int(scores_K.argmax())
    assert record["predictions"][0]["score"] == pytest.approx(float(scores_K.max()), abs=1e-5)


def test_a_hub_that_does_not_answer_ends_the_run_with_what_to_do(
    fake_hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_hub_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(WeightsUnavailable, match=r"(?s)test_vit.* downloaded.*HF_ENDPOINT"):
        build(ModelSpec(name=f"timm/{SMALL}"))


def test_a_repository_without_weights_is_refused(
    fake_hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    with hub({f"timm/{SMALL}.r160_in1k": tmp_path / "none"}) as (url, _):
        ask_hub_at(url, monkeypatch)
        with pytest.raises(ModelError, match=r"has no model\.safetensors and pytorch_model\.bin"):
            build(ModelSpec(name=f"timm/{SMALL}"))


def test_damaged_weights_from_the_hub_are_refused(
    fake_hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"<html>" * 100)
    with hub({f"timm/{SMALL}.r160_in1k": folder}) as (url, _):
        ask_hub_at(url, monkeypatch)
        with pytest.raises(WeightsUnavailable, match=r"(?s)cannot be loaded: .*delete a damaged"):
            build(ModelSpec(name=f"timm/{SMALL}"))
