"""Records that somebody moves, empties or rewrites while the run that writes them goes on.

The images take long to be read, so that the run lasts as long as it is to.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from batchclf.results.files import RunFiles
from tests.conftest import Batchclf, read_records
from tests.engines.common import assert_as_undisturbed, run_json, started, write_job
from tests.faults.machines import Machines, make_machines

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles what is preloaded")

COMMANDS = {
    "mv": ("mv", "{file}", "{file}.moved"),
    "truncate": ("truncate", "-s", "0", "{file}"),
    "sed": ("sed", "-i", 's/"status"/"status"/', "{file}"),
}
IMAGE_US = 100_000
NUM_IMAGES = {"at a sync": 160, "at the end": 40}
"""By two workers, 160 take 8 s, and what is written is synced every 5 s; 40 take 2 s."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    return make_machines(tmp_path_factory.mktemp("machines"))


def disturbed(
    job: Path, file: Path, command: str, *options: str, env: dict[str, str]
) -> tuple[int, str, int]:
    """Run a job that writes `file`, changed by a command after the first records.

    Returns:
        the exit code, what it printed, and how many records it has written since.
    """
    written = file.with_name("written")  # keeps what no name leads to any more
    with started(job, *options, env=env) as run:
        run.wait_until(lambda: file.exists() and file.read_bytes().count(b"\n") >= 4)
        os.killpg(run.process.pid, signal.SIGSTOP)  # or it could end meanwhile
        os.link(file, written)
        subprocess.run([part.format(file=file) for part in COMMANDS[command]], check=True)
        os.killpg(run.process.pid, signal.SIGCONT)
        code = run.end()
        num_written = written.read_bytes().count(b"\n")
        written.unlink()
        return code, run.stderr, num_written


def assert_told(code: int, said: str, file: Path) -> None:
    """It ended as one whose output failed."""
    assert code == 5, said
    assert str(file) in said
    assert "Traceback" not in said
    assert run_json(file.parent)["status"] == "failed"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("moment", NUM_IMAGES)
def test_records_that_are_no_longer_what_was_written_fail_the_run_and_are_made_again(
    batchclf: Batchclf, machines: Machines, tmp_path: Path, moment: str, command: str
) -> None:
    num_images = NUM_IMAGES[moment]
    job = write_job(tmp_path, num_images)
    predictions = tmp_path / "out" / "predictions.jsonl"
    slow = machines.slow_files(tmp_path / "images", IMAGE_US)
    code, said, num_written = disturbed(job, predictions, command, env=slow)
    assert_told(code, said, predictions)
    if moment == "at a sync":
        assert num_written < num_images, "it went on to the end"
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    assert_as_undisturbed(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("moment", NUM_IMAGES)
def test_records_of_a_retry_that_are_no_longer_what_was_written_replace_nothing(
    batchclf: Batchclf, machines: Machines, tmp_path: Path, moment: str, command: str
) -> None:
    num_images = NUM_IMAGES[moment]
    job = write_job(tmp_path, num_images)
    files = RunFiles(tmp_path / "out")
    images = tmp_path / "images"
    good = images.rename(tmp_path / "good")
    images.mkdir()
    for path in good.iterdir():
        (images / path.name).touch()
    assert batchclf("run", job).exit_code == 0
    shutil.rmtree(images)
    good.rename(images)
    before = files.predictions.read_bytes()
    assert before.count(b'"empty_file"') == num_images

    slow = machines.slow_files(images, IMAGE_US)
    retry = "--retry-failed"
    code, said, num_written = disturbed(job, files.retry, command, retry, env=slow)
    assert_told(code, said, files.retry)
    if moment == "at a sync":
        assert num_written < num_images, "it went on to the end"
    assert files.predictions.read_bytes() == before
    done = batchclf("run", job, retry)
    assert done.exit_code == 0, done.stderr
    assert_as_undisturbed(tmp_path)


def test_a_copy_of_the_records_that_is_taken_meanwhile_disturbs_nothing(
    machines: Machines, tmp_path: Path
) -> None:
    """Nor does who merely reads them, or changes their times and permissions."""
    job = write_job(tmp_path, 40)
    predictions = tmp_path / "out" / "predictions.jsonl"
    slow = machines.slow_files(tmp_path / "images", IMAGE_US)
    with started(job, env=slow) as run:
        run.wait_until(lambda: predictions.exists() and predictions.read_bytes().count(b"\n") >= 4)
        copy = tmp_path / "copy.jsonl"
        subprocess.run(["cp", "--preserve", predictions, copy], check=True)
        subprocess.run(["touch", predictions], check=True)
        subprocess.run(["chmod", "g+w", predictions], check=True)
        os.link(predictions, tmp_path / "linked.jsonl")
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path)
    assert read_records(tmp_path, "linked.jsonl") == read_records(tmp_path / "out")
