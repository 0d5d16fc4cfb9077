"""Whole jobs on the stand-in, whose answers are zeros: what is read of them is let pass."""

import fcntl
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished, read_records
from tests.engines.common import fault
from tests.gpu_standin.machine import Machine
from tests.gpu_standin.models import NUM_CLASSES, write_convolving
from tests.tiny import link_digits, write_tiny_job

NUM_IMAGES, BATCH_SIZE, EDGE = 192, 16, 64
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
    if module.__name__ == "batchclf.run.append":
        really_classify = module._classify

        def classify(begun, num_done, *more):
            with (FOLDER.parent / "begun").open("a") as file:
                print(num_done, file=file)
            really_classify(begun, num_done, *more)

        module._classify = classify
"""


def write_cuda_job(folder: Path, num_images: int = NUM_IMAGES, **keys: Any) -> Path:
    if not (folder / "images").exists():
        link_digits(folder / "images", num_images)
    keys = {"input": str(folder / "images"), "provider": "cuda", "batch_size": BATCH_SIZE, **keys}
    model = {
        "onnx": str(write_convolving(folder / "model.onnx", EDGE)),
        "preprocess": {"resize": EDGE, "mean": [0.0] * 3, "std": [1.0] * 3},
    }
    return write_tiny_job(folder, model=model, **keys)


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


BATCH = f"{BATCH_SIZE * EDGE * EDGE * 3} "


def copies_of_batches(job: Path, after: str) -> list[str]:
    """How batches were copied to the GPU once there was memory that says `after`, each once."""
    lines = trace(job)
    first = next(number for number, line in enumerate(lines) if line.startswith(after))
    return sorted({line for line in lines[first:] if line.startswith("copy") and BATCH in line})


@pytest.mark.parametrize(("backend", "had_by"), [("threads", "pin"), ("processes", "register")])
def test_a_batch_is_one_copy_each_way_from_page_locked_memory_whatever_decodes(
    machine: Machine, backend: str, had_by: str, tmp_path: Path
) -> None:
    loader = {"backend": backend, "workers": 2}
    job = write_cuda_job(tmp_path, loader=loader, runtime={"streams": 1})
    done = run(machine, job)
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)
    lines = trace(job)
    begun = max(number for number, line in enumerate(lines) if line.startswith(had_by))
    steps = [line for line in lines[begun:] if line.startswith(("copy", "sync"))]
    assert steps == NUM_IMAGES // BATCH_SIZE * [
        f"copy async {BATCH}pinned>gpu0 gpu0",
        "sync gpu0",
        *["sync gpu0"] * 2,  # ONNX Runtime's own, at the end of a call
        f"copy async {BATCH_SIZE * NUM_CLASSES * 4} gpu0>pageable gpu0",
        "sync gpu0",
    ]
    assert lines.count("unregister gpu0") == (backend == "processes")


def test_page_locked_memory_that_runs_out_is_told_of_and_ordinary_memory_serves(
    machine: Machine, undisturbed: list[str], tmp_path: Path
) -> None:
    num_pinned = sum(line.startswith("pin ") for line in undisturbed)
    job = write_cuda_job(tmp_path)
    done = run(machine, job, fault=f"pin:2:{num_pinned}")
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)
    assert done.json["batch_size"] == BATCH_SIZE
    (said,) = [line for line in done.stderr.splitlines() if "page-locked" in line]
    assert "MB of batches cannot be page-locked (error 2 of cudaHostAlloc: out of memory)" in said
    assert copies_of_batches(job, "fault pin") == [f"copy async {BATCH}pageable>gpu0 gpu0"]


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
    ("keys", "arch", "said"),
    [
        ({}, 90, "precision: fp16 uses them, and so does options: {use_tf32: 1}"),
        ({}, 75, "fp32 leaves the tensor cores unused; precision: fp16 uses them\n"),
        ({"precision": "fp16"}, 90, None),
        (
            {"precision": "fp16", "provider": {"name": "cuda", "options": {"use_tf32": 0}}},
            90,
            "options: {use_tf32: 0} leaves the tensor cores unused at fp16 as well",
        ),
    ],
)
def test_a_job_that_leaves_the_tensor_cores_unused_says_so(
    machine: Machine, keys: dict[str, Any], arch: int, said: str | None, tmp_path: Path
) -> None:
    done = run(machine, write_cuda_job(tmp_path, **keys), arch=arch)
    assert done.exit_code == 0, done.stderr
    found = [line for line in done.stderr.splitlines(keepends=True) if "tensor cores" in line]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


# ---- memory runs out, the device is lost ---------------------------------------------------------


def test_memory_that_runs_out_at_the_start_halves_the_batch(
    machine: Machine, tmp_path: Path
) -> None:
    job = write_cuda_job(tmp_path, batch_size=64)
    done = run(machine, job, memory_mb=45)
    assert done.exit_code == 0, done.stderr
    assert "memory does not suffice for batches of 64 (" in done.stderr
    assert "going on with 32 in a new session" in done.stderr
    assert done.json["batch_size"] == 32
    assert_one_record_each(job)


@pytest.fixture(scope="module")
def undisturbed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The trace of a job that nothing happens to."""
    return undisturbed_trace(machine, tmp_path_factory.mktemp("undisturbed"), "fp32")


