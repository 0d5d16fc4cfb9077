"""Workers that die, hang or run out of memory: the job goes on, and only the guilty pay."""

import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batchclf.results.records import Pixels, Scores
from batchclf.runtime.classifier import OnnxClassifier
from batchclf.runtime.parts import InParts
from tests.conftest import read_records
from tests.engines.common import (
    assert_as_undisturbed,
    fault,
    finished,
    has_records,
    run_json,
    started,
    summary_of,
    write_job,
)
from tests.faults.poison import CODES, poisoned_environment, write_poison

CLASSIFIER = "batchclf.runtime.classifier"
FAILING_CALL = """
def change(module):
    infer = module.OnnxClassifier.__call__
    def infer_or_fail(self, pixels_NHWC):
        if pixels_NHWC.dtype.name == "uint8":
            fail(len(pixels_NHWC))
        return infer(self, pixels_NHWC)
    module.OnnxClassifier.__call__ = infer_or_fail
    module.OnnxClassifier.takes_any_batch = TAKES_ANY_BATCH

TAKES_ANY_BATCH = False
"""
"""Calls `fail` with the size of each batch before it is inferred (the probe's is of floats).

Batches are not inferred in parts, as with a session that takes one size only, but for ANY_BATCH.
"""
ANY_BATCH = "TAKES_ANY_BATCH = True\n"
OUT_OF_MEMORY = 'raise RuntimeError("Failed to allocate memory for requested buffer of size 9")'
LOST = 'raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")'


def poison(folder: Path, **kinds: str) -> dict[str, str]:
    """Put poison in the places of images, by number; the names, and the codes to expect."""
    images = sorted((folder / "images").iterdir())
    codes = {}
    for number, kind in kinds.items():
        path = images[int(number.strip("_"))]
        path.unlink()
        write_poison(path, kind)
        codes[path.name] = CODES[kind]
    return codes


# ---- deaths --------------------------------------------------------------------------------------


def test_images_that_kill_the_worker_become_errors_and_all_others_are_unharmed(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 60)
    codes = poison(tmp_path, _3="segfault", _4="exit", _20="abort", _40="kill", _55="segfault")
    exit_code, said = finished(job, env=poisoned_environment())
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path, but=codes)
    assert "killed by SIGSEGV" in said
    assert "decoding in processes of its own from now on" in said
    state = run_json(tmp_path / "out")
    assert state["backend"] == "processes"
    assert state["segments"][0]["backend"] == "threads"
    firsts = [one["first"] for one in state["segments"]]
    assert firsts == sorted(set(firsts))
    summary = summary_of(tmp_path / "out")
    assert (summary["num_images"], summary["num_new"], summary["num_errors"]) == (60, 60, 5)


def test_an_image_that_takes_too_long_becomes_a_timeout(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24, loader={"workers": 2, "max_seconds": 1.5})
    codes = poison(tmp_path, _10="native_loop")
    exit_code, said = finished(job, env=poisoned_environment())
    assert exit_code == 0, said
    assert "longer than loader.max_seconds (1.5 s)" in said
    assert_as_undisturbed(tmp_path, but=codes)


def test_a_worker_killed_from_outside_costs_no_record(tmp_path: Path) -> None:
    job = write_job(tmp_path, 120, slow=True)
    with started(job) as run:
        worker = run.wait_for_worker()
        run.wait_until(has_records(tmp_path / "out", 20))
        worker.kill()
        assert run.end() == 0, run.stderr
        assert "killed by SIGKILL" in run.stderr
    assert_as_undisturbed(tmp_path)
    summary = summary_of(tmp_path / "out")
    assert (summary["num_images"], summary["num_new"], summary["num_ok"]) == (120, 120, 120)
    assert summary["images_per_s"] == pytest.approx(120 / summary["wall_s"], rel=0.01)


