"""Runs that cross each other, or die between two steps: nothing is lost, doubled or mixed."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from batchclf.errors import EnvironmentFailed, NoImagesError, ResumeRefused
from batchclf.results.records import ImageRef, Shard
from batchclf.results.run_record import RunRecord, write_run
from batchclf.run import claim, retry
from batchclf.run.classify import Sink, Work, classify
from batchclf.run.decide import Append, decide
from batchclf.run.look import listed, look
from batchclf.run.ready import make_ready
from batchclf.run.request import Run
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.conftest import read_records
from tests.tiny import Log, link_digits, run_here, write_tiny_job


@contextmanager
def changed(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, value: object
) -> Iterator[None]:
    """Within, a module's name is something else."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, value)
        yield


def add(images: Path, *names: str) -> None:
    some = next(images.iterdir()).read_bytes()
    for name in names:
        (images / name).write_bytes(some)


# ---- listings ------------------------------------------------------------------------------------


def test_a_shard_whose_listing_was_removed_is_not_made_of_another(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 10)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job, RunOptions(Shard(0, 2)))
    (tmp_path / "out" / "listing.nul").unlink()
    run_here(job, RunOptions(Shard(1, 2)))  # the same listing, made once more
    (tmp_path / "out" / "listing.nul").unlink()
    (tmp_path / "out" / "run-00001-of-00002.json").unlink()
    (tmp_path / "out" / "predictions-00001-of-00002.jsonl").unlink()
    add(images, "000000-new.jpg")
    with pytest.raises(ResumeRefused, match="it was removed, or the input has changed"):
        run_here(job, RunOptions(Shard(1, 2)))
    assert not (tmp_path / "out" / "listing.nul").exists()


def test_a_listing_that_another_shard_began_with_meanwhile_is_not_thrown_away(
    tmp_path: Path,
) -> None:
    images = link_digits(tmp_path / "images", 10)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job, RunOptions(Shard(1, 2)))
    options = RunOptions(Shard(1, 2), overwrite=True)
    slow = Run(load_job(job), options, Log(), StopRequest())
    found = look(slow)
    with listed(found) as listing:
        todo = decide(found, listing)
        assert isinstance(todo, Append)
        ready = make_ready(found, listing, todo)
        run_here(job, RunOptions(Shard(0, 2)))
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
        with pytest.raises(ResumeRefused, match="run the same command again"):
            claim.claim(found, listing, ready)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")} == before
    run_here(job, options)
    paths = [one["path"] for k in (0, 1) for one in shard_records(tmp_path, k)]
    assert paths == sorted(path.name for path in images.iterdir())


def shard_records(folder: Path, index: int) -> list[dict[str, Any]]:
    return read_records(folder / "out", f"predictions-{index:05d}-of-00002.jsonl")


def test_a_folder_is_divided_in_one_way_only(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(Shard(0, 2)))
    for shard in (Shard(0, 3), Shard()):
        for overwrite in (False, True):
            with pytest.raises(ResumeRefused, match=r"run-00000-of-00002\.json is there"):
                run_here(job, RunOptions(shard, overwrite=overwrite))
    run_here(job, RunOptions(Shard(1, 2)))


def test_a_grown_limit_that_died_before_run_json_said_so_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=20))
    first = (tmp_path / "out" / "predictions.jsonl").read_bytes()

    def full(*_: object) -> None:
        raise EnvironmentFailed("no space left")

    for limit in (40, 50):
        with (
            changed(monkeypatch, claim, "write_run", full),
            pytest.raises(EnvironmentFailed, match="no space"),
        ):
            run_here(job, RunOptions(limit=limit))
    with pytest.raises(ResumeRefused, match="limit: was 50, is 20"):
        run_here(job, RunOptions(limit=20))
    assert run_here(job, RunOptions(limit=50)).summary.num_images == 50
    assert run_here(job).summary.num_images == 300
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes().startswith(first)