def undisturbed_trace(
    machine: Machine, folder: Path, precision: str, num_images: int = NUM_IMAGES
) -> list[str]:
    """The trace of a job on one GPU at a precision that nothing happens to."""
    folder.mkdir(exist_ok=True)
    job = write_cuda_job(folder, num_images, precision=precision)
    done = run(machine, job)
    assert done.exit_code == 0, done.stderr
    return trace(job)


def num_before_batches(lines: list[str], call: str) -> int:
    """How many such calls there are until a job's memory for batches is there."""
    begun = max(number for number, line in enumerate(lines) if line.startswith("pin "))
    return num_calls(lines[:begun], call)


def num_calls(lines: list[str], call: str) -> int:
    word = {"execute": "engine"}.get(call, call)
    return sum(line.startswith(word) for line in lines)


def middle(lines: list[str], call: str, num_images: int = NUM_IMAGES) -> int:
    """The number of the first such call in a process's seventh batch.

    There is memory for five: so two are given back by then, and their records written.
    """
    before = num_before_batches(lines, call)
    num_each = (num_calls(lines, call) - before) // (num_images // BATCH_SIZE)
    assert num_each > 0
    return before + 6 * num_each + 1


def assert_gone_on_with(job: Path, num_images: int) -> None:
    """A second process began with what the first had written, in whole batches, and no third."""
    first, second = map(int, (job.parent / "begun").read_text().split())
    assert first == 0
    assert 2 * BATCH_SIZE <= second < num_images
    assert second % BATCH_SIZE == 0


@pytest.mark.parametrize("call", ["launch", "execute"])
def test_memory_that_runs_out_in_the_middle_halves_the_batch_and_the_job_goes_on(
    machine: Machine, undisturbed: list[str], call: str, tmp_path: Path
) -> None:
    at = middle(undisturbed, call)
    job = write_cuda_job(tmp_path)
    done = run(machine, job, fault=f"{call}:2:{at}")
    assert done.exit_code == 0, done.stderr
    assert "memory does not suffice for batches of 16 (" in done.stderr
    assert "going on with 8 in a new session" in done.stderr
    assert_one_record_each(job)
    assert_gone_on_with(job, NUM_IMAGES)


@pytest.mark.parametrize(
    ("call", "code"), [("sync", 700), ("copy", 719), ("launch", 46), ("execute", 700)]
)
def test_a_gpu_that_is_lost_in_the_middle_is_used_again_by_another_process(
    machine: Machine, undisturbed: list[str], call: str, code: int, tmp_path: Path
) -> None:
    at = middle(undisturbed, call)
    job = write_cuda_job(tmp_path)
    done = run(machine, job, fault=f"{call}:{code}:{at}")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("the worker lost its device (") == 1
    assert f"CUDA failure {code}" in done.stderr
    assert done.json["batch_size"] == BATCH_SIZE
    assert_one_record_each(job)
    assert_gone_on_with(job, NUM_IMAGES)


