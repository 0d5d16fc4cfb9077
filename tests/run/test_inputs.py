"""The same images, wherever they lie, have the same records."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Batchclf, read_records
from tests.tiny import DIGITS, assert_same_records, run_here, write_tiny_job


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two folders of a few images each."""
    images = sorted(path for path in DIGITS.rglob("*") if path.is_file())
    for number, path in enumerate(images[:8]):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "photos"


def records_of(folder: Path, job_input: Any) -> list[dict[str, Any]]:
    """What a job with this input writes."""
    folder.mkdir()
    run_here(write_tiny_job(folder, input=job_input))
    return read_records(folder / "out")


def test_a_tar_archive_has_the_records_of_the_folder_that_it_holds(
    tmp_path: Path, photos: Path
) -> None:
    expected = records_of(tmp_path / "folder", str(photos))
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in sorted(photos.rglob("*.*")):
            archive.add(path, path.relative_to(photos))
    found = records_of(tmp_path / "tar", str(tmp_path / "all.tar"))
    assert_same_records(found, [one | {"path": f"all.tar/{one['path']}"} for one in expected])


def test_several_inputs_are_one_relative_to_the_folder_around_them(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    expected = records_of(tmp_path / "folder", str(photos))
    both = [str(photos / "a"), str(photos / "b"), str(photos / "a" / "*")]
    assert_same_records(records_of(tmp_path / "both", both), expected)
    job = write_tiny_job(tmp_path)
    batchclf("run", job, "-i", both[0], "-i", both[1])
    assert_same_records(read_records(tmp_path / "out"), expected)


def test_a_list_relative_to_the_working_folder_is_taken_and_said_and_resumed_from_another(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    expected = [
        one | {"path": f"photos/{one['path']}"}
        for one in records_of(tmp_path / "folder", str(photos))
    ]
    (tmp_path / "lists").mkdir()
    names = "".join(f"{one['path']}\n" for one in expected)
    (tmp_path / "lists" / "all.txt").write_text(names)
    job = write_tiny_job(tmp_path / "lists", input="all.txt")
    said = f"its paths are relative to {tmp_path}, not to its own folder"
    assert said in batchclf("validate", job, cwd=tmp_path).stderr
    done = batchclf("run", job, cwd=tmp_path)
    assert said in done.stderr
    assert_same_records(read_records(tmp_path / "lists" / "out"), expected)
    predictions = tmp_path / "lists" / "out" / "predictions.jsonl"
    predictions.write_bytes(predictions.read_bytes().splitlines(keepends=True)[0])
    assert batchclf("run", job, cwd=ROOT).exit_code == 0
    assert_same_records(read_records(tmp_path / "lists" / "out"), expected)


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_list_of_files_that_are_nowhere_ends_with_exit_code_2_before_any_work(
    tmp_path: Path, photos: Path, batchclf: Batchclf, command: str
) -> None:
    (tmp_path / "all.txt").write_text("".join(f"fotos/{n}.jpg\n" for n in range(14)))
    done = batchclf(command, write_tiny_job(tmp_path, input="all.txt"), cwd=photos)
    assert done.exit_code == 2
    assert "fotos/0.jpg: it is not below" in done.stderr
    assert f"below {tmp_path}, nor below {photos};" in done.stderr
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
