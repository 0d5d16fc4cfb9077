"""A process for each of several devices: one output in order, and a process that ends is no end."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from batchclf.errors import DeviceLost, UsageError
from batchclf.results.records import ImageRef
from batchclf.run import ready
from batchclf.run.feeder import Share
from batchclf.run.feeders import Feeders, shares_of
from batchclf.run.plan import Plan, Task
from batchclf.spec.job import JobSpec
from tests.conftest import read_records
from tests.proxy import NAME, proxied_bucket
from tests.tiny import (
    Log,
    assert_same_records,
    link_digits,
    run_here,
    write_tiny_job,
)


def feed_in_two(monkeypatch: pytest.MonkeyPatch) -> list[Feeders]:
    """From now on, jobs run in two processes, each on the CPU; these appear in the list."""
    started: list[Feeders] = []

    class Noted(Feeders):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    def shares(plan: Plan, sample: object, used: str | None) -> list[Share]:
        return [Share(plan, (), used)] * 2

    monkeypatch.setattr(ready, "shares_of", shares)
    monkeypatch.setattr(ready, "Feeders", Noted)
    return started


def images(folder: Path, num_images: int) -> Path:
    """Digits, a few of them broken."""
    found = link_digits(folder, num_images)
    for number in (3, 20, 21):
        broken = next(found.glob(f"{number:06d}.*"))
        broken.unlink()
        broken.write_bytes(b"broken")
    return found


def job(folder: Path, output: str, **keys: Any) -> Path:
    return write_tiny_job(
        folder,
        name=f"{output}.yaml",
        input=str(folder / "images"),
        output=str(folder / output),
        batch_size=4,
        runtime={"streams": 1, "part": 4},
        **keys,
    )


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_two_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    images(tmp_path / "images", 90)
    loader = {"workers": 2, "backend": backend}
    alone = run_here(job(tmp_path, "alone", loader=loader))
    started = feed_in_two(monkeypatch)
    together = run_here(job(tmp_path, "together", loader=loader))
    assert len(started) == 1
    written = [one.files.predictions.read_bytes() for one in (alone, together)]
    assert written[0] == written[1]
    assert together.summary.num_images == 90
    assert together.summary.errors_by_code == alone.summary.errors_by_code
    assert together.summary.batch_ms["p50"] > 0
    for feeder in started[0]._feeders:
        assert feeder._process.returncode is not None


def test_images_of_a_bucket_are_read_ahead_of_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there is memory for batches."""
    pytest.importorskip("obstore")
    images(tmp_path / "images", 90)
    run_here(job(tmp_path, "alone"))
    with proxied_bucket() as bucket:
        bucket.put_folder(tmp_path / "images", "images")
        feed_in_two(monkeypatch)
        far = job(tmp_path, "far", loader={"workers": 2, "max_seconds": 20})
        far.write_text(far.read_text().replace(str(tmp_path / "images"), f"s3://{NAME}/images"))
        run_here(far)
    assert_same_records(read_records(tmp_path / "far"), read_records(tmp_path / "alone"))


def test_a_process_that_is_killed_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeding = feed_in_two(monkeypatch)
    images(tmp_path / "images", 200)
    path = job(tmp_path, "out")

    class Killer(Log):
        def update(self, num_images: int, num_errors: int) -> None:
            if num_images >= 8:
                os.kill(feeding[0]._feeders[1]._process.pid, signal.SIGKILL)

    with pytest.raises(DeviceLost, match=r"ended: killed by SIGKILL"):
        run_here(path, log=Killer())
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert 8 <= written.count(b"\n") < 200
    result = run_here(path)
    assert result.summary.num_images == 200
    assert result.files.predictions.read_bytes().startswith(written)


def test_what_a_process_raises_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 30)

    def shares(plan: Plan, sample: object, used: str | None) -> list[Share]:
        job = plan.task.job
        provider = job.provider.model_copy(update={"options": {"unknown": 1}})
        task = replace(plan.task, job=job.model_copy(update={"provider": provider}))
        return [Share(plan, (), used), Share(replace(plan, task=task), (), used)]

    monkeypatch.setattr(ready, "shares_of", shares)
    with pytest.raises(UsageError, match=r"provider.options: found unknown"):
        run_here(job(tmp_path, "out"))
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_each_gpu_has_its_share_of_the_workers() -> None:
    def plan(devices: list[int] | None) -> Plan:
        spec = JobSpec.model_validate(
            {
                "input": "images",
                "output": "out",
                "model": {"name": "resnet18"},
                "provider": {"name": "cuda", "devices": devices},
            }
        )
        return Plan(Task(spec, cast(Any, None), cast(Any, None), 100), 64, 9, "processes")

    shares = shares_of(plan([0, 2]), [ImageRef(7, b"sample.jpg")], "digest")
    assert [share.plan.task.job.provider.devices for share in shares] == [(0,), (2,)]
    assert [share.plan.num_workers for share in shares] == [4, 4]
    assert {(share.sample, share.used) for share in shares} == {
        ((ImageRef(7, b"sample.jpg"),), "digest")
    }
    assert shares_of(plan([1]), [], None) == shares_of(plan(None), [], None) == []
