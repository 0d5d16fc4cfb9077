"""How far a job is, told from its folder: whole, in shards, at work, killed, finished."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from batchclf.commands.status import status_of
from batchclf.errors import UsageError
from batchclf.results.records import Shard
from batchclf.spec.options import RunOptions
from tests.conftest import Batchclf
from tests.engines.common import started
from tests.tiny import DIGITS, SLOW, link_digits, run_here, tiny_model, write_tiny_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job of 300 images, one of them broken."""
    folder = tmp_path_factory.mktemp("status")
    shutil.copytree(DIGITS, folder / "in")
    sorted((folder / "in").rglob("*.jpg"))[7].write_bytes(b"no image")
    run_here(write_tiny_job(folder, input=str(folder / "in")))
    return folder / "out"


def test_a_finished_job_is_complete_with_its_figures(finished: Path) -> None:
    status = status_of(finished)
    assert (status.state, status.num_images, status.num_done) == ("complete", 300, 300)
    assert status.errors_by_code == {"not_an_image": 1}
    assert status.left_s is None
    (part,) = status.parts
    assert part.shard is None
    assert part.device == "CPUExecutionProvider (CPU)"


def test_the_command_says_it_in_lines_and_as_json(finished: Path, batchclf: Batchclf) -> None:
    said = batchclf("status", finished)
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith(
        "state:   complete\nimages:  300 of 300, 1 errors, 1 not_an_image"
    )
    said = batchclf("status", finished, "--json", "--watch")
    assert json.loads(said.stdout)["num_done"] == 300


def test_the_nodes_that_work_on_a_job_are_told_with_their_rates(
    finished: Path, tmp_path: Path, batchclf: Batchclf
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    summary = json.loads((out / "stats.jsonl").read_text().splitlines()[-1])
    figures = [("one", 2.5), ("gone", 9.0), None, ("two", 30.0), ("one", 20.0), None]
    with (out / "stats.jsonl").open("w") as file:
        for one in figures:
            line = {**summary, "type": "interval"}
            if one is not None:
                line |= {"type": "node", "node": one[0], "images_per_s": one[1]}
            file.write(json.dumps(line) + "\n")
        file.write('{"type":"node","node":"half')
    assert status_of(out).parts[0].nodes == {"one": 20.0, "two": 30.0}
    said = batchclf("status", out).stdout
    assert "node:    one: 20.0 images/s\nnode:    two: 30.0 images/s" in said


def test_figures_of_two_runs_tell_no_rate_of_now(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    run = out / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    lease = {"host": "node-7", "pid": 1, "boot_id": "another"}
    (out / ".lease.json").write_text(json.dumps(lease))
    summary = json.loads((out / "stats.jsonl").read_text().splitlines()[-1])

    def rate_now(*startups: float) -> float | None:
        with (out / "stats.jsonl").open("w") as file:
            for startup_s, wall_s, num_new in zip(startups, (5, 10), (30, 80), strict=True):
                line = {"type": "interval", "startup_s": startup_s, "wall_s": wall_s}
                file.write(f"{json.dumps(summary | line | {'num_new': num_new})}\n")
        return status_of(out).images_per_s_now

    assert rate_now(1.0, 1.0) == 10.0
    assert rate_now(1.0, 2.0) is None


def test_a_job_at_work_is_seen_from_outside_and_is_stale_once_it_is_killed(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "in", 40_000)
    job = write_tiny_job(tmp_path, input=str(images), model=tiny_model(tmp_path, **SLOW))
    with started(job) as run:
        run.wait_until((tmp_path / "out" / "predictions.jsonl").exists)
        status = status_of(tmp_path / "out")
        assert status.state == "running"
        (part,) = status.parts
        assert part.pid == run.process.pid
        assert status.num_images == 40_000
        os.killpg(run.process.pid, signal.SIGKILL)
        run.end()
    assert status_of(tmp_path / "out").state == "stale"


def test_what_a_run_wrote_that_was_stopped_before_its_first_figures_is_counted(
    tmp_path: Path,
) -> None:
    images = link_digits(tmp_path / "in", 4_000)
    job = write_tiny_job(tmp_path, input=str(images), model=tiny_model(tmp_path, **SLOW))
    with started(job) as run:
        run.wait_until((tmp_path / "out" / "predictions.jsonl").exists)
        run.process.terminate()
        assert run.end() == 143
    num_written = len((tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines())
    status = status_of(tmp_path / "out")
    assert (status.state, status.num_done) == ("interrupted", num_written)


def test_a_shard_that_failed_does_not_end_the_watch_over_one_that_runs(
    tmp_path: Path, batchclf: Batchclf
) -> None:
    job = write_tiny_job(tmp_path)
    for index in range(2):
        run_here(job, RunOptions(shard=Shard(index, 2)))
    for index, status in enumerate(("failed", "running")):
        run = tmp_path / "out" / f"run-0000{index}-of-00002.json"
        run.write_text(json.dumps(json.loads(run.read_text()) | {"status": status}))
    lease = tmp_path / "out" / ".lease-00001-of-00002.json"
    lease.write_text(json.dumps({"host": "node-7", "pid": 1, "boot_id": "another"}))
    with pytest.raises(subprocess.TimeoutExpired):
        batchclf("status", tmp_path / "out", "--watch", timeout=4)


def test_shards_are_told_one_by_one_and_in_all(tmp_path: Path, batchclf: Batchclf) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(shard=Shard(1, 4)))
    run = tmp_path / "out" / "run-00002-of-00004.json"
    record = json.loads((tmp_path / "out" / "run-00001-of-00004.json").read_text())
    begun = {"durable": {"num_bytes": 0, "num_images": 0, "boot_id": ""}}
    run.write_text(json.dumps(record | begun | {"status": "failed", "error": "the disk is full"}))
    status = status_of(tmp_path / "out")
    assert status.state == "failed"
    assert [part.state for part in status.parts] == ["not begun", "complete", "failed", "not begun"]
    assert [part.num_images for part in status.parts] == [75, 75, 75, 75]
    assert (status.num_images, status.num_done) == (300, 75)
    said = batchclf("status", tmp_path / "out").stdout
    assert "state:   failed, 4 shards\n" in said
    assert "complete: 1\nnot begun: 0, 3\n" in said
    assert "2/4 failed: 0 of 75: the disk is full" in said


def test_a_lease_of_another_machine_is_held_as_long_as_it_is_renewed(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    run = tmp_path / "out" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    assert status_of(tmp_path / "out").state == "stale", "there is no lease"
    lease = tmp_path / "out" / ".lease.json"
    lease.write_text(json.dumps({"host": "node-7", "pid": 1, "boot_id": "another"}))
    status = status_of(tmp_path / "out")
    assert (status.state, status.parts[0].host) == ("running", "node-7")
    an_hour_ago = lease.stat().st_mtime - 3600
    os.utime(lease, (an_hour_ago, an_hour_ago))
    assert status_of(tmp_path / "out").state == "stale"


def test_a_folder_without_a_job_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        status_of(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        status_of(tmp_path / "nothing")
