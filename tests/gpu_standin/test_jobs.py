"""Whole jobs on the stand-in, whose answers are zeros: what is read of them is let pass."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished, read_records
from tests.engines.common import fault
from tests.gpu_standin.machine import Machine
from tests.tiny import link_digits, write_tiny_job

NUM_IMAGES = 96
ANY_ANSWER = """
def change(module):
    if module.__name__ == "batchclf.runtime.probe":
        import numpy as np

        def run(model, target):
            module.warm_up(module.open_classifier(model, target), np.ones((1, 3, 8, 8), np.float32))

        module._require_right_answer = run
    if module.__name__ == "batchclf.sessions.open":
        from batchclf.models.golden import read_golden

        def run_golden(bundle, classify, *, batch_size, **how):
            classify(module.tiled(read_golden(bundle)[0], batch_size))

        module.check_golden = run_golden
        module.require_agreement = lambda check, job: None
"""


def write_cuda_job(folder: Path, **keys: Any) -> Path:
    if not (folder / "images").exists():
        link_digits(folder / "images", NUM_IMAGES)
    keys = {"input": str(folder / "images"), "provider": "cuda", "batch_size": 16, **keys}
    return write_tiny_job(folder, preprocess={"crop": 64}, **keys)


def run(machine: Machine, job: Path, **knobs: object) -> Finished:
    folder = job.parent
    env = (
        fault(folder, ANY_ANSWER, "batchclf.*")
        if not (folder / "fault").exists()
        else {"PYTHONPATH": str(folder / "fault")}
    )
    knobs = {"trace": folder / "trace", "fault_once": folder / "once", **knobs}
    done = machine.python_with("-m", "batchclf", "run", str(job), "--json", env=env, knobs=knobs)
    return Finished(done.returncode, done.stdout, done.stderr)


def trace(job: Path) -> list[str]:
    return (job.parent / "trace").read_text().splitlines()


def assert_one_record_each(job: Path) -> None:
    records = read_records(job.parent / "out")
    images = sorted(path.name for path in (job.parent / "images").iterdir())
    assert [record["path"] for record in records] == images
    assert {record["status"] for record in records} == {"ok"}


BATCH = f"{16 * 64 * 64 * 3} "


def copies_of_batches(job: Path, after: str) -> list[str]:
    """How batches were copied to the GPU once there was memory that says `after`, each once."""
    lines = trace(job)
    first = next(number for number, line in enumerate(lines) if line.startswith(after))
    return sorted({line for line in lines[first:] if line.startswith("copy") and BATCH in line})


@pytest.mark.parametrize(("backend", "had_by"), [("threads", "pin"), ("processes", "register")])
def test_pixels_are_copied_from_page_locked_memory_whatever_decodes(
    machine: Machine, backend: str, had_by: str, tmp_path: Path
) -> None:
    job = write_cuda_job(tmp_path, loader={"backend": backend, "workers": 2})
    done = run(machine, job)
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)
    assert copies_of_batches(job, had_by) == [f"copy async {BATCH}pinned>gpu0 gpu0"]
    assert trace(job).count("unregister gpu0") == (backend == "processes")


def test_memory_of_processes_that_cannot_be_page_locked_serves_and_is_told_of(
    machine: Machine, tmp_path: Path
) -> None:
    job = write_cuda_job(tmp_path, loader={"backend": "processes", "workers": 2})
    done = run(machine, job, fault="register:801:1")
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)
    assert "MB that decoding processes share cannot be page-locked (error 801 of" in done.stderr
    assert copies_of_batches(job, "fault register") == [f"copy async {BATCH}pageable>gpu0 gpu0"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "fp32 leaves the tensor cores unused; precision: fp16 uses them"),
        ({"precision": "fp16"}, None),
        (
            {"precision": "fp16", "provider": {"name": "cuda", "options": {"use_tf32": 0}}},
            "options: {use_tf32: 0} leaves the tensor cores unused at fp16 as well",
        ),
    ],
)
def test_a_job_that_leaves_the_tensor_cores_unused_says_so(
    machine: Machine, keys: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    done = run(machine, write_cuda_job(tmp_path, **keys))
    assert done.exit_code == 0, done.stderr
    found = [line for line in done.stderr.splitlines() if "tensor cores" in line]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