def test_a_worker_that_is_killed_at_every_start_ends_the_job_naming_memory(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    program = "if IS_WORKER:\n    (FOLDER / str(os.getpid())).touch()\n"
    program += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    exit_code, said = finished(job, env=fault(tmp_path, program))
    assert exit_code == 5, said
    assert "was killed (SIGKILL) 4 times without getting any further, most likely since mem" in said
    assert len(list((tmp_path / "fault").glob("[0-9]*"))) == 4


def test_a_worker_that_always_dies_at_one_batch_ends_the_job_and_no_image_is_blamed(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 40, slow=True, runtime={"streams": 1})
    program = f"{FAILING_CALL}\ndef fail(size):\n"
    program += "    written = Path(os.environ['WRITTEN'])\n"
    program += "    is_begun = 'stream' in threading.current_thread().name\n"
    program += (
        "    if is_begun and written.exists() and written.read_bytes().count(b'\\n') >= 16:\n"
    )
    program += "        os._exit(7)\n"
    env = fault(tmp_path, program, CLASSIFIER)
    written = tmp_path / "out" / "predictions.jsonl"
    exit_code, said = finished(job, env={**env, "WRITTEN": str(written)})
    assert exit_code == 1, said
    assert "the worker ended (exit code 7) 4 times without getting any further" in said
    state = run_json(tmp_path / "out")
    assert state["status"] == "failed"
    assert state["error"] in said
    num_written = len(read_records(tmp_path / "out"))
    assert 16 <= num_written < 40
    exit_code, said = finished(job, env={**env, "WRITTEN": str(written)})
    assert exit_code == 1, said
    assert said.count(f"resuming after {num_written} of 40") == 4
    assert said.count("the worker ended (exit code 7)") == 4, "it got no further than before"
    exit_code, said = finished(job)
    assert (exit_code, f"resuming after {num_written} of 40" in said) == (0, True), said
    assert_as_undisturbed(tmp_path)


def test_poison_in_the_sample_of_a_reduced_precision_is_found_also_when_starting_anew(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 30, precision="int8", min_agreement=0)
    codes = poison(tmp_path, _0="segfault", _11="abort")
    for options in ((), ("--overwrite",)):
        exit_code, said = finished(job, *options, env=poisoned_environment())
        assert exit_code == 0, said
        assert said.count("recorded as decoder_crash") == 2
        found = {one["path"]: one["status"] for one in read_records(tmp_path / "out")}
        assert [name for name, status in found.items() if status == "error"] == list(codes)
        assert run_json(tmp_path / "out")["status"] == "complete"


def test_poison_among_the_failed_images_that_are_tried_again_costs_its_own_record(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 30)
    codes = poison(tmp_path, _5="segfault", _6="kill")
    assert finished(job)[0] == 0
    assert summary_of(tmp_path / "out")["errors_by_code"] == {"not_an_image": 2}
    exit_code, said = finished(job, "--retry-failed", env=poisoned_environment())
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path, but=codes)
    summary = summary_of(tmp_path / "out")
    assert (summary["num_new"], summary["num_errors"]) == (2, 2)
    assert not (tmp_path / "out" / ".retry.jsonl").exists()


def test_trying_again_goes_on_where_a_worker_died(tmp_path: Path) -> None:
    job = write_job(tmp_path, 120, slow=True)
    assert finished(job, "--set", "loader.max_pixels=1")[0] == 0
    assert summary_of(tmp_path / "out")["errors_by_code"] == {"too_large": 120}
    retry = tmp_path / "out" / ".retry.jsonl"
    sizes = []
    with started(job, "--retry-failed") as run:
        worker = run.wait_for_worker()
        run.wait_until(lambda: retry.exists() and retry.stat().st_size > 5000)
        worker.kill()
        while run.process.poll() is None:
            with suppress(FileNotFoundError):  # its records have taken their places
                sizes.append(retry.stat().st_size)
        assert run.end() == 0, run.stderr
    assert sizes == sorted(sizes)
    assert_as_undisturbed(tmp_path)
    assert summary_of(tmp_path / "out")["num_new"] == 120


# ---- stalls --------------------------------------------------------------------------------------


def test_a_worker_that_stands_still_is_replaced(tmp_path: Path) -> None:
    job = write_job(tmp_path, 120, slow=True, stall_timeout=2)
    # It is idle: one that is busy is waited for longer, and here without end.
    endless = "def change(module):\n    module.BUSY_FACTOR = 1_000_000\n"
    with started(job, env=fault(tmp_path, endless, "batchclf.engines.local.watcher")) as run:
        worker = run.wait_for_worker()
        run.wait_until(has_records(tmp_path / "out"))
        worker.send_signal(signal.SIGSTOP)
        run.wait_to_say("no progress for stall_timeout (2 s")
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path)


def test_a_worker_that_keeps_a_core_busy_is_waited_for_longer(tmp_path: Path) -> None:
    """One batch takes four times the timeout. What counts as busy is less here, where tests may
    have a small part of a core."""
    job = write_job(tmp_path, 24, stall_timeout=1)
    program = f"""
{FAILING_CALL}
def fail(size):
    if "stream" in threading.current_thread().name and once("busy"):
        ends_at = time.monotonic() + 4
        while time.monotonic() < ends_at:
            pass

change_classifier = change

def change(module):
    if module.__name__ == {CLASSIFIER!r}:
        change_classifier(module)
    if hasattr(module, "BUSY_SHARE"):
        assert module.BUSY_SHARE <= 1
        module.BUSY_SHARE = 0.02
        once("made easier")
"""
    exit_code, said = finished(job, env=fault(tmp_path, program, "batchclf.*"))
    assert exit_code == 0, said
    assert {path.name for path in (tmp_path / "fault").iterdir()} >= {"busy", "made easier"}
    assert "no progress" not in said
    assert_as_undisturbed(tmp_path)


