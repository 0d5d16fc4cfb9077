"""Signals at every stage of a run, and a parent that dies: what is left, and what is resumable."""

import fcntl
import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchclf.engines.local import process, sender, supervisor, watcher
from batchclf.errors import Interrupted
from batchclf.results.files import RunFiles
from batchclf.results.lock import RENEW_S, only_writer
from batchclf.system.interrupt import REPEAT_S, SIGNALS, StopRequest
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
from tests.tiny import assert_same_records

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


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What a test starts hears SIGHUP, also where the tests themselves run under `nohup`."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)  # unlike SIG_IGN, not inherited
    yield
    signal.signal(signal.SIGHUP, before)


def assert_stopped(run: Run, number: int = signal.SIGTERM) -> None:
    """It ends as promised and leaves no process; whether in 8 s, the fault harness measures."""
    exit_code = run.end(timeout=20)
    counts_as = signal.Signals(SIGNALS[number])
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


@pytest.mark.parametrize("number", SIGNALS)
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
    assert exit_code == 128 + SIGNALS[number], said
    assert "Traceback" not in said


def test_a_signal_that_comes_while_a_class_is_made_is_not_taken_for_a_fault_of_its() -> None:
    """CPython 3.11 makes a RuntimeError of whatever `__set_name__` raises."""

    class Signalling:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), StopRequest().installed():
        type("Owner", (), {"attribute": Signalling()})


def test_a_signal_of_which_native_code_makes_an_error_of_its_own_is_a_stop_all_the_same() -> None:
    """As pydantic does with whatever is raised while it builds a schema."""

    def build() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # noqa: BLE001
            raise ValueError("SchemaError: _StopNow") from None

    with pytest.raises(Interrupted), StopRequest().installed():
        build()


def test_a_fault_that_is_met_while_a_job_is_drained_is_told_as_what_it_is() -> None:
    def fail(stop: StopRequest) -> None:
        with stop.drained_by_caller():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"), StopRequest().installed() as stop:
        fail(stop)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_all_processes_counts_once_and_what_is_in_flight_is_committed(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As the Ctrl-C and the end of a terminal, and as Slurm's signals, which may go to all."""
    backend = "threads" if number == signal.SIGUSR1 else "processes"
    job = write_job(tmp_path, 200, slow=True, loader={"workers": 2, "backend": backend})
    with started(job) as run:
        run.wait_until(has_records(tmp_path / "out"))
        os.killpg(run.process.pid, number)
        assert_stopped(run, number)
    state = run_json(tmp_path / "out")
    num_done = len(read_records(tmp_path / "out"))
    assert state["status"] == "interrupted"
    assert state["durable"]["num_images"] == num_done < 200
    assert "what is under way is finished first" in run.stderr
    assert f"{num_done} of 200 images have a record" in run.stderr
    exit_code, said = finished(job)
    assert exit_code == 0, said
    assert f"resuming after {num_done} of 200" in said
    assert_as_undisturbed(tmp_path)


def test_a_terminal_that_closes_stops_a_run(tmp_path: Path) -> None:
    job = write_job(tmp_path, 200, slow=True)
    ours, theirs = os.openpty()
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with started(job, **streams, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY)) as run:
        os.close(theirs)
        run.wait_until(has_records(tmp_path / "out"))
        os.close(ours)
        assert run.end(timeout=20) == 129
    state = run_json(tmp_path / "out")
    assert (state["status"], state["error"][:17]) == ("interrupted", "stopped by SIGHUP")
    exit_code, said = finished(job)
    assert (exit_code, "resuming after" in said) == (0, True), said
    assert_as_undisturbed(tmp_path)


def test_a_failure_that_is_printed_says_that_a_closed_terminal_interrupted_it(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 200, slow=True)
    with started(job, "--json", stdout=subprocess.PIPE) as run:
        run.wait_until(has_records(tmp_path / "out"))
        run.process.send_signal(signal.SIGHUP)
        assert_stopped(run, signal.SIGHUP)
        assert run.process.stdout is not None
        answer = json.loads(run.process.stdout.read())
        run.process.stdout.close()
    assert (answer["status"], answer["exit_code"]) == ("interrupted", 129)


