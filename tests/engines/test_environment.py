"""Surroundings that fail: nobody listens, the terminal goes, the disk fails, the folder is gone."""

import os
import pty
import shutil
import termios
from pathlib import Path

import pytest

from tests.engines.common import (
    assert_as_undisturbed,
    fault,
    finished,
    has_records,
    run_json,
    started,
    write_job,
)
from tests.faults.poison import poisoned_environment, write_poison


def test_a_job_goes_on_where_nobody_reads_what_it_says(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    reads, writes = os.pipe()
    os.close(reads)
    with started(job, stdout=writes, stderr=writes) as run:
        os.close(writes)
        assert run.end() == 0
    assert_as_undisturbed(tmp_path)


def test_a_job_runs_with_its_standard_streams_closed(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    closed = 'exec "$@" <&- >&- 2>&-'
    with started(job, through=("sh", "-c", closed, "sh")) as run:
        assert run.end() == 0
    assert_as_undisturbed(tmp_path)


def test_a_job_goes_on_where_its_log_has_no_space(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    with open("/dev/full", "wb") as full, started(job, stderr=full) as run:
        assert run.end() == 0
    assert_as_undisturbed(tmp_path)


def test_a_job_goes_on_where_its_terminal_is_closed(tmp_path: Path) -> None:
    """As under nohup, or in a session of its own: SIGHUP does not end it."""
    job = write_job(tmp_path, 100, slow=True)
    terminal, ours = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    with started(job, env={"TERM": "dumb"}, stdout=ours, stderr=ours) as run:
        os.close(ours)
        said = b""
        while b"/100 [" not in said:
            said += os.read(terminal, 1000)
        os.close(terminal)
        assert run.end() == 0
    assert_as_undisturbed(tmp_path)


def test_an_output_folder_that_is_removed_meanwhile_is_the_environments_failure(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 24)
    image = sorted((tmp_path / "images").iterdir())[12]
    image.unlink()
    write_poison(image, "hang")
    with started(job, env=poisoned_environment()) as run:
        run.wait_until(has_records(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
        assert run.end() == 5, run.stderr
        assert "cannot be written: No such file or directory" in run.stderr
        assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["predictions.jsonl", "run.json"])
def test_a_sync_that_fails_once_ends_the_job_and_the_same_command_finishes_it(
    tmp_path: Path, name: str
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    job = write_job(tmp_path)
    paths = [tmp_path / "out" / one for one in (name, f".{name}.tmp")]
    traced = [part for path in paths for part in ("-P", path)]
    # By run.json's second sync, it says that the run goes on.
    inject = f"inject=fsync:error=EIO:when={2 if name == 'run.json' else 1}"
    strace = ("strace", "-f", "-qq", "-o", str(tmp_path / "calls"), *map(str, traced))
    with started(job, through=(*strace, "-e", inject)) as run:
        assert run.end() == 5, run.stderr
        (line,) = [one for one in run.stderr.splitlines() if "Input/output error" in one]
        assert f"{tmp_path / 'out' / name}: cannot be written" in line
        assert "Traceback" not in run.stderr
    assert "INJECTED" in (tmp_path / "calls").read_text()
    assert run_json(tmp_path / "out")["status"] != "complete"
    exit_code, said = finished(job)
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path)


def test_no_process_to_be_had_is_the_environments_failure(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    program = "def change(module):\n    def start_serving(*args, **kwargs):\n"
    program += "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
    program += "    module.start_serving = start_serving\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, "batchclf.engines.local.process"))
    assert exit_code == 5, said
    assert "the job's process cannot be started: [Errno 11]" in said
    assert "Traceback" not in said