PREPARING = "batchclf.models.resolve"


def test_a_hanging_inference_shows_where_it_hangs_and_a_long_preparation_is_no_stall(
    tmp_path: Path,
) -> None:
    loader = {"workers": 2, "max_seconds": 1}
    job = write_job(tmp_path, stall_timeout=1.5, loader=loader)
    program = f"""{FAILING_CALL}
def fail(size):
    if "stream" in threading.current_thread().name and once("hung"):
        hang_here()

def hang_here():
    time.sleep(1000)

change_classifier = change

def change(module):
    import batchclf.runtime.classifier
    change_classifier(batchclf.runtime.classifier)
    resolve = module.resolve_model
    def resolve_late(*args, **kwargs):
        # Less than half a core's worth of work, as where a disk is waited for: not busy, nor idle.
        ends_at = time.monotonic() + 5
        while (FOLDER / "hung").exists() and time.monotonic() < ends_at:
            sum(range(10**6))
            time.sleep(0.2)
        return resolve(*args, **kwargs)
    module.resolve_model = resolve_late
"""
    exit_code, said = finished(job, env=fault(tmp_path, program, PREPARING))
    assert exit_code == 0, said
    assert "no progress for stall_timeout (1.5 s" in said
    assert "in hang_here" in said, "the stacks"
    assert "in resolve_late" not in said
    assert_as_undisturbed(tmp_path)


def test_a_preparation_that_stands_still_is_begun_again(tmp_path: Path) -> None:
    job = write_job(tmp_path, stall_timeout=1.5, loader={"workers": 2, "max_seconds": 0.5})
    program = """
def change(module):
    resolve = module.resolve_model
    def resolve_late(*args, **kwargs):
        if once("idle"):
            time.sleep(1000)
        return resolve(*args, **kwargs)
    module.resolve_model = resolve_late
"""
    exit_code, said = finished(job, env=fault(tmp_path, program, PREPARING))
    assert exit_code == 0, said
    assert "in resolve_late" in said
    assert_as_undisturbed(tmp_path)


# ---- memory and devices --------------------------------------------------------------------------


@dataclass
class _Memory:
    """A session that has room for so many images at once."""

    num_images: int
    batch: str | int = "n"
    sizes: list[int] = field(default_factory=list)

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixels", shape=[self.batch, 8, 8, 3])]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="scores")]

    def run(self, names: list[str], inputs: dict[str, Pixels]) -> list[Scores]:
        pixels_NHWC = inputs["pixels"]
        self.sizes.append(len(pixels_NHWC))
        if len(pixels_NHWC) > self.num_images:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9")
        return [pixels_NHWC.mean(axis=(1, 2), dtype=np.float32)]


def test_a_session_that_takes_any_batch_infers_one_in_parts_where_memory_is_short() -> None:
    pixels_NHWC = np.random.default_rng(5).integers(0, 256, (9, 8, 8, 3), np.uint8)
    session: Any = _Memory(3)
    classify = OnnxClassifier(session, active=None)  # type: ignore[arg-type]
    said: list[str] = []
    in_parts = InParts(classify, 9, said.append)
    for _ in range(2):
        scores_NK = in_parts(pixels_NHWC)
        np.testing.assert_array_equal(scores_NK, pixels_NHWC.mean(axis=(1, 2), dtype=np.float32))
    assert session.sizes == [9, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1]
    assert ["parts of 4" in said[0], "parts of 2" in said[1]] == [True, True]
    assert len(said) == 2


