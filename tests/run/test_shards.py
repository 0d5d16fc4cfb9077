"""Shards of one job: started at once, on one machine or several, and of another job."""

import os
import re
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Batchclf, read_records
from tests.engines.common import started
from tests.faults.machines import LOCKS, Locks, Machines, make_machines
from tests.tiny import assert_same_records, link_digits, run_here, tiny_model, write_tiny_job

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles what is preloaded")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    return make_machines(tmp_path_factory.mktemp("machines"))


def together(
    job: Path, count: int, *environments: dict[str, str], apart_s: float = 0.0
) -> list[tuple[int, str]]:
    """All shards of a job at once: each one's exit code, and what it printed."""
    with ExitStack() as stack:
        runs = []
        for index in range(count):
            if index:
                time.sleep(apart_s)
            shard = f"{index}/{count}"
            runs.append(
                stack.enter_context(started(job, "--shard", shard, env=environments[index]))
            )
        return [(run.end(), run.stderr) for run in runs]


def records_of_shards(output: Path, count: int) -> list[dict[str, Any]]:
    """The records of all shards, one shard after the other."""
    names = [f"predictions-{index:05d}-of-{count:05d}.jsonl" for index in range(count)]
    return [record for name in names for record in read_records(output, name)]


def contents(output: Path) -> dict[str, bytes]:
    """The files of an output that people read."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name[0] != "."}


# ---- at once -------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize("locks", LOCKS)
def test_shards_that_start_while_another_lists_complete_the_job_together(
    machines: Machines, tmp_path: Path, locks: Locks
) -> None:
    """A list that takes about 3 s to be read."""
    images = link_digits(tmp_path / "images", 600)
    listed = tmp_path / "images.txt"
    listed.write_text("".join(f"images/{path.name}\n" for path in sorted(images.iterdir())))
    run_here(write_tiny_job(tmp_path, input=str(listed), output=str(tmp_path / "undisturbed")))
    job = write_tiny_job(tmp_path, input=str(listed))
    slow = machines.slow_names(listed, 4_000)
    environments = [machines.environment(locks, number) | slow for number in range(2)]
    for code, said in together(job, 2, *environments, apart_s=0.3):
        assert code == 0, said
    found = records_of_shards(tmp_path / "out", 2)
    assert len(found) == 600
    assert_same_records(found, read_records(tmp_path / "undisturbed"))


@needs_gcc
@pytest.mark.parametrize("locks", LOCKS)
def test_shards_that_start_at_once_keep_nothing_of_a_run_that_never_began(
    machines: Machines, batchclf: Batchclf, tmp_path: Path, locks: Locks
) -> None:
    images = link_digits(tmp_path / "images", 60)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for number in range(8):
        (wrong / f"broken-{number}.jpg").write_bytes(b"\xff\xd8")
    job = write_tiny_job(tmp_path, input=str(images))
    environments = [machines.environment(locks, number) for number in range(3)]
    options = ("--shard", "0/2", "-i", wrong, "--precision", "int8")
    refused = batchclf("run", job, *options, env=environments[2])
    assert refused.exit_code == 2, refused.stderr
    assert "sampled can be decoded" in refused.stderr
    for code, said in together(job, 2, *environments):
        assert code == 0, said
    found = records_of_shards(tmp_path / "out", 2)
    assert [one["path"] for one in found] == sorted(path.name for path in images.iterdir())
    assert {one["status"] for one in found} == {"ok"}


@needs_gcc
@pytest.mark.parametrize("locks", ["flock", "own machines"])
def test_what_a_shard_left_that_was_killed_while_it_listed_does_not_outlive_its_next_run(
    machines: Machines, tmp_path: Path, locks: Locks
) -> None:
    """Without flock, a killed run's lease holds for 30 s more."""
    images = link_digits(tmp_path / "images", 600)
    job = write_tiny_job(tmp_path, input=str(images))
    out = tmp_path / "out"
    environments = [machines.environment(locks, number) for number in range(2)]
    assert [code for code, _ in together(job, 2, *environments)] == [0, 0]
    usual = set(os.listdir(out))
    shutil.rmtree(out)
    slow = environments[0] | machines.slow_names(images, 10_000)
    with started(job, "--shard", "0/2", env=slow) as run:
        run.wait_until(out.exists)
        time.sleep(2.5)  # of the 6 s that it lists for
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
    assert not (out / "listing.nul").exists()
    for code, said in together(job, 2, *environments):
        assert code == 0, said
    assert len(records_of_shards(out, 2)) == 600
    assert set(os.listdir(out)) == usual


