"""Before the night: what a job will do, how long it will take, and what is odd about it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from batchclf.cli import main
from batchclf.commands import validate
from batchclf.commands.validate import check_job, disk_warning
from batchclf.engines import trial as trial_module
from batchclf.engines.trial import Trial, try_job
from batchclf.images import store as store_module
from batchclf.results.records import ActiveProvider, PrecisionCheck, Shard
from batchclf.run.kept import input_of
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.paths import Usage
from tests.conftest import BY_HAND, Batchclf, read_records
from tests.faults.poison import poisoned_environment, write_poison
from tests.tiny import DIGITS, run_here, tiny_model, write_tiny_job


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """43 digits, and three files that are no image."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, path in enumerate(sorted(DIGITS.rglob("*.*"))[::7]):
        shutil.copy(path, folder / f"{number:02d}{path.suffix}")
    for number in range(3):
        (folder / f"bad{number}.jpg").write_bytes(b"no image")
    return folder


def checked(job: Path, **options: Any) -> validate.Checked:
    return check_job(load_job(job), RunOptions(**options), lambda text: None)


def tried(job: Path, seconds: float = 0.5) -> Trial:
    spec = load_job(job)
    found = check_job(spec, RunOptions(), lambda text: None)
    return try_job(spec, found.sample, lambda text: None, located=found.located, seconds=seconds)


# ---- without a trial -----------------------------------------------------------------------------


def test_images_bytes_and_formats_are_told_of_a_sample(images: Path, tmp_path: Path) -> None:
    found = checked(write_tiny_job(tmp_path, input=str(images)))
    sizes = [path.stat().st_size for path in images.iterdir()]
    assert found.num_images == len(sizes)
    assert found.num_bytes == pytest.approx(sum(sizes), abs=1)
    assert found.glance is not None
    formats = dict(found.glance.formats)
    assert formats.pop("no image format known") == 3
    assert sorted(formats) == ["JPEG", "PNG"]
    assert sum(formats.values()) == len(sizes) - 3


def test_a_part_of_a_job_is_told_as_what_it_is(images: Path, tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path, input=str(images))
    assert checked(job, limit=7).num_images == 7
    second = checked(job, shard=Shard(1, 2))
    total = checked(job).num_images
    assert second.num_images == total - total // 2
    assert min(ref.index for ref in second.sample) == total // 2


def test_a_batch_larger_than_the_input_is_warned_of(images: Path, tmp_path: Path) -> None:
    found = checked(write_tiny_job(tmp_path, input=str(images), batch_size=64))
    assert "batch_size: 64 is more than the " in " ".join(found.warnings)
    found = checked(write_tiny_job(tmp_path, input=str(images), batch_size=8))
    assert list(found.warnings) == []