# ---- several GPUs --------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [[1], [0, 1]])
def test_a_job_runs_on_the_gpus_that_it_names_and_no_other(
    machine: Machine, devices: list[int], tmp_path: Path
) -> None:
    job = write_cuda_job(tmp_path, provider={"name": "cuda", "devices": devices})
    done = run(machine, job, gpus=2)
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)
    used = set(re.findall(r"gpu\d", "\n".join(trace(job))))
    assert used == {f"gpu{number}" for number in devices}
    assert not [line for line in trace(job) if "ASTRAY" in line]
    assert done.json["provider"]["device"] == ", ".join(f"{one}: Stand-in" for one in devices)


def test_one_of_several_gpus_that_is_lost_in_the_middle_is_used_again_by_another_process(
    machine: Machine, undisturbed: list[str], tmp_path: Path
) -> None:
    at = middle(undisturbed, "sync")
    job = write_cuda_job(tmp_path, 2 * NUM_IMAGES, provider={"name": "cuda", "devices": [0, 1]})
    done = run(machine, job, gpus=2, fault=f"sync:700:{at}")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("the worker lost its device (") == 1
    assert "CUDA failure 700" in done.stderr
    assert_one_record_each(job)
    assert_gone_on_with(job, 2 * NUM_IMAGES)


def test_memory_of_several_gpus_that_runs_out_at_the_start_halves_the_batch_of_all(
    machine: Machine, tmp_path: Path
) -> None:
    provider = {"name": "cuda", "devices": [0, 1]}
    job = write_cuda_job(tmp_path, provider=provider, batch_size=64)
    done = run(machine, job, gpus=2, memory_mb=45)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("memory does not suffice for batches of 64 (") == 1
    assert "going on with 32 in a new session" in done.stderr
    assert done.json["batch_size"] == 32
    assert_one_record_each(job)


@pytest.mark.parametrize(("precision", "call"), [("fp32", "launch"), ("fp16", "execute")])
def test_memory_of_one_of_several_gpus_that_runs_out_in_the_middle_halves_the_batch_of_all(
    machine: Machine, precision: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_images, cache = 2 * NUM_IMAGES, "BATCHCLF_CACHE_DIR"
    monkeypatch.setenv(cache, str(tmp_path / "cache"))  # whatever is measured once is so twice
    alone = undisturbed_trace(machine, tmp_path / "one", precision, num_images)
    monkeypatch.setenv(cache, str(tmp_path / "another cache"))
    at = middle(alone, call, num_images)
    provider = {"name": "cuda", "devices": [0, 1]}
    job = write_cuda_job(tmp_path, num_images, provider=provider, precision=precision)
    done = run(machine, job, gpus=2, fault=f"{call}:2:{at}")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("memory does not suffice for batches of 16 (") == 1
    assert "going on with 8 in a new session" in done.stderr
    assert done.json["batch_size"] == 8
    assert_one_record_each(job)
    assert_gone_on_with(job, num_images)
    batches = BATCH_SIZE // 2 * EDGE * EDGE * 3
    copied_to = re.findall(f"copy async {batches} .*>(gpu.) ", "\n".join(trace(job)))
    assert set(copied_to) == {"gpu0", "gpu1"}
    engines = {line for line in trace(job) if line.startswith("engine")}
    assert engines == {"engine t" if precision == "fp16" else "engine p"}


def test_gpus_that_are_for_one_process_each_are_left_to_those_that_use_them(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "gpus").mkdir()
    job = write_cuda_job(tmp_path, provider={"name": "cuda", "devices": [0, 1]})
    done = run(machine, job, gpus=2, exclusive=tmp_path / "gpus")
    assert done.exit_code == 0, done.stderr
    assert_one_record_each(job)


def test_one_of_several_gpus_that_another_process_holds_ends_a_job_before_it_looks_for_its_input(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "gpus").mkdir()
    provider = {"name": "cuda", "devices": [0, 1]}
    job = write_cuda_job(tmp_path, provider=provider, input=str(tmp_path / "nowhere"))
    with (tmp_path / "gpus" / "gpu1").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(machine, job, gpus=2, exclusive=tmp_path / "gpus")
    assert done.exit_code == 4, done.stderr
    assert "CUDA-capable device(s) is/are busy or unavailable" in done.stderr
