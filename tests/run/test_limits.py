"""What may grow from run to run: `--limit`, and what a link may lead to; and what must not stay."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Batchclf, Finished, read_records
from tests.engines.common import has_records, started
from tests.engines.common import write_job as write_slow_job
from tests.tiny import DIGITS, assert_same_records, link_digits, run_here, write_tiny_job


def contents(output: Path) -> dict[str, bytes]:
    """The files of an output that people read."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name[0] != "."}


def succeeded(done: Finished) -> Finished:
    assert done.exit_code == 0, done.stderr
    return done


# ---- --limit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("larger", [("--limit", "50"), ()], ids=["50", "none"])
def test_a_limit_that_grows_is_an_extension(
    batchclf: Batchclf, tmp_path: Path, larger: tuple[str, ...]
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(write_tiny_job(tmp_path, name="whole.yaml", output=str(tmp_path / "whole")))
    predictions = tmp_path / "out" / "predictions.jsonl"
    succeeded(batchclf("run", job, "--limit", "20"))
    first = predictions.read_bytes()
    assert first.count(b"\n") == 20
    grown = succeeded(batchclf("run", job, *larger, "--json")).json
    num_images = 50 if larger else 300
    assert (grown["num_images"], grown["num_new"]) == (num_images, num_images - 20)
    assert predictions.read_bytes().startswith(first)
    expected = read_records(tmp_path / "whole")[:num_images]
    assert_same_records(read_records(tmp_path / "out"), expected)
    again = succeeded(batchclf("run", job, *larger, "--json")).json
    assert again["was_complete"] is True


def test_a_limit_that_grows_before_the_job_was_finished_loses_nothing(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_slow_job(tmp_path, 200, slow=True)
    out = tmp_path / "out"
    with started(job, "--limit", "150") as run:
        run.wait_until(has_records(out, 8))
        run.process.kill()
    succeeded(batchclf("run", job))
    assert_same_records(read_records(out), read_records(tmp_path / "undisturbed"))


@pytest.mark.parametrize("first", [("--limit", "20"), ()], ids=["20", "none"])
def test_a_limit_that_shrinks_is_refused(
    batchclf: Batchclf, tmp_path: Path, first: tuple[str, ...]
) -> None:
    job = write_tiny_job(tmp_path)
    succeeded(batchclf("run", job, *first))
    before = contents(tmp_path / "out")
    refused = batchclf("run", job, "--limit", "10")
    assert refused.exit_code == 2, refused.stderr
    assert "limit" in refused.stderr
    assert "10" in refused.stderr
    assert contents(tmp_path / "out") == before


def test_a_limit_that_has_grown_does_not_shrink_again(batchclf: Batchclf, tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    succeeded(batchclf("run", job, "--limit", "20"))
    succeeded(batchclf("run", job, "--limit", "50"))
    before = contents(tmp_path / "out")
    refused = batchclf("run", job, "--limit", "20")
    assert refused.exit_code == 2, refused.stderr
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("larger", [("--limit", "50"), ()], ids=["50", "none"])
@pytest.mark.parametrize("shard", ["0/2", "1/2"])
def test_the_limit_of_a_shard_does_not_grow(
    batchclf: Batchclf, tmp_path: Path, shard: str, larger: tuple[str, ...]
) -> None:
    """Its bounds would move, and those of the other ones."""
    job = write_tiny_job(tmp_path)
    succeeded(batchclf("run", job, "--shard", "0/2", "--limit", "20"))
    before = contents(tmp_path / "out")
    refused = batchclf("run", job, "--shard", shard, *larger)
    assert refused.exit_code == 2, refused.stderr
    assert "limit" in refused.stderr
    assert contents(tmp_path / "out") == before


def test_a_whole_job_is_not_extended_over_shards(batchclf: Batchclf, tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    for shard in ("0/2", "1/2"):
        succeeded(batchclf("run", job, "--shard", shard, "--limit", "20"))
    before = contents(tmp_path / "out")
    refused = batchclf("run", job)
    assert refused.exit_code == 2, refused.stderr
    assert contents(tmp_path / "out") == before


# ---- links that lead out of the input ------------------------------------------------------------


def job_with_outside_links(folder: Path, **keys: Any) -> Path:
    """Six images, of which two are links that lead out of the folder."""
    images = folder / "images"
    if not images.exists():
        link_digits(images, 4)
        for number in range(2):
            (images / f"link-{number}.jpg").symlink_to(DIGITS / "0" / "0079.jpg")
    return write_tiny_job(folder, input=str(images), **keys)


def test_links_are_followed_once_the_job_allows_it_and_the_failed_ones_are_tried_again(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    """As the message of their records advises."""
    out = tmp_path / "out"
    succeeded(batchclf("run", job_with_outside_links(tmp_path)))
    before = read_records(out)
    assert [one.get("error", {}).get("code") for one in before[4:]] == ["outside_root"] * 2
    assert "loader.allow_outside_links: true" in before[4]["error"]["message"]
    allowing = job_with_outside_links(tmp_path, loader={"allow_outside_links": True})
    succeeded(batchclf("run", allowing, "--retry-failed"))
    after = read_records(out)
    assert after[:4] == before[:4]
    assert [one["status"] for one in after] == ["ok"] * 6
    again = succeeded(batchclf("run", allowing, "--json"))
    assert again.json["was_complete"] is True
    assert again.json["num_ok"] == 6


# ---- temporary files of a killed run -------------------------------------------------------------

OWN = (".predictions.jsonl.tmp", ".run.json.tmp", ".retry.jsonl", "..lease.json.tmp")
SHARD = "-00001-of-00002"
OTHERS = (f".predictions{SHARD}.jsonl.tmp", f".run{SHARD}.json.tmp", f".retry{SHARD}.jsonl")


def leave(output: Path, *names: str) -> None:
    """Files as a killed run leaves them."""
    for name in names:
        (output / name).write_bytes(b"left by a killed run\n")


@pytest.mark.parametrize("how", ["complete", "unfinished", "--overwrite", "--retry-failed"])
def test_temporary_files_of_a_killed_run_do_not_outlive_the_next(
    batchclf: Batchclf, tmp_path: Path, how: str
) -> None:
    job = write_tiny_job(tmp_path)
    out = tmp_path / "out"
    succeeded(batchclf("run", job))
    usual = set(os.listdir(out))
    if how == "unfinished":
        predictions = out / "predictions.jsonl"
        predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:7]))
    leave(out, *OWN)
    succeeded(batchclf("run", job, *([how] if how.startswith("--") else [])))
    assert set(os.listdir(out)) == usual
    assert len(read_records(out)) == 300


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["run", "overwrite"])
def test_temporary_files_of_another_shard_stay(
    batchclf: Batchclf, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """It may be at work."""
    job = write_tiny_job(tmp_path)
    out = tmp_path / "out"
    succeeded(batchclf("run", job, "--shard", "0/2"))
    usual = set(os.listdir(out))
    own = ".predictions-00000-of-00002.jsonl.tmp"
    leave(out, own, *OTHERS)
    succeeded(batchclf("run", job, "--shard", "0/2", *options))
    assert set(os.listdir(out)) == usual | set(OTHERS)
    run = json.loads((out / "run-00000-of-00002.json").read_bytes())
    assert run["status"] == "complete"
