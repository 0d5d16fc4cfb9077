"""Signals at every stage of a run, and a parent that dies: what is left, and what is resumable."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from batchclf.errors import Interrupted
from batchclf.results.files import RunFiles
from batchclf.results.lock import only_writer
from batchclf.system.interrupt import StopRequest
from tests.conftest import ROOT, command, read_records
from tests.engines.common import (
    Run,
    assert_as_undisturbed,
    assert_gone,
    fault,
    finished,
    has_records,
    run_json,
    started,
    write_job,
)
from tests.faults.poison import poisoned_environment, write_poison

LATE = """
if IS_WORKER:
    time.sleep(1.5)
"""
WAITING = """
def change(module):
    def wait(*args, **kwargs):
        (FOLDER / "waiting").touch()
        time.sleep(1000)
    module.{} = wait
"""


def assert_stopped(run: Run, number: int = signal.SIGTERM) -> None:
    """It ends as promised and leaves no process; whether in 8 s, the fault harness measures."""
    exit_code = run.end(timeout=20)
    counts_as = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert exit_code == 128 + counts_as, run.stderr
    assert f"stopped by {counts_as.name}; run the same command to resume" in run.stderr
    assert run.stderr.count("stopped by") == 1
    assert "Traceback" not in run.stderr


def hang(folder: Path, kind: str) -> str:
    """Let one image, of which the name is returned, hang whoever decodes it."""
    path = sorted((folder / "images").iterdir())[12]
    path.unlink()
    return write_poison(path, kind).name


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "module", ["click", "batchclf.cli.run", "batchclf.engines.local.supervisor"]
)
def test_a_signal_while_the_command_is_imported_ends_it_without_a_traceback(
    tmp_path: Path, module: str, number: int
) -> None:
    job = write_job(tmp_path)
    # What starts the tests may have it ignored, as a shell does for what runs in the background.
    program = f"""
signal.signal(signal.SIGINT, signal.default_int_handler)

def change(module):
    if not IS_WORKER:
        os.kill(os.getpid(), {number:d})
"""
    exit_code, said = finished(job, env=fault(tmp_path, program, module))
    assert exit_code == (130 if number == signal.SIGINT else 143), said
    assert "Traceback" not in said


def test_a_signal_that_comes_while_a_class_is_made_is_not_taken_for_a_fault_of_its() -> None:
    """CPython 3.11 makes a RuntimeError of whatever `__set_name__` raises."""

    class Signalling:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), StopRequest().installed():
        type("Owner", (), {"attribute": Signalling()})


def test_a_signal_while_the_job_file_is_read_stops_the_run(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    with started(job, env=fault(tmp_path, WAITING.format("load_job"), "batchclf.spec.file")) as run:
        run.wait_until((tmp_path / "fault" / "waiting").exists)
        run.process.send_signal(signal.SIGUSR1)
        assert_stopped(run)
    assert not (tmp_path / "out").exists()


def test_a_signal_while_the_worker_imports_is_kept_for_it(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    with started(job, env=fault(tmp_path, LATE)) as run:
        run.wait_until((tmp_path / "out" / ".lease.json").exists)
        run.process.terminate()
        assert_stopped(run)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    assert finished(job)[0] == 0
    assert_as_undisturbed(tmp_path)


def test_a_signal_while_the_model_is_prepared_ends_that(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    waiting = WAITING.format("resolve_model")
    with started(job, env=fault(tmp_path, waiting, "batchclf.models.resolve")) as run:
        run.wait_until((tmp_path / "fault" / "waiting").exists)
        run.process.send_signal(signal.SIGINT)
        assert_stopped(run, signal.SIGINT)
    assert finished(job)[0] == 0
    assert_as_undisturbed(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_counts_once_and_what_is_in_flight_is_committed(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As the Ctrl-C of a terminal, and as Slurm's signals, which may go to all."""
    backend = "processes" if number == signal.SIGINT else "threads"
    job = write_job(tmp_path, 200, slow=True, loader={"workers": 2, "backend": backend})
    with started(job) as run:
        run.wait_until(has_records(tmp_path / "out"))
        os.killpg(run.process.pid, number)
        assert_stopped(run, number)
    state = run_json(tmp_path / "out")
    num_done = len(read_records(tmp_path / "out"))
    assert state["status"] == "interrupted"
    assert state["durable"]["num_images"] == num_done < 200
    exit_code, said = finished(job)
    assert exit_code == 0, said
    assert f"resuming after {num_done} of 200" in said
    assert_as_undisturbed(tmp_path)


