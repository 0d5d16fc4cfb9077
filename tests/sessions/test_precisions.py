"""Each precision on real photos, through the real command: the classes are PyTorch's.

The environment decides which provider is tested; across the environments all of them are.
"""

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchclf import load_job
from batchclf.errors import PrecisionRefused, ProviderError
from batchclf.models.checks import Run
from batchclf.models.resolve import resolve_model
from batchclf.results.records import Pixels, PrecisionCheck, Scores
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.openvino import require_cpu_precision
from batchclf.runtime.providers import installed_flavours, require_provider
from batchclf.sessions import open as sessions
from batchclf.sessions.kept import remembered
from batchclf.sessions.precision import (
    BUDGET_S,
    Speed,
    compare_precisions,
    measure_speed,
    require_agreement,
)
from batchclf.sessions.sample import sample_input
from batchclf.spec.job import JobSpec
from batchclf.system.machine import cpu_name_and_flags
from tests.conftest import DATA, MOBILENET_WEIGHTS, PHOTOS, Batchclf, data, read_records, write_job
from tests.tiny import DIGITS, write_tiny_job

HAS_OPENVINO = "onnxruntime-openvino" in installed_flavours()
HERE = "openvino" if HAS_OPENVINO else "cpu"
LEAST_AGREEMENT = {
    ("cpu", "fp32"): 1.0,
    ("openvino", "fp32"): 1.0,
    ("openvino", "bf16"): 0.975,
    ("openvino", "int8"): 0.97,
    ("cpu", "int8"): 0.96,
    ("cuda", "fp32"): 1.0,
    ("cuda", "fp16"): 0.99,
}
"""Share of 250 photos whose top class must be PyTorch's."""
CASES = [case for case in LEAST_AGREEMENT if case[0] in ("cuda", HERE)]
"""GPUs are looked for in every environment, which says why there is none."""
MODEL = {"name": "mobilenet_v2", "weights": str(MOBILENET_WEIGHTS), "labels": "imagenet"}


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """PyTorch's top class of each photo, with torchvision's own transforms."""
    import torch
    from PIL import Image
    from torchvision import models as zoo

    module = zoo.mobilenet_v2()
    module.load_state_dict(torch.load(data(MOBILENET_WEIGHTS), weights_only=True))
    module.eval()
    transforms = zoo.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    found = []
    with torch.inference_mode():
        for path in sorted(data(PHOTOS).glob("*.JPEG")):
            with Image.open(path) as image:
                found.append(int(module(transforms(image.convert("RGB"))[None]).argmax()))
    return found


@pytest.fixture(scope="module")
def truth() -> list[int]:
    """The true class of each photo."""
    with data(DATA / "labels" / "imagenet_samples_truth.csv").open() as file:
        rows = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    return [rows[path.name] for path in sorted(PHOTOS.glob("*.JPEG"))]


def require_possible(provider: str, precision: Any) -> None:
    try:
        if provider == "openvino":
            require_cpu_precision("CPU", precision, cpu_name_and_flags()[1])
        elif provider == "cuda":
            require_provider("cuda")
            from batchclf.runtime.cuda_machine import require_cuda

            require_cuda([0])
    except ProviderError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("provider", "precision"), CASES)
def test_the_classes_of_250_photos_are_pytorchs_and_the_run_says_how_often(
    batchclf: Batchclf,
    tmp_path: Path,
    expected: list[int],
    truth: list[int],
    provider: str,
    precision: str,
) -> None:
    require_possible(provider, precision)
    job = write_job(
        tmp_path, input=str(PHOTOS), model=MODEL, provider=provider, precision=precision
    )
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0, done.stderr
    found = [record["predictions"][0]["index"] for record in read_records(tmp_path / "out")]
    agreement = sum(map(int.__eq__, found, expected)) / len(expected)
    accuracy, full_accuracy = (
        sum(map(int.__eq__, rows, truth)) / len(truth) for rows in (found, expected)
    )
    assert len(found) == 250
    assert agreement >= LEAST_AGREEMENT[provider, precision]
    assert accuracy >= full_accuracy - 0.01
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert done.json["provider"]["active"].lower().startswith(provider)
    if precision == "fp32":
        assert run["precision_check"] is None
        return
    check = run["precision_check"]
    assert check == done.json["precision_check"]
    assert check["num_images"] == 200
    assert check["top1_agreement"] == pytest.approx(agreement, abs=0.03)
    assert 0 < check["max_score_difference"] < 0.6
    assert check["speed"] > 0.1
    assert f"same top class on {check['top1_agreement']:.1%}" in done.stderr


# ---- int8, on models of a moment -----------------------------------------------------------------


