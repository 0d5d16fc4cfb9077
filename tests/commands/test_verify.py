"""`batchclf verify`: the job's provider beside PyTorch and native OpenVINO."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batchclf.models.bundle import sha256_of
from batchclf.runtime.providers import installed_flavours
from tests.conftest import Batchclf, write_job
from tests.tiny import tiny_model, write_tiny_job

HERE = "openvino" if "onnxruntime-openvino" in installed_flavours() else "cpu"
"""The provider that the environment of these tests is for."""
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
BACKEND_KEYS = {
    *("name", "device", "precision", "latencies", "images_per_s", "largest_logit_difference"),
    *("is_close", "top1_agreement", "top5_agreement", "agrees"),
}


def names(found: dict[str, Any]) -> list[str]:
    return [one["name"] for one in found["backends"]]


def test_the_sample_job_agrees_with_pytorch_and_openvino(batchclf: Batchclf) -> None:
    done = batchclf("verify", "jobs/sample.yaml", "--provider", HERE, "-n", "8", "--json")
    assert done.exit_code == 0, done.stderr
    found = done.json
    assert (found["num_images"], found["batch_size"]) == (8, 8)
    assert found["reference"] == "PyTorch eager"
    assert found["tolerances"]["tight"] == {"rtol": 1e-5, "atol": 1e-4}
    assert names(found)[:2] == [
        "PyTorch eager",
        f"ONNX Runtime {'OpenVINO' if HERE == 'openvino' else 'CPU'}",
    ]
    if HAS_OPENVINO:
        assert names(found)[2].startswith("native OpenVINO 20")
    else:
        assert "pip install openvino" in found["left_out"]["native OpenVINO"]
    for one in found["backends"]:
        assert set(one) == BACKEND_KEYS
        assert [latency["batch_size"] for latency in one["latencies"]] == [1, 8]
        assert all(0 < each["median_ms"] <= each["p95_ms"] for each in one["latencies"])
        assert one["images_per_s"] > 0
        assert one["is_close"]["promised"]
        assert (one["top1_agreement"], one["top5_agreement"], one["agrees"]) == (1, 1, True)
    assert found["agree"]


def test_people_get_a_table_on_stdout(batchclf: Batchclf) -> None:
    done = batchclf("verify", "jobs/sample.yaml", "--provider", HERE, "-n", "4")
    assert done.exit_code == 0, done.stderr
    first, header, *rows = done.stdout.splitlines()
    assert first == "shufflenet_v2_x0_5 on 4 images; reference: PyTorch eager"
    assert "batch 1: ms (p95)" in header
    assert "batch 4: ms (p95)" in header
    assert rows[0].startswith("PyTorch eager (CPU)")
    assert rows[-1] == "they agree"


@pytest.fixture
def other_weights_in_the_cache(batchclf: Batchclf, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A job whose cached model was made of other weights, and the environment with that cache."""
    env = {"BATCHCLF_CACHE_DIR": str(tmp_path / "cache")}
    common = {"weights": "none", "num_classes": 10, "preprocess": {"resize": 64, "crop": 64}}
    other = write_job(tmp_path, model={"name": "squeezenet1_0", **common})
    assert batchclf("export", other, tmp_path / "other", env=env).exit_code == 0
    job = write_job(tmp_path, model={"name": "squeezenet1_1", **common})
    assert batchclf("export", job, tmp_path / "own", env=env).exit_code == 0
    digest = sha256_of(tmp_path / "own" / "model.onnx")
    (found,) = (
        path
        for path in (tmp_path / "cache" / "bundles").glob("*/model.json")
        if json.loads(path.read_bytes())["files"]["model.onnx"] == digest
    )
    for name in ("model.onnx", "golden.npz"):
        shutil.copyfile(tmp_path / "other" / name, found.parent / name)
    meta = json.loads((tmp_path / "other" / "model.json").read_bytes())
    found.write_text(json.dumps({**meta, "name": "squeezenet1_1"}))
    return job, {**os.environ, **env}


def test_answers_that_differ_from_pytorchs_end_with_1(
    batchclf: Batchclf, other_weights_in_the_cache: tuple[Path, dict[str, str]]
) -> None:
    job, env = other_weights_in_the_cache
    done = batchclf("verify", job, "-n", "3", "--json", env=env)
    assert done.exit_code == 1
    eager, own = done.json["backends"][:2]
    assert eager["agrees"]
    assert not own["agrees"]
    assert not done.json["agree"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_that_is_not_torchvisions_is_compared_with_fp32_on_the_cpu(
    batchclf: Batchclf, tmp_path: Path, precision: str
) -> None:
    job = write_tiny_job(tmp_path, provider=HERE, precision=precision, min_agreement=0.5)
    done = batchclf("verify", job, "-n", "5", "-b", "2", "--json")
    if not HAS_OPENVINO and (HERE, precision) == ("cpu", "fp32"):
        assert done.exit_code == 2
        assert "there is nothing to compare ONNX Runtime CPU with" in done.json["error"]
        return
    assert done.exit_code == 0, done.stderr
    assert done.json["reference"] == "ONNX Runtime CPU"
    assert done.json["backends"][0]["precision"] == "fp32"
    assert len(done.json["backends"]) >= 2
    own = next(one for one in done.json["backends"] if one["precision"] == precision)
    assert own["agrees"]
    if precision == "int8":
        assert own["largest_logit_difference"] > 0
    assert "an ONNX file" in done.json["left_out"]["PyTorch eager"]
    assert done.json["batch_size"] == 2


def test_scores_that_are_nan_are_no_number_in_the_json(batchclf: Batchclf, tmp_path: Path) -> None:
    black = tmp_path / "black"
    black.mkdir()
    Image.new("RGB", (8, 8)).save(black / "1.png")
    (tmp_path / "dark").mkdir()
    model = tiny_model(tmp_path / "dark", nan_when_dark=True)
    job = write_tiny_job(tmp_path, model=model, input=str(black), provider=HERE)
    done = batchclf("verify", job, "--json")
    if len(done.json.get("backends", ())) < 2:
        pytest.skip("nothing to compare with here")
    assert done.exit_code == 1, done.stderr
    assert done.json["backends"][0]["largest_logit_difference"] is None
    assert "NaN" in batchclf("verify", job).stdout


def test_the_native_program_is_given_images_that_do_not_fill_its_batches(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    if not HAS_OPENVINO:
        pytest.skip("the package openvino is not installed here")
    done = batchclf("verify", write_tiny_job(tmp_path), "-n", "7", "-b", "3", "--json")
    assert done.exit_code == 0, done.stderr
    native = done.json["backends"][-1]
    assert native["name"].startswith("native OpenVINO")
    assert native["agrees"]


def test_a_job_without_images_is_refused(batchclf: Batchclf, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = batchclf("verify", write_tiny_job(tmp_path, input=str(tmp_path / "empty")), "--json")
    assert done.exit_code == 2
    assert "found 0 images" in done.json["error"]
