"""The `bottleneck` of real runs, each built so that one stage is by far the slowest."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchclf.results.identity import as_written
from batchclf.results.stats import Summary
from batchclf.spec.options import RunOptions
from tests.conftest import BY_HAND, ROOT, command
from tests.links import link_images
from tests.tiny import link_digits, run_here, write_tiny_job

STREAMS = {"streams": 2}
BYTES_PER_S = 20_000
"""What the throttled disk takes."""


def noisy_photo(folder: Path, width: int, height: int) -> Path:
    """A folder with one JPEG whose content costs what a photo's does."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    smooth_HWC = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), np.int16)
    noise_HW1 = rng.integers(-12, 13, (height, width, 1), np.int16)
    pixels_HWC = (smooth_HWC + noise_HW1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels_HWC).save(folder / "photo.jpg", quality=90)
    return folder


def assert_is(summary: Summary, stage: str) -> None:
    """The bottleneck is `stage`, and told for sure."""
    assert summary.bottleneck == stage, summary
    assert "too short" not in summary.bottleneck_why


def test_12_megapixel_photos_and_a_small_model_wait_for_decoding(tmp_path: Path) -> None:
    photos = link_images(noisy_photo(tmp_path / "photo", 4000, 3000), tmp_path / "photos", 12)
    job = write_tiny_job(tmp_path, input=str(photos), batch_size=1, runtime=STREAMS)
    assert_is(run_here(job).summary, "decode")


@BY_HAND
def test_small_photos_and_resnet50_wait_for_inference(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="ResNet-50 is exported by torch")
    photos = link_images(noisy_photo(tmp_path / "photo", 64, 64), tmp_path / "photos", 48)
    model = {"name": "resnet50", "weights": "none"}
    job = write_tiny_job(tmp_path, input=str(photos), model=model, batch_size=4, runtime=STREAMS)
    assert_is(run_here(job).summary, "infer")


def delayed(call: str, microseconds: int) -> Callable[[Path, Path], list[str]]:
    """The command with a system call on predictions.jsonl that takes so much longer."""

    def wrapped(job: Path, predictions: Path) -> list[str]:
        slow = ("-e", f"trace={call}", "-e", f"inject={call}:delay_exit={microseconds}")
        strace = ["strace", "-f", "-o", os.devnull]
        if shutil.which("strace") is None:
            pytest.skip("strace, which delays system calls, is not installed")
        if subprocess.run([*strace, *slow, "true"], capture_output=True, check=False).returncode:
            pytest.skip("strace may not trace processes here")
        return [*strace, "-P", os.fspath(predictions), *slow, *command("run", job)]

    return wrapped


def test_a_throttled_disk_keeps_all_waiting_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_write = os.write

    def write(descriptor: int, data: bytes) -> int:
        num_bytes = really_write(descriptor, data)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("predictions.jsonl"):
            time.sleep(num_bytes / BYTES_PER_S)
        return num_bytes

    monkeypatch.setattr(os, "write", write)
    images = link_digits(tmp_path / "images", 100)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=4, runtime=STREAMS)
    assert_is(run_here(job).summary, "write")


@pytest.mark.parametrize(
    "slowed",
    [delayed("write", 50_000), delayed("fsync", 2_000_000)],
    ids=["slow writes", "slow syncs"],
)
def test_a_slow_disk_keeps_all_waiting_for_writing(
    tmp_path: Path, slowed: Callable[[Path, Path], list[str]]
) -> None:
    images = link_digits(tmp_path / "images", 100)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=4, runtime=STREAMS)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [*slowed(job, tmp_path / "out" / "predictions.jsonl"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = as_written(Summary, json.loads(done.stdout.splitlines()[-1]))
    assert_is(summary, "write")
    assert summary.num_ok == 100


def test_a_job_of_one_batch_is_said_to_be_too_short_to_tell(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    summary = run_here(job, RunOptions(limit=8)).summary
    assert summary.bottleneck in ("decode", "infer", "write")
    assert summary.bottleneck_why.startswith("too short to tell")
