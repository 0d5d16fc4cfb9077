"""jobs/slurm.sh on a real Slurm."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.slurm import WAIT_S, Slurm, missing, slurm
from tests.conftest import ROOT, Batchclf, read_records
from tests.tiny import assert_same_records, link_digits, write_tiny_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
NUM_SHARDS = 4
NUM_IMAGES = 2000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    photos = link_digits(tmp_path / "photos", NUM_IMAGES)
    return write_tiny_job(tmp_path, input=str(photos), preprocess={"resize": 1000, "crop": 1000})


def submit(cluster: Slurm, job: Path) -> str:
    """The number of an array that does a job."""
    array = f"--array=0-{NUM_SHARDS - 1}"
    script = str(ROOT / "jobs" / "slurm.sh")
    arguments = ("sbatch", "--parsable", array, "--cpus-per-task=1", script, str(job))
    return cluster.call(*arguments, cwd=job.parent).strip()


def wait_for_records(job: Path, shard: int) -> None:
    """Until a shard has written some, and not all."""
    path = job.parent / "out" / f"predictions-{shard:05d}-of-{NUM_SHARDS:05d}.jsonl"
    ends_at = time.monotonic() + WAIT_S
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < ends_at, "no record"
        time.sleep(0.02)


def test_a_task_whose_time_is_nearly_up_is_queued_again_and_the_shards_merge(
    cluster: Slurm, job: Path, batchclf: Batchclf
) -> None:
    array = submit(cluster, job)
    wait_for_records(job, 1)
    # As --signal=USR1@60 has it sent. scancel may ask again while the task is queued anew, and
    # then ends with 1; the log tells whether the signal came.
    signal = ["scancel", "--signal=USR1", f"{array}_1"]
    subprocess.run(signal, env=cluster.environment, check=False)
    cluster.wait(array)
    log = (job.parent / f"batchclf-{array}_1.log").read_text()
    assert "stopped by SIG" in log
    assert "resuming after" in log
    assert set(cluster.exit_codes(array).values()) == {"0:0"}
    done = batchclf("merge", job.parent / "out")
    assert done.exit_code == 0, done.stderr
    alone = batchclf("run", job, "-o", job.parent / "alone")
    assert alone.exit_code == 0, alone.stderr
    assert_same_records(read_records(job.parent / "out"), read_records(job.parent / "alone"))


def test_an_array_that_somebody_cancels_is_not_queued_again(cluster: Slurm, job: Path) -> None:
    array = submit(cluster, job)
    wait_for_records(job, 0)
    cluster.call("scancel", array)
    cluster.wait(array)
    # Their scripts, which alone could queue them again, have ended.
    told = cluster.call("scontrol", "show", "job", array)
    states = {*re.findall(r"\bJobState=(\w+)", told)}
    assert {"CANCELLED"} <= states <= {"CANCELLED", "COMPLETED"}
    assert {*re.findall(r"\bRestarts=(\d+)", told)} == {"0"}
