"""An output that another machine takes over: nothing is written there any more."""

import json
import os
import signal
import threading
import time
from pathlib import Path

from batchclf.engines.local.board import Board
from batchclf.engines.local.worker import FENCE_S, _Channel
from tests.engines.common import (
    Run,
    assert_as_undisturbed,
    fault,
    finished,
    has_records,
    run_json,
    started,
    write_job,
)
from tests.faults.poison import poisoned_environment, write_poison

HASTY = """
def change(module):
    module.LEASE_S, module.RENEW_S, module.SETTLE_S = 2.0, 0.1, 0.1
"""
"""Leases of two seconds."""
LOCK = "batchclf.results.lock"


def take_over(output: Path) -> None:
    """As another machine does, by which the lock is not seen."""
    holder = {"host": "node-17", "pid": 4711, "boot_id": "elsewhere", "since": "", "token": "x"}
    (output / "next").write_text(json.dumps(holder))
    os.replace(output / "next", output / ".lease.json")


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def assert_refused(run: Run) -> None:
    assert run.end() == 2, run.stderr
    assert "another process took it over" in run.stderr


def test_a_job_whose_lease_is_taken_away_writes_no_more(tmp_path: Path) -> None:
    job = write_job(tmp_path, 800, slow=True)
    with started(job, env=fault(tmp_path, HASTY, LOCK)) as run:
        run.wait_until(has_records(tmp_path / "out"))
        take_over(tmp_path / "out")
        assert_refused(run)
    left = contents(tmp_path / "out")
    assert run_json(tmp_path / "out")["status"] == "running", "the other's, not this one's to mark"
    assert json.loads(left[".lease.json"])["host"] == "node-17"
    exit_code, said = finished(job)
    assert exit_code == 2, said
    assert "pid 4711 on host node-17" in said
    assert contents(tmp_path / "out") == left
    (tmp_path / "out" / ".lease.json").unlink()
    assert finished(job)[0] == 0
    assert_as_undisturbed(tmp_path)


def test_a_job_that_stood_still_looks_whether_the_output_is_its_own_before_it_writes(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 800, slow=True)
    with started(job, env=fault(tmp_path, HASTY, LOCK)) as run:
        run.wait_until(has_records(tmp_path / "out"))
        os.killpg(run.process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        take_over(tmp_path / "out")
        left = contents(tmp_path / "out")
        # The worker alone at first, which has records to write by now.
        worker = run.wait_for_worker()
        worker.send_signal(signal.SIGCONT)
        time.sleep(1)
        assert contents(tmp_path / "out") == left
        os.killpg(run.process.pid, signal.SIGCONT)
        assert_refused(run)
    assert contents(tmp_path / "out") == left


def test_a_job_that_stood_still_goes_on_where_the_output_is_still_its_own(tmp_path: Path) -> None:
    job = write_job(tmp_path, 100, slow=True)
    with started(job, env=fault(tmp_path, HASTY, LOCK)) as run:
        run.wait_until(has_records(tmp_path / "out"))
        os.killpg(run.process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(run.process.pid, signal.SIGCONT)
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path)


def test_records_are_held_back_until_the_lease_is_renewed() -> None:
    descriptor = Board.new_descriptor()
    ours, theirs = Board(descriptor), Board(descriptor)
    channel = _Channel(None, theirs)  # type: ignore[arg-type]
    ours.renewed()
    channel.before_write()
    ours._numbers[2] -= int((FENCE_S + 1) * 1e9)
    waiting = threading.Thread(target=channel.before_write, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    ours.renewed()
    waiting.join(10)
    assert not waiting.is_alive()
    os.close(descriptor)


def test_a_second_run_is_refused_and_the_first_one_undisturbed(tmp_path: Path) -> None:
    job = write_job(tmp_path, 24)
    image = sorted((tmp_path / "images").iterdir())[12]
    good = image.read_bytes()
    image.unlink()
    write_poison(image, "hang")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until(has_records(tmp_path / "out", 12))
        left = contents(tmp_path / "out")
        for options in ((), ("--overwrite",)):
            asked = time.monotonic()
            exit_code, said = finished(job, *options)
            print(f"refused after {time.monotonic() - asked:.1f} s")
            assert exit_code == 2, said
            assert f"another batchclf is writing there (pid {run.process.pid} on host " in said
        assert contents(tmp_path / "out")["predictions.jsonl"] == left["predictions.jsonl"]
        assert run.worker() is not None
    image.write_bytes(good)
    assert finished(job)[0] == 0
    assert_as_undisturbed(tmp_path)