def test_a_job_can_be_extended_again_and_again(tmp_path: Path) -> None:
    """What a listing says of itself does not grow with every extension."""
    images = link_digits(tmp_path / "images", 2)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    sizes = []
    for number in range(4):
        add(images, f"new-{number}.jpg")
        run_here(job, RunOptions(extend=True))
        data = (tmp_path / "out" / "listing.nul").read_bytes()
        sizes.append(len(data.rpartition(b"\0")[2]))
    assert len(read_records(tmp_path / "out")) == 6
    assert len(set(sizes)) == 1


def test_a_list_of_which_nothing_is_there_is_no_input(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 5)
    names = tmp_path / "list.txt"
    names.write_text("".join(f"{path}\n" for path in sorted(images.iterdir())))
    job = write_tiny_job(tmp_path, input=str(names))
    run_here(job)
    before = read_records(tmp_path / "out")
    images.rename(tmp_path / "away")
    assert run_here(job).was_complete
    (tmp_path / "out" / "predictions.jsonl").rename(tmp_path / "kept.jsonl")
    for options in (RunOptions(), RunOptions(overwrite=True), RunOptions(extend=True)):
        with pytest.raises(NoImagesError, match=r"first 5 files of the list are no(t| longer) th"):
            run_here(job, options)
    (tmp_path / "away").rename(images)
    run_here(job)
    assert read_records(tmp_path / "out") == before


# ---- retries -------------------------------------------------------------------------------------


def job_with_failures(folder: Path, **loader: Any) -> Path:
    """A job of 12 images, of which 4 are bad."""
    images = folder / "images"
    if not images.exists():
        link_digits(images, 12)
        for path in sorted(images.iterdir())[3:7]:
            path.unlink()
            path.write_bytes(b"")
    return write_tiny_job(folder, input=str(images), loader=loader, batch_size=4)


def mend(folder: Path) -> None:
    good, *bad = sorted((folder / "images").iterdir())[2:7]
    for path in bad:
        path.write_bytes(good.read_bytes())


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 0),
    "shortened": lambda path: path.write_bytes(path.read_bytes().split(b"\n", 2)[2]),
    "doubled": lambda path: path.write_bytes(2 * path.read_bytes()),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_records_that_somebody_changes_during_a_retry_are_not_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    job = job_with_failures(tmp_path)
    run_here(job)
    mend(tmp_path)
    predictions = tmp_path / "out" / "predictions.jsonl"

    def classify_and_change(work: Work, refs: Iterator[ImageRef], sink: Sink) -> None:
        classify(work, refs, sink)
        CHANGES[change](predictions)

    with (
        changed(monkeypatch, retry, "classify", classify_and_change),
        pytest.raises(EnvironmentFailed) as failed,
    ):
        run_here(job, RunOptions(retry_failed=True))
    assert f"output: {predictions}" in str(failed.value)
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["status"] == "failed"
    run_here(job)
    assert [one["status"] for one in read_records(tmp_path / "out")].count("ok") in (8, 12)
    assert len(read_records(tmp_path / "out")) == 12


def test_records_of_another_attempt_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_with_failures(tmp_path)
    run_here(job)
    mend(tmp_path)
    options = RunOptions(retry_failed=True)

    def stop(*_: object) -> None:
        raise EnvironmentFailed("stopped")

    strict = job_with_failures(tmp_path, max_bytes=10)  # all are too large by now
    with (
        changed(monkeypatch, retry, "replace_failed", stop),
        pytest.raises(EnvironmentFailed, match="stopped"),
    ):
        run_here(strict, options)
    job = job_with_failures(tmp_path)

    def write_and_stop(files: Any, record: RunRecord) -> None:
        write_run(files, record)
        stop()

    with (
        changed(monkeypatch, claim, "write_run", write_and_stop),
        pytest.raises(EnvironmentFailed, match="stopped"),
    ):
        run_here(job, options)
    summary = run_here(job, options).summary
    assert (summary.num_ok, summary.num_new) == (12, 4)
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert run["retry"] is None
    assert [one["codes"] for one in run["retries"]] == [["empty_file"]]
