"""Shards joined: the bytes of one run, or a refusal that names what is missing."""

import json
import shutil
from pathlib import Path

import pytest

from batchclf.commands.merge import merge_shards
from batchclf.errors import EnvironmentFailed, ResumeRefused, UsageError
from batchclf.results.files import RunFiles
from batchclf.results.records import Shard
from batchclf.results.run_record import read_run
from batchclf.results.writer import last_summary
from batchclf.spec.options import RunOptions
from tests.conftest import Batchclf, read_records
from tests.faults import merged_shards
from tests.tiny import run_here, write_tiny_job

COUNT = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, the output of its shards, and that of a run without: whole."""
    folder = tmp_path_factory.mktemp("shards")
    job = write_tiny_job(folder)
    for index in range(COUNT):
        run_here(job, RunOptions(shard=Shard(index, COUNT)))
    whole = tmp_path_factory.mktemp("whole")
    run_here(write_tiny_job(whole))
    (whole / "out").rename(folder / "whole")
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of what the shards wrote."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def test_merged_shards_are_the_bytes_of_one_run(finished: Path, out: Path) -> None:
    merged = merge_shards(out)
    assert (out / "predictions.jsonl").read_bytes() == (
        finished / "whole" / "predictions.jsonl"
    ).read_bytes()
    assert (merged.num_shards, merged.num_images, merged.num_errors) == (COUNT, 300, 0)
    record, whole = read_run(RunFiles(out)), read_run(RunFiles(finished / "whole"))
    assert record is not None
    assert whole is not None
    assert record.status == "complete"
    assert record.fingerprint.num_images == whole.fingerprint.num_images == 300
    assert record.fingerprint.listing == whole.fingerprint.listing
    assert [one.first for one in record.segments] == [0, 100, 200]
    summary = last_summary(RunFiles(out))
    assert summary is not None
    assert (summary.num_images, summary.num_new, summary.num_ok) == (300, 300, 300)


def test_shards_of_which_one_was_killed_are_merged_to_the_bytes_of_one_run(tmp_path: Path) -> None:
    merged_shards.check(tmp_path / "0", num_shards=3, num_killed=1, num_images=600, seed=0)


def test_merging_again_changes_nothing(out: Path) -> None:
    merge_shards(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    merge_shards(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_merged_job_and_its_shards_are_complete_for_whoever_runs_them_again(
    finished: Path, out: Path, batchclf: Batchclf
) -> None:
    merge_shards(out)
    for shard in ((), ("--shard", "1/3")):
        again = batchclf("run", finished / "job.yaml", "-o", out, *shard)
        assert again.exit_code == 0, again.stderr
        assert "already complete" in again.stderr


def test_the_failed_images_of_a_merged_job_are_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(Path("samples/digits"), folder)
    victim = sorted(folder.rglob("*.jpg"))[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[:200])
    job = write_tiny_job(tmp_path, input=str(folder))
    for index in range(2):
        run_here(job, RunOptions(shard=Shard(index, 2)))
    assert merge_shards(tmp_path / "out").num_errors == 1
    victim.write_bytes(content)
    for _ in range(2):
        run_here(job, RunOptions(retry_failed=True))
    assert all(record["status"] == "ok" for record in read_records(tmp_path / "out"))
    record = read_run(RunFiles(tmp_path / "out"))
    assert record is not None
    assert record.num_merged == 2


def test_a_merged_job_is_not_begun_anew_beside_its_shards(
    finished: Path, out: Path, batchclf: Batchclf
) -> None:
    merge_shards(out)
    refused = batchclf("run", finished / "job.yaml", "-o", out, "--overwrite")
    assert refused.exit_code == 2
    assert "divided otherwise" in refused.stderr


def test_shards_that_are_not_complete_are_named_with_how_far_they_are(out: Path) -> None:
    for path in out.glob("*-00001-of-00003*"):
        path.unlink()
    run = out / "run-00002-of-00003.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "interrupted"}))
    with pytest.raises(ResumeRefused, match="not all of the 3 shards are complete") as caught:
        merge_shards(out)
    assert "not begun: 1" in str(caught.value)
    assert "interrupted: 2" in str(caught.value)
    assert not (out / "predictions.jsonl").exists()


def test_a_shard_that_runs_is_named_with_its_host(out: Path) -> None:
    run = out / "run-00002-of-00003.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"status": "running"}))
    with pytest.raises(ResumeRefused, match="stopped without a word: 2"):
        merge_shards(out)
    (out / ".lease-00002-of-00003.json").write_text('{"host": "node-7"}')
    with pytest.raises(ResumeRefused, match="running on host node-7: 2"):
        merge_shards(out)


def test_a_shard_of_another_job_is_refused(out: Path) -> None:
    run = out / "run-00002-of-00003.json"
    record = json.loads(run.read_text())
    record["fingerprint"]["top_k"] = 2
    run.write_text(json.dumps(record))
    with pytest.raises(ResumeRefused, match="top_k: was 2, is 5"):
        merge_shards(out)


@pytest.mark.parametrize("damage", ["torn", "doubled", "swapped", "gone"])
def test_a_shard_with_other_records_than_it_should_have_is_refused(out: Path, damage: str) -> None:
    records = out / "predictions-00001-of-00003.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    content = {
        "torn": b"".join(lines)[:-1],
        "doubled": b"".join([*lines, lines[-1]]),
        "swapped": b"".join([lines[1], lines[0], *lines[2:]]),
        "gone": None,
    }[damage]
    if content is None:
        records.unlink()
    else:
        records.write_bytes(content)
    with pytest.raises(EnvironmentFailed, match="--shard 1/3 --overwrite"):
        merge_shards(out)
    assert not [path.name for path in out.iterdir() if path.name.startswith(("pred", ".pred"))][3:]


def test_what_another_job_wrote_there_is_not_replaced(finished: Path, out: Path) -> None:
    shutil.copy(finished / "whole" / "predictions.jsonl", out)
    with pytest.raises(ResumeRefused, match="was not merged from these shards"):
        merge_shards(out)


def test_a_folder_without_shards_is_a_mistake(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no shards"):
        merge_shards(finished / "whole")
    with pytest.raises(UsageError, match="is no folder"):
        merge_shards(tmp_path / "nothing")


def test_shards_of_an_environment_are_merged_by_the_command(
    finished: Path, tmp_path: Path, batchclf: Batchclf
) -> None:
    out = tmp_path / "out"
    for index in range(2):
        env = {"CLOUD_RUN_TASK_INDEX": str(index), "CLOUD_RUN_TASK_COUNT": "2"}
        run = batchclf("run", finished / "job.yaml", "-o", out, env=env)
        assert run.exit_code == 0, run.stderr
        assert f"shard {index}/2, as Cloud Run says: CLOUD_RUN_TASK_INDEX={index}" in run.stderr
    merged = batchclf("merge", out, "--json")
    assert merged.exit_code == 0, merged.stderr
    assert json.loads(merged.stdout)["num_images"] == 300
    assert merged.stderr == ""