@pytest.mark.parametrize(("batch", "room"), [(9, 4), ("n", 0)], ids=["fixed batch", "no room"])
def test_a_session_that_cannot_infer_less_says_that_memory_is_short(
    batch: str | int, room: int
) -> None:
    session: Any = _Memory(room, batch)
    classify = OnnxClassifier(session, active=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Failed to allocate memory"):
        InParts(classify, 9, print)(np.zeros((9, 8, 8, 3), np.uint8))


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(tmp_path: Path) -> None:
    job = write_job(tmp_path, 40, batch_size=16, runtime={"part": 16})
    program = f"{FAILING_CALL}\ndef fail(size):\n    if size > 5:\n        {OUT_OF_MEMORY}\n"
    for options in ((), ("--overwrite",)):
        env = {"PYTHONPATH": str(tmp_path / "fault")} if options else None
        exit_code, said = finished(job, *options, env=env or fault(tmp_path, program, CLASSIFIER))
        assert exit_code == 0, said
        assert "going on with 8" in said
        assert "going on with 4" in said
        assert_as_undisturbed(tmp_path)
        state = run_json(tmp_path / "out")
        assert state["batch_size"] == 4
        assert [(one["first"], one["batch_size"]) for one in state["segments"]] == [(0, 4)]


SHORT_HALF_WAY = f"""
def fail(size):
    written = Path(os.environ['WRITTEN'])
    if size > 3 and written.exists() and written.read_bytes().count(b'\\n') >= 16:
        {OUT_OF_MEMORY}
"""


def test_memory_that_gets_short_half_way_has_batches_inferred_in_parts(tmp_path: Path) -> None:
    job = write_job(tmp_path, 60, slow=True, batch_size=8, runtime={"streams": 1, "part": 8})
    env = fault(tmp_path, FAILING_CALL + SHORT_HALF_WAY + ANY_BATCH, CLASSIFIER)
    written = tmp_path / "out" / "predictions.jsonl"
    exit_code, said = finished(job, env={**env, "WRITTEN": str(written)})
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path)
    assert said.count("inferring batches in parts of 4") == 1
    assert said.count("inferring batches in parts of 2") == 1
    assert "in a new session" not in said
    assert [one["batch_size"] for one in run_json(tmp_path / "out")["segments"]] == [8]


def test_memory_that_gets_short_half_way_changes_the_batches_of_a_session_of_one_size(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 60, slow=True, batch_size=8, runtime={"streams": 1, "part": 8})
    env = fault(tmp_path, FAILING_CALL + SHORT_HALF_WAY, CLASSIFIER)
    written = tmp_path / "out" / "predictions.jsonl"
    exit_code, said = finished(job, env={**env, "WRITTEN": str(written)})
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path)
    segments = run_json(tmp_path / "out")["segments"]
    assert [one["batch_size"] for one in segments] == [8, 2]
    assert segments[1]["first"] >= 16


def test_memory_that_does_not_suffice_for_one_image_ends_with_exit_code_5(tmp_path: Path) -> None:
    job = write_job(tmp_path, 8, batch_size=2)
    program = f"{FAILING_CALL}\ndef fail(size):\n    {OUT_OF_MEMORY}\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, CLASSIFIER))
    assert exit_code == 5, said
    assert "batch_size: memory does not suffice for 1 at once" in said
    assert "Traceback" not in said


def test_a_lost_device_is_opened_again_by_another_process(tmp_path: Path) -> None:
    job = write_job(tmp_path, 40)
    program = f"{FAILING_CALL}\ndef fail(size):\n"
    program += "    if 'stream' in threading.current_thread().name and once('lost'):\n"
    program += f"        {LOST}\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, CLASSIFIER))
    assert exit_code == 0, said
    assert said.count("the worker lost its device (CUDA failure 700") == 1
    assert_as_undisturbed(tmp_path)


def test_only_one_worker_is_there_at_a_time(tmp_path: Path) -> None:
    """The memory of one that failed is free for the next."""
    job = write_job(tmp_path, 16, batch_size=8, runtime={"part": 8})
    program = f"""{FAILING_CALL}
def fail(size):
    if size > 4:
        {OUT_OF_MEMORY}

if IS_WORKER:
    import atexit
    mine = Path("/proc", str(os.getppid()), "task", str(os.getppid()), "children")
    lines = {{pid: Path("/proc", pid, "cmdline").read_bytes() for pid in mine.read_text().split()}}
    workers = [pid for pid, line in lines.items() if b"engines.local.worker" in line]
    (FOLDER / f"workers-{{os.getpid()}}").write_text(" ".join(workers))
"""
    assert finished(job, env=fault(tmp_path, program, CLASSIFIER))[0] == 0
    seen: list[Any] = [one.read_text().split() for one in (tmp_path / "fault").glob("workers-*")]
    assert [len(one) for one in seen] == [1, 1]


def test_a_fault_of_the_job_itself_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    program = "def change(module):\n    def resolve_model(*args, **kwargs):\n"
    program += "        (FOLDER / str(os.getpid())).touch()\n        1 / 0\n"
    program += "    module.resolve_model = resolve_model\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, PREPARING))
    assert exit_code == 1
    assert "ZeroDivisionError" in said
    assert len(list((tmp_path / "fault").glob("[0-9]*"))) == 1


def test_a_package_that_cannot_be_imported_is_told_once_and_not_tried_again(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path)
    program = "def change(module):\n    (FOLDER / str(os.getpid())).touch()\n"
    program += "    raise ImportError('libgone.so.1: cannot open shared object file')\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, CLASSIFIER))
    assert exit_code == 1
    assert said.count("Traceback") == 1, said
    assert "libgone.so.1: cannot open shared object file" in said
    assert len(list((tmp_path / "fault").glob("[0-9]*"))) == 1