@pytest.mark.parametrize("provider", [HERE])
def test_an_int8_job_converts_its_model_once_and_resumes(
    batchclf: Batchclf, tmp_path: Path, provider: str
) -> None:
    # A copy: whoever makes links of a file changes it.
    digits = shutil.copytree(DIGITS, tmp_path / "digits")
    job = write_job(tmp_path, input=str(digits), provider=provider, precision="int8")
    env = {"BATCHCLF_CACHE_DIR": str(tmp_path / "cache")}
    first = batchclf("run", job, "--json", env=env)
    assert first.exit_code == 0, first.stderr
    assert "quantising shufflenet_v2_x0_5 to int8, calibrated on 100" in first.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert run["converted_model"]["num_calibration_images"] == 100
    assert run["converted_model"]["digest"] != run["fingerprint"]["model"]
    again = batchclf("run", job, "--json", env=env)
    assert again.exit_code == 0, again.stderr
    assert again.json["was_complete"]
    other = batchclf("run", job, "-o", tmp_path / "other", "--json", env=env)
    assert "quantising" not in other.stderr
    assert read_records(tmp_path / "other") == read_records(tmp_path / "out")
    full = batchclf("run", job, "--precision", "fp32", env=env)
    assert full.exit_code == 2
    assert "precision: was 'int8', is 'fp32'" in full.stderr