# ---- of another job ------------------------------------------------------------------------------


def changes(folder: Path) -> dict[str, tuple[dict[str, Any], tuple[str, ...], str]]:
    """Keys and options that make another job, and what the refusal calls it."""
    labels = folder / "names of mine.txt"  # no name that is looked for beside a model
    labels.write_text("".join(f"class {index}\n" for index in range(10)))
    other = tiny_model(folder, nan_when_dark=True)
    other["onnx"] = str(Path(other["onnx"]).rename(folder / "other.onnx"))
    model = tiny_model(folder)
    larger = {**model["preprocess"], "resize": 9}
    return {
        "model": ({"model": other}, (), "model"),
        "top_k": ({"top_k": 2}, (), "top_k"),
        "labels": ({"model": {**model, "labels": str(labels)}}, (), "labels"),
        "preprocess": ({"model": {**model, "preprocess": larger}}, (), "preprocess"),
        "precision": ({"precision": "int8", "min_agreement": 0}, (), "precision"),
        "limit": ({}, ("--limit", "20"), "limit"),
        "decode": ({"loader": {"decode": "fast"}}, (), "preprocess"),
    }


CHANGES = ["model", "top_k", "labels", "preprocess", "precision", "limit", "decode"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_of_another_job_is_refused_and_the_refusal_names_what_differs(
    batchclf: Batchclf, tmp_path: Path, change: str
) -> None:
    keys, options, name = changes(tmp_path)[change]
    first = batchclf("run", write_tiny_job(tmp_path), "--shard", "0/2")
    assert first.exit_code == 0, first.stderr
    before = contents(tmp_path / "out")
    other = write_tiny_job(tmp_path, **keys)
    refused = batchclf("run", other, "--shard", "1/2", *options)
    assert refused.exit_code == 2, refused.stderr
    assert re.search(rf"\b{name}(\.\w+)?:? (was )?.+, (is|this job) ", refused.stderr), (
        refused.stderr
    )
    assert "Traceback" not in refused.stderr
    assert contents(tmp_path / "out") == before
    second = batchclf("run", write_tiny_job(tmp_path), "--shard", "1/2")
    assert second.exit_code == 0, second.stderr
    assert len(records_of_shards(tmp_path / "out", 2)) == 300


# ---- without the input ---------------------------------------------------------------------------


def finished_without_input(batchclf: Batchclf, folder: Path, how: str) -> tuple[Path, Path]:
    """A finished job with one error, and its input, which is gone now, or an empty folder."""
    images = link_digits(folder / "images", 12)
    (images / "text.jpg").write_bytes(b"no image")
    given = images
    if how == "list removed":
        given = folder / "images.txt"
        given.write_text("".join(f"images/{path.name}\n" for path in sorted(images.iterdir())))
    job = write_tiny_job(folder, input=str(given))
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    given.unlink() if given.is_file() else shutil.rmtree(given)
    if how == "emptied":
        images.mkdir()
    return job, given


GONE = ["removed", "emptied", "list removed"]


@pytest.mark.parametrize("command", ["--retry-failed", "--extend", "--overwrite", "records lost"])
@pytest.mark.parametrize("how", GONE)
def test_where_the_input_is_gone_nothing_is_done_and_nothing_changed(
    batchclf: Batchclf, tmp_path: Path, how: str, command: str
) -> None:
    job, given = finished_without_input(batchclf, tmp_path, how)
    out = tmp_path / "out"
    if command == "records lost":
        (out / "predictions.jsonl").unlink()
    before = contents(out)
    refused = batchclf("run", job, *(() if command == "records lost" else (command,)))
    assert refused.exit_code in (2, 5), refused.stderr
    assert str(given) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert contents(out) == before


@pytest.mark.parametrize("how", GONE)
def test_a_finished_job_whose_input_is_gone_is_still_complete(
    batchclf: Batchclf, tmp_path: Path, how: str
) -> None:
    job, _ = finished_without_input(batchclf, tmp_path, how)
    before = contents(tmp_path / "out")
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["was_complete"] is True
    assert contents(tmp_path / "out") == before