def test_huge_images_are_warned_of_by_their_headers(tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    Image.fromarray(np.zeros((6000, 9000), np.uint8)).save(images / "huge.png")
    job = write_tiny_job(tmp_path, input=str(images), batch_size=1)
    assert "there are huge images, up to 54,000,000 pixels" in " ".join(checked(job).warnings)
    job = write_tiny_job(
        tmp_path, input=str(images), batch_size=1, loader={"max_pixels": 1_000_000}
    )
    assert "1 of 1 images sampled have more than loader.max_pixels (1,000,000)" in " ".join(
        checked(job).warnings
    )


def test_a_disk_that_is_nearly_full_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(write_tiny_job(tmp_path, output=str(tmp_path / "not" / "there")))
    free = 10**8
    monkeypatch.setattr(validate, "_disk_of", lambda path: (tmp_path, Usage(10**9, free)))
    assert disk_warning(job, 10**8 - 1) is None
    warning = disk_warning(job, 10**8)
    assert warning is not None
    assert f"the disk of {tmp_path} is nearly full: 100,000,000 of 1,000,000,000" in warning
    free = 10**7
    assert disk_warning(job, 1) is not None


def test_a_disk_that_does_not_tell_its_room_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(write_tiny_job(tmp_path))
    assert disk_warning(job, 1) is None
    too_long = job.model_copy(update={"output": tmp_path / ("x" * 300)})
    warning = "output: the disk of {} does not tell how much of it is free: "
    assert (disk_warning(too_long, 1) or "").startswith(warning.format(too_long.output))
    monkeypatch.setattr(validate, "HUNG_S", 0.0)
    assert (disk_warning(job, 1) or "").startswith(warning.format(job.output))


def test_an_image_that_ends_who_reads_it_is_warned_of(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "HUNG_S", 0.0)
    found = checked(write_tiny_job(tmp_path, input=str(images), batch_size=8))
    assert found.glance is None
    assert "a sample of the images could not be read: " in " ".join(found.warnings)


# ---- with one ------------------------------------------------------------------------------------


def test_a_trial_that_ends_with_its_images_tells_what_a_run_tells(
    images: Path, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, input=str(images), batch_size=8)
    found = tried(job, seconds=60)
    assert not (tmp_path / "out").exists()
    run_here(job)
    records = read_records(tmp_path / "out")
    size = (tmp_path / "out" / "predictions.jsonl").stat().st_size
    assert (found.num_images, found.num_errors) == (len(records), 3)
    assert found.errors_by_code == {"not_an_image": 3}
    assert found.output_bytes(len(records)) == pytest.approx(size, abs=1)
    assert found.provider.active == "CPUExecutionProvider"
    assert found.duration_s(len(records)) > found.startup_s > 0


@BY_HAND
def test_a_trial_ends_after_its_time_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    big: dict[str, Any] = {"resize": 800, "crop": 800}
    job = write_tiny_job(tmp_path, model=tiny_model(tmp_path, **big), batch_size=4)
    found = tried(job, seconds=0.1)
    assert 8 <= found.num_images < 300
    assert found.images_per_s > 0
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("batchclf-trial-*")) == []


@BY_HAND
def test_a_trial_outlives_images_that_crash_their_decoder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in poisoned_environment().items():
        monkeypatch.setenv(name, value)
    write_poison(images / "bad1.jpg", "segfault")
    found = tried(write_tiny_job(tmp_path, input=str(images), batch_size=8), seconds=60)
    assert found.errors_by_code == {"not_an_image": 2, "decoder_crash": 1}


def test_a_trial_is_a_sample_of_all_images_not_of_the_first(tmp_path: Path) -> None:
    job = load_job(write_tiny_job(tmp_path))
    store = store_module.open_input(job)
    entries = list(store.entries())
    sample = check_job(job, RunOptions(), lambda text: None).sample
    order = trial_module._in_good_order(job, sample)
    assert sorted(order) == sorted(entries)
    folders = {entry.path.partition(b"/")[0] for entry in order[:60]}
    assert len(folders) == 10


def test_what_is_odd_about_the_answers_is_warned_of() -> None:
    def of(**facts: Any) -> list[str]:
        told: dict[str, Any] = {
            "model": "tiny",
            "labels": ("cat", "dog"),
            "provider": ActiveProvider("cpu", "CPUExecutionProvider", "CPU"),
            "precision": "int8",
            "precision_check": None,
            "num_images": 100,
            "num_errors": 0,
            "errors_by_code": {},
            "images_per_s": 10.0,
            "startup_s": 1.0,
            "bytes_per_image": 100.0,
            "top_label": "cat",
            "top_share": 0.5,
        }
        return list(Trial(**told | facts).warnings())

    assert of() == []
    (alike,) = of(top_share=0.99)
    assert "99% of 100 images got the answer 'cat'" in alike
    assert of(top_share=0.99, num_images=10) == []
    (low,) = of(precision_check=PrecisionCheck(200, 0.95, 0.1))
    assert "int8 gives another top class than fp32 on 5.0% of 200 images" in low
    (slow,) = of(precision_check=PrecisionCheck(200, 0.99, 0.1, speed=0.5))
    assert "int8 is 0.5 times as fast as fp32" in slow
    (tf32,) = of(precision="fp32", precision_check=PrecisionCheck(200, 0.95, 0.1))
    assert "TF32 gives another top class than fp32 on 5.0% of 200 images" in tf32
    (errors,) = of(num_errors=10, errors_by_code={"truncated": 10})
    assert "10 of 100 images fail: 10 truncated" in errors