def test_too_little_agreement_stops_the_job_with_5_and_says_how_much_there_was(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    """A network of random weights tells images apart by a hair, which int8 does not keep."""
    model = {
        "name": "mobilenet_v3_small",
        "weights": "none",
        "preprocess": {"resize": 64, "crop": 64},
    }
    job = write_job(tmp_path, model=model, precision="int8", min_agreement=1)
    done = batchclf("run", job, "--json")
    assert done.exit_code == 5, done.stderr
    assert "at int8 the top class is that of fp32 on only" in done.json["error"]
    assert "min_agreement is 100.0%" in done.json["error"]
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    allowed = batchclf("run", job, "--json", "--set", "min_agreement=0")
    assert allowed.exit_code == 0, allowed.stderr
    assert allowed.json["precision_check"]["top1_agreement"] < 1


def test_an_exported_int8_bundle_is_run_as_it_is(batchclf: Batchclf, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    job = write_job(tmp_path, precision="int8")
    assert batchclf("export", job, bundle).exit_code == 0
    assert (bundle / "int8" / "model.onnx").exists()
    assert (bundle / "model.onnx").exists()
    done = batchclf(
        *("run", write_job(tmp_path, precision="int8", model={"bundle": str(bundle)}), "--json"),
        env={"BATCHCLF_CACHE_DIR": str(tmp_path / "empty")},
    )
    assert done.exit_code == 0, done.stderr
    assert "quantising" not in done.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert run["fingerprint"]["converted"] == run["converted_model"]["digest"]
    assert not (tmp_path / "empty" / "bundles").exists()


def test_an_int8_model_of_another_model_is_refused(batchclf: Batchclf, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert batchclf("export", write_job(tmp_path, precision="int8"), bundle).exit_code == 0
    meta = json.loads((bundle / "int8" / "model.json").read_bytes())
    meta["source"]["base"] = "0" * 64
    (bundle / "int8" / "model.json").write_text(json.dumps(meta))
    job = write_job(tmp_path, precision="int8", model={"bundle": str(bundle)})
    done = batchclf("run", job)
    assert done.exit_code == 2
    assert "was made from another model" in done.stderr


def test_images_that_do_not_decode_are_left_out_of_the_sample(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((Path(__file__).parents[2] / "samples/photos").iterdir())):
        (images / f"{number}.jpg").write_bytes(path.read_bytes() if number % 2 else b"\xff\xd8")
    done = batchclf("run", write_job(tmp_path, input=str(images), precision="int8"), "--json")
    assert done.exit_code in (0, 5), done.stderr  # three photos are few to agree on
    assert "compared with fp32 on 3 of the job's images" in done.stderr


def test_a_sample_of_which_nothing_decodes_ends_with_2(batchclf: Batchclf, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "1.jpg").write_bytes(b"\xff\xd8")
    done = batchclf("run", write_job(tmp_path, input=str(images), precision="int8"))
    assert done.exit_code == 2
    assert "not one of the 1 images sampled can be decoded" in done.stderr


def test_too_little_agreement_of_tf32_names_the_option_that_asked_for_it() -> None:
    keys = {"input": "in", "output": "out", "model": {"name": "resnet18"}, "min_agreement": 1}
    with pytest.raises(PrecisionRefused, match=r"at TF32 .*leave options: \{use_tf32: 1\} out"):
        require_agreement(PrecisionCheck(5, 0.4, 0.0), JobSpec.model_validate(keys))


def test_images_with_answers_that_are_no_numbers_do_not_agree() -> None:
    """The first class is the top one of a row of NaN, in both."""
    full_NK = np.array([[2.0, 1.0], [2.0, 1.0], [np.nan, np.nan], [np.nan, 1.0], [0.0, 1.0]])
    reduced_NK = full_NK.copy()
    reduced_NK[1] = np.nan
    sample_NHWC = np.zeros((5, 4, 4, 3), np.uint8)
    sample_NHWC[:, 0, 0, 0] = range(5)

    def answers(scores_NK: Scores) -> Callable[[Pixels], Scores]:
        return lambda pixels_NHWC: scores_NK[pixels_NHWC[:, 0, 0, 0]].astype(np.float32)

    check = compare_precisions(
        answers(reduced_NK), answers(full_NK), sample_NHWC, 2, activation="softmax"
    )
    assert check == PrecisionCheck(5, 0.4, 0.0)


def test_what_was_measured_once_is_measured_anew_for_another_key_only(tmp_path: Path) -> None:
    numbers = iter(range(1, 10))

    def compare() -> PrecisionCheck:
        return PrecisionCheck(next(numbers), 1.0, 0.0)

    here = tmp_path.name
    keys = [("int8", here), ("int8", here), ("bf16", here), ("int8", here, "GPU"), ("bf16", here)]
    asked = [remembered("agreement", key, PrecisionCheck, compare) for key in keys]
    assert [check.num_images for check, _ in asked] == [1, 1, 2, 3, 2]
    assert [is_known for _, is_known in asked] == [False, True, False, False, True]


def test_the_speed_is_that_of_the_calls_after_the_first() -> None:
    def sleeping(first_s: float, later_s: float) -> Callable[[Pixels], Scores]:
        seconds = iter([first_s, *[later_s] * 10])

        def classify(_: Pixels) -> Scores:
            time.sleep(next(seconds))
            return np.zeros((1, 2), np.float32)

        return classify

    batch_NHWC = np.zeros((1, 4, 4, 3), np.uint8)
    speed = measure_speed(sleeping(0.2, 0.04), sleeping(0, 0.02), batch_NHWC, by_cpu=False)
    assert speed.times == pytest.approx(0.5, abs=0.1)


def test_a_slow_model_costs_one_round_of_calls() -> None:
    calls: list[float] = []

    def slow(_: Pixels) -> Scores:
        time.sleep(BUDGET_S / 2)
        calls.append(time.perf_counter())
        return np.zeros((1, 2), np.float32)

    measure_speed(slow, slow, np.zeros((1, 4, 4, 3), np.uint8), by_cpu=False)
    assert len(calls) == 4  # the first call of each is not timed


@pytest.mark.parametrize(("speed", "is_said"), [(0.6, True), (0.97, False), (1.8, False)])
def test_a_precision_that_is_slower_than_fp32_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: float, is_said: bool
) -> None:
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sessions, "measure_speed", lambda *_, **__: Speed(speed))
    job = load_job(write_job(tmp_path, provider=HERE, precision="int8", min_agreement=0))
    said: list[str] = []
    model = resolve_model(job.model, batch_size=8, open_reference=open_reference, log=said.append)
    wanted = sessions.Wanted(job, model, 8, sample_input(job, model), said.append)
    opened = sessions.open_devices(wanted, None)
    assert opened.precision_check is not None
    assert opened.precision_check.speed == speed
    slow = [text for text in said if "int8 is slower than fp32 here, 0.6 times as fast" in text]
    assert bool(slow) == is_said


def test_the_speed_is_measured_once_whatever_the_images_and_on_the_model_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    measured: list[int] = []

    def measure(reduced: Run, full: Run, batch_NHWC: Pixels, *, by_cpu: bool) -> Speed:
        assert by_cpu
        assert reduced(batch_NHWC).shape == full(batch_NHWC).shape
        measured.append(len(batch_NHWC))
        return Speed(1.5)

    monkeypatch.setattr(sessions, "measure_speed", measure)
    used: str | None = None
    checks: list[PrecisionCheck | None] = []
    for digit in "012":
        job = load_job(
            write_tiny_job(
                tmp_path,
                input=str(DIGITS / digit),
                provider=HERE,
                precision="int8",
                min_agreement=0,
                runtime={"threads": 1, "part": 2},
            )
        )
        model = resolve_model(job.model, batch_size=8, open_reference=open_reference, log=print)
        wanted = sessions.Wanted(job, model, 8, sample_input(job, model), print, used)
        opened = sessions.open_devices(wanted, None)
        used = opened.bundle.digest
        checks.append(opened.precision_check)
    assert measured == [2]
    assert {check.speed for check in checks if check} == {1.5}
    assert len({check.max_score_difference for check in checks if check}) > 1