def test_a_signal_while_a_suspect_is_tried_alone_ends_that(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24, loader={"workers": 2, "max_seconds": 2})
    name = hang(tmp_path, "loop")
    with started(job, env=poisoned_environment()) as run:
        run.wait_to_say("to be tried alone")
        run.wait_until(lambda: len(run.members()) == 3)
        run.process.terminate()
        assert_stopped(run)
    assert run_json(tmp_path / "out")["status"] == "interrupted"
    exit_code, said = finished(job, env=poisoned_environment())
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path, but={name: "timeout"})


def test_what_does_not_end_after_a_signal_is_dropped(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24)
    name = hang(tmp_path, "hang")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until(has_records(tmp_path / "out", 12))
        sent = time.monotonic()
        run.process.terminate()
        assert_stopped(run)
        print(f"ended {time.monotonic() - sent:.1f} s after the signal")
        assert "what was in flight did not end in time" in run.stderr
    state = run_json(tmp_path / "out")
    assert (state["status"], state["error"][:18]) == ("interrupted", "stopped by SIGTERM")
    job.write_text(job.read_text().replace('"workers": 2', '"workers": 2, "max_seconds": 1'))
    exit_code, said = finished(job, env=poisoned_environment())
    assert exit_code == 0, said
    assert "resuming after" in said
    assert_as_undisturbed(tmp_path, but={name: "timeout"})


def test_ctrl_c_in_a_command_that_starts_over_ends_it_with_130_and_says_nothing(
    tmp_path: Path,
) -> None:
    """One that keeps nothing, so has no handler of its own: Python's KeyboardInterrupt ends it."""
    job = write_job(tmp_path)
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)

def change(module):
    def wait(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)
    module.load_job = wait
"""
    done = subprocess.run(
        command("validate", job),
        env={**os.environ, **fault(tmp_path, program, "batchclf.spec.file")},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_second_signal_ends_all_processes_at_once(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24, loader={"workers": 2, "backend": "processes"})
    hang(tmp_path, "hang")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until(has_records(tmp_path / "out", 8))
        run.process.terminate()
        time.sleep(0.2)
        run.process.send_signal(signal.SIGINT)
        assert run.end(timeout=5) == 130, run.stderr
        assert "did not end in time" not in run.stderr
    assert run_json(tmp_path / "out")["status"] == "running"


def test_as_the_first_process_of_a_container_a_job_is_stopped_as_well(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a process namespace here")
    job = write_job(tmp_path, 200, slow=True)
    with started(job, through=("unshare", "--pid", "--fork", "--mount-proc")) as run:
        run.wait_until(has_records(tmp_path / "out"))
        (first,) = psutil.Process(run.process.pid).children()
        first.terminate()
        assert_stopped(run)
    assert run_json(tmp_path / "out")["status"] == "interrupted"


# ---- a parent that dies --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_nothing_outlives_a_killed_parent_even_in_an_endless_loop(
    tmp_path: Path, backend: str
) -> None:
    job = write_job(tmp_path, 24, loader={"workers": 2, "backend": backend})
    hang(tmp_path, "native_loop")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until((tmp_path / "out" / "run.json").exists)
        time.sleep(1)  # to be at that image
        members = run.members()
        assert len(members) == {"threads": 2, "processes": 4}[backend]
        run.process.kill()
        run.process.wait()
        assert_gone(members[1:])
    with only_writer(RunFiles(tmp_path / "out")):
        pass