def test_under_nohup_a_run_goes_on_when_its_terminal_closes(tmp_path: Path) -> None:
    job = write_job(tmp_path, 200, slow=True, loader={"workers": 2, "backend": "processes"})
    with started(job, through=("nohup",)) as run:
        run.wait_until(has_records(tmp_path / "out"))
        os.killpg(run.process.pid, signal.SIGHUP)
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path)


def test_a_signal_while_a_suspect_is_tried_alone_ends_that(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24, loader={"workers": 2, "max_seconds": 2})
    name = hang(tmp_path, "loop")
    with started(job, env=poisoned_environment()) as run:
        run.wait_to_say("to be tried alone")
        run.wait_until(lambda: len(run.members()) == 4)
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


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT], ids=["same", "other"])
def test_a_signal_that_is_repeated_at_once_counts_once(tmp_path: Path, again: int) -> None:
    job = write_job(tmp_path, 200, slow=True)
    # A second for the test's own delays.
    program = "def change(module):\n    module.REPEAT_S = 30.0\n"
    with started(job, env=fault(tmp_path, program, "batchclf.system.interrupt")) as run:
        run.wait_until(has_records(tmp_path / "out"))
        run.process.terminate()
        time.sleep(0.05)
        run.process.send_signal(again)
        assert_stopped(run)
    assert run_json(tmp_path / "out")["status"] == "interrupted"
    exit_code, said = finished(job)
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path)


def test_the_timeout_command_which_signals_twice_is_heard_once(tmp_path: Path) -> None:
    job = write_job(tmp_path, 1200, slow=True)
    predictions = tmp_path / "out" / "predictions.jsonl"
    for _ in range(3):
        num_before = len(predictions.read_bytes().splitlines()) if predictions.exists() else 0
        with started(job, through=("timeout", "--preserve-status", "1000")) as run:
            run.wait_until(has_records(tmp_path / "out", num_before + 1))
            run.process.terminate()  # which it passes on as it does its own
            assert_stopped(run)
        assert run_json(tmp_path / "out")["status"] == "interrupted"
    assert finished(job)[0] == 0
    assert_as_undisturbed(tmp_path)


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
    job = write_job(tmp_path, 24)
    hang(tmp_path, "hang")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until(has_records(tmp_path / "out", 8))
        run.process.terminate()
        time.sleep(REPEAT_S + 0.2)
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


# ---- a file system that hangs --------------------------------------------------------------------


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system of its own; a skip where none is to be had."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    place = folder / "disk"
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def frozen(place: Path) -> Iterator[None]:
    """Within, whoever writes to a file system is stuck in the kernel, and cannot be killed."""
    subprocess.run(["fsfreeze", "--freeze", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place], check=True)


@pytest.mark.parametrize("waits_s", [0.0, RENEW_S + 1], ids=["soon", "while the lease is renewed"])
def test_a_run_whose_output_is_frozen_ends_at_a_signal_all_the_same(
    tmp_path: Path, waits_s: float
) -> None:
    job = write_job(tmp_path, 2000, slow=True)
    with disk(tmp_path) as place, started(job, "-o", str(place / "out")) as run:
        run.wait_until(has_records(place / "out"))
        with frozen(place):
            time.sleep(waits_s)
            sent = time.monotonic()
            run.process.terminate()
            assert run.process.wait(20) == 143, run.stderr
            print(f"ended {time.monotonic() - sent:.1f} s after the signal")
            assert "Traceback" not in run.stderr
        assert run.end() == 143
        exit_code, said = finished(job, "-o", str(place / "out"))
        assert exit_code == 0, said
        assert run_json(place / "out")["status"] == "complete"
        expected = read_records(tmp_path / "undisturbed")
        assert_same_records(read_records(place / "out"), expected)


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
        assert len(members) >= {"threads": 2, "processes": 4}[backend]
        run.process.kill()
        run.process.wait()
        assert_gone(members[1:])
    with only_writer(RunFiles(tmp_path / "out")):
        pass


def test_what_a_stopped_run_may_wait_for_adds_up_to_the_eight_seconds_that_are_promised() -> None:
    drained_s = watcher.DRAIN_S + process.KILL_S
    assert drained_s + supervisor.MARK_STOPPED_S + sender.LAST_STOPPED_S <= 8
