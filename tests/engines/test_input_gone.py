"""An input that goes away while its job runs: the job ends, and no image is to blame."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from batchclf.errors import NoImagesError
from batchclf.spec.options import RunOptions
from tests.conftest import read_records
from tests.engines.common import (
    assert_as_undisturbed,
    finished,
    has_records,
    run_json,
    started,
    write_job,
)
from tests.mounts import dead_mount
from tests.tiny import link_digits, run_here, write_tiny_job

NUM_IMAGES = 120


@contextmanager
def renamed(folder: Path) -> Iterator[None]:
    """Within, nothing is at the folder's path."""
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    yield
    elsewhere.rename(folder)


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """Within, an empty folder is there, as when a disk is unmounted."""
    with renamed(folder):
        folder.mkdir()
        yield
        folder.rmdir()


@pytest.mark.parametrize(
    ("gone", "backend"),
    [
        (renamed, "threads"),
        (replaced, "threads"),
        (dead_mount, "threads"),
        (renamed, "processes"),
    ],
)
def test_a_job_whose_input_goes_away_ends_and_goes_on_when_it_is_back(
    tmp_path: Path, gone: Callable[[Path], Any], backend: str
) -> None:
    loader = {"workers": 2, "backend": backend}
    job = write_job(tmp_path, NUM_IMAGES, slow=True, loader=loader)
    with started(job) as run:
        run.wait_until(has_records(tmp_path / "out"))
        with gone(tmp_path / "images"):
            assert run.end() == 5, run.stderr
    assert f"input: {tmp_path / 'images'}: is no longer the folder" in run.stderr
    assert run_json(tmp_path / "out")["status"] == "failed"
    written = read_records(tmp_path / "out")
    assert 0 < len(written) < NUM_IMAGES
    assert {one["status"] for one in written} == {"ok"}
    code, said = finished(job)
    assert code == 0, said
    assert_as_undisturbed(tmp_path)


def finished_job(folder: Path) -> Path:
    """A finished job of which one image is none, and whose input has gone since."""
    images = link_digits(folder / "images", 6)
    (images / "bad.jpg").write_bytes(b"no image")
    job = write_tiny_job(folder, input=str(images))
    run_here(job)
    shutil.rmtree(images)
    return job


@pytest.mark.parametrize("options", [RunOptions(retry_failed=True), RunOptions(extend=True)])
def test_a_finished_job_whose_input_is_gone_keeps_its_records(
    tmp_path: Path, options: RunOptions
) -> None:
    job = finished_job(tmp_path)
    before = read_records(tmp_path / "out")
    assert run_here(job).was_complete
    with pytest.raises(NoImagesError, match=r"^input: "):
        run_here(job, options)
    assert read_records(tmp_path / "out") == before


def test_records_that_are_lost_with_their_input_are_not_made_up(tmp_path: Path) -> None:
    job = finished_job(tmp_path)
    (tmp_path / "out" / "predictions.jsonl").unlink()
    with pytest.raises(NoImagesError, match=r"^input: "):
        run_here(job)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_an_image_that_goes_away_while_the_job_runs_costs_its_own_record(
    tmp_path: Path, backend: str
) -> None:
    loader = {"workers": 2, "backend": backend}
    job = write_job(tmp_path, NUM_IMAGES, slow=True, loader=loader)
    *_, last = sorted((tmp_path / "images").iterdir())
    with started(job) as run:
        run.wait_until(has_records(tmp_path / "out"))
        last.unlink()
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path, but={last.name: "vanished"})