@pytest.mark.parametrize("command", [("validate", "--trial"), ("run", "--dry-run")])
def test_a_job_of_other_machines_is_not_tried_here(
    command: tuple[str, str], tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, engine={"name": "ray"}, input=str(tmp_path / "not there"))
    name, option = command
    done = CliRunner().invoke(main, [name, str(job), option])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"batchclf: {option}: tries a job on this machine")
    assert f"leave {option} out" in done.stderr


# ---- the commands --------------------------------------------------------------------------------


def test_validate_with_a_trial_tells_duration_and_records_and_so_does_a_dry_run(
    images: Path, tmp_path: Path, batchclf: Batchclf
) -> None:
    job = write_tiny_job(tmp_path, input=str(images), batch_size=8)
    said = CliRunner().invoke(main, ["validate", str(job), "--trial"])
    assert said.exit_code == 0, said.stderr
    for word in ("images:", "formats:", "model:", "provider:", "trial:", "duration:", "records:"):
        assert f"\n{word}" in f"\n{said.stdout}"
    dry = batchclf("run", job, "--dry-run", "--limit", "9", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert dry.json["num_images"] == dry.json["trial"]["num_images"] == 9
    assert dry.json["trial"]["duration_s"] > 0
    assert not (tmp_path / "out").exists()


def test_what_would_end_the_run_ends_the_trial_with_its_exit_code(
    tmp_path: Path,
) -> None:
    job = write_tiny_job(tmp_path, provider="cuda")

    def said(*options: str) -> Result:
        return CliRunner().invoke(main, ["run", str(job), "--dry-run", *options])

    assert said().exit_code == 4
    done = said("--overwrite", "--retry-failed", "--json")
    assert (done.exit_code, json.loads(done.stdout)["status"]) == (2, "failed")


@pytest.mark.parametrize(
    "option",
    [
        *(["--retry-failed"], ["--extend"], ["--notify", "http://example.org"]),
        ["--metrics-port", "9464"],
    ],
    ids=lambda option: option[0],
)
def test_what_a_dry_run_would_leave_out_is_refused(option: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(write_tiny_job(tmp_path)), "--dry-run", *option])
    assert done.exit_code == 2
    assert f"leave {option[0]} out, or --dry-run" in done.stderr


def test_a_dry_run_takes_off_what_has_a_record_and_refuses_what_the_run_would(
    images: Path, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, input=str(images), batch_size=8)
    run_here(job, RunOptions(limit=20))

    def said(*options: str) -> Result:
        return CliRunner().invoke(main, ["run", str(job), "--dry-run", *options])

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    before = written()
    told = json.loads(said("--json").stdout)
    assert told["trial"]["num_kept"] == 20
    num_left = told["num_images"] - 20
    size = told["trial"]["bytes_per_image"] * num_left
    assert told["trial"]["output_bytes"] == pytest.approx(size, abs=1)
    changed = said("--top-k", "3")
    assert changed.exit_code == 2
    assert "holds results of a job that differs" in changed.stderr
    assert written() == before
    (tmp_path / "out" / "run.json").unlink()
    (tmp_path / "out" / "listing.nul").unlink()
    unknown = said()
    assert unknown.exit_code == 2
    assert "but no run.json says which job wrote it" in unknown.stderr


def test_a_list_that_can_be_read_once_is_the_same_input_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list")
    assert input_of(load_job(write_tiny_job(tmp_path, input=str(tmp_path / "list")))) == "-"
