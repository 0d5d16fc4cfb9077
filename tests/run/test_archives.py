"""The same images as files, in archives and in Parquet have the same records, whatever happens."""

import os
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from batchclf.errors import NoImagesError
from batchclf.results.records import Shard
from batchclf.spec.options import RunOptions
from tests.conftest import Batchclf, command, read_records
from tests.tiny import DIGITS, SLOW, assert_same_records, run_here, write_tiny_job

NUM_PHOTOS = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in 4 folders, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    for number, path in enumerate(sorted(DIGITS.rglob("*.jpg"))[:NUM_PHOTOS]):
        target = folder / f"s{number // 10}" / f"{number:02d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    damaged = folder / "s1" / "13.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    return folder


# ---- each form, and what a job's `input` is then -------------------------------------------------


def four_tars(photos: Path, where: Path, mode: str = "w", suffix: str = ".tar") -> Any:
    """An archive for each folder."""
    for folder in sorted(photos.iterdir()):
        with tarfile.open(where / f"{folder.name}{suffix}", mode) as archive:  # type: ignore[call-overload]
            for path in sorted(folder.iterdir()):
                archive.add(path, path.relative_to(photos))
    return str(where / f"*{suffix}")


def compressed_tars(photos: Path, where: Path) -> Any:
    return four_tars(photos, where, "w:gz", ".tar.gz")


def one_zip(photos: Path, where: Path) -> Any:
    with zipfile.ZipFile(where / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.write(path, path.relative_to(photos))
    return str(where / "all.zip")


def three_parquets(photos: Path, where: Path) -> Any:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = sorted(photos.rglob("*.jpg"))
    rows = [{"bytes": path.read_bytes(), "path": str(path.relative_to(photos))} for path in paths]
    for number, start in enumerate((0, 15, 30)):
        table = pa.table({"image": rows[start : start + 15]})
        pq.write_table(table, where / f"{number}.parquet", row_group_size=4)
    return {"parquet": str(where)}


FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "tar": four_tars,
    "tar.gz": compressed_tars,
    "zip": one_zip,
    "parquet": three_parquets,
}


def inner(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with their paths inside of an archive."""
    return [one | {"path": "/".join(one["path"].split("/")[-2:])} for one in records]


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of the folder."""
    folder = tmp_path_factory.mktemp("folder")
    run_here(write_tiny_job(folder, input=str(photos)))
    return read_records(folder / "out")


def form_of(name: str, photos: Path, folder: Path) -> Any:
    """The `input` of a job that reads the photos in one of the forms."""
    where = folder / "packed"
    where.mkdir()
    return FORMS[name](photos, where)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_every_form_has_the_records_of_the_folder(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]], form: str, backend: str
) -> None:
    loader = {"backend": backend, "workers": 3}
    run_here(write_tiny_job(tmp_path, input=form_of(form, photos, tmp_path), loader=loader))
    assert_same_records(inner(read_records(tmp_path / "out")), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_was_killed_goes_on_inside_of_an_archive(
    tmp_path: Path, photos: Path, form: str
) -> None:
    job_input = form_of(form, photos, tmp_path)
    slower = {key: 3 * edge for key, edge in SLOW.items()}
    slow: dict[str, Any] = {"preprocess": slower, "batch_size": 1}
    job = write_tiny_job(tmp_path, input=job_input, **slow)
    whole = write_tiny_job(
        tmp_path, input=job_input, output=str(tmp_path / "whole"), name="whole.yaml", **slow
    )
    run_here(whole)
    records = tmp_path / "out" / "predictions.jsonl"
    process = subprocess.Popen(command("run", job), stderr=subprocess.PIPE, start_new_session=True)
    while not records.exists() or records.read_bytes().count(b"\n") < 17:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    num_done = len(records.read_bytes().splitlines())
    run_here(job)
    assert num_done < NUM_PHOTOS
    assert_same_records(read_records(tmp_path / "out"), read_records(tmp_path / "whole"))


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_the_parts_of_the_whole(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]], form: str
) -> None:
    job = write_tiny_job(tmp_path, input=form_of(form, photos, tmp_path))
    for index in range(3):
        run_here(job, RunOptions(shard=Shard(index, 3)))
    found = [
        one
        for index in range(3)
        for one in read_records(tmp_path / "out", f"predictions-{index:05d}-of-00003.jsonl")
    ]
    assert_same_records(inner(found), expected)


@pytest.mark.parametrize("form", ["tar", "tar.gz", "parquet"])
def test_members_of_an_archive_that_was_away_are_tried_again(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]], form: str
) -> None:
    job = write_tiny_job(tmp_path, input=form_of(form, photos, tmp_path))
    run_here(job, RunOptions(shard=Shard(1, 2)))
    archive, away = sorted((tmp_path / "packed").iterdir())[0], tmp_path / "away"
    archive.rename(away)
    failed = run_here(job, RunOptions(shard=Shard(0, 2))).summary
    assert failed.errors_by_code["vanished"] >= 10
    away.rename(archive)
    run_here(job, RunOptions(shard=Shard(0, 2), retry_failed=True))
    names = [f"predictions-{index:05d}-of-00002.jsonl" for index in range(2)]
    found = [one for name in names for one in read_records(tmp_path / "out", name)]
    assert_same_records(inner(found), expected)


def test_two_archives_and_a_folder_are_one_input(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]], batchclf: Batchclf
) -> None:
    form_of("tar", photos, tmp_path)
    packed = tmp_path / "packed"
    shutil.copytree(photos / "s2", packed / "s2")
    job = write_tiny_job(tmp_path)
    inputs = [packed / "s0.tar", packed / "s1.tar", packed / "s2", packed / "s0.tar"]
    done = batchclf("run", job, *(one for path in inputs for one in ("-i", str(path))))
    assert done.exit_code == 0, done.stderr
    found = read_records(tmp_path / "out")
    assert [one["path"].split("/")[0] for one in found[::10]] == ["s0.tar", "s1.tar", "s2"]
    assert_same_records(inner(found), expected[:30])


def test_the_same_rows_given_twice_are_listed_once_and_those_of_other_files_never_lost(
    tmp_path: Path, photos: Path
) -> None:
    form_of("parquet", photos, tmp_path)
    packed = tmp_path / "packed"
    shutil.copyfile(packed / "0.parquet", packed / "9.parquet")
    files = [str(packed / f"{number}.parquet") for number in (0, 9, 0)]
    run_here(write_tiny_job(tmp_path, input={"parquet": files}))
    paths = [one["path"] for one in read_records(tmp_path / "out")]
    assert paths[15:] == [f"9.parquet/{row}" for row in range(15)]
    assert len(paths) == 30


def test_a_list_names_archives_and_images_beside_each_other(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]]
) -> None:
    form_of("tar", photos, tmp_path)
    lines = [str(photos / "s0" / "00.jpg"), "packed/s1.tar", "packed/s2.tar", "packed/s1.tar"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "list.txt")))
    found = read_records(tmp_path / "out")
    assert [one["path"] for one in found[:2]] == [lines[0], "packed/s1.tar/s1/10.jpg"]
    assert_same_records(inner(found), [expected[0], *expected[10:30]])


def test_records_of_members_are_no_list_and_the_archive_to_give_is_named(
    tmp_path: Path, photos: Path
) -> None:
    run_here(write_tiny_job(tmp_path, input=form_of("zip", photos, tmp_path)))
    records = tmp_path / "out" / "predictions.jsonl"
    path = read_records(tmp_path / "out")[0]["path"]
    job = write_tiny_job(tmp_path, input=str(records), output=str(tmp_path / "again"))
    with pytest.raises(NoImagesError) as raised:
        run_here(job)
    assert f"found {path}: an image inside of an archive" in str(raised.value)
    assert str(raised.value).endswith(f"or in the list: {path.partition('/')[0]}")


def test_extend_adds_the_members_of_new_archives(
    tmp_path: Path, photos: Path, expected: list[dict[str, Any]]
) -> None:
    job = write_tiny_job(tmp_path, input=form_of("zip", photos, tmp_path).replace("all", "*"))
    run_here(job)
    new = tmp_path / "packed" / "new.zip"
    with zipfile.ZipFile(new, "w") as archive:
        archive.write(photos / "s0" / "00.jpg", "n/00.jpg")
    run_here(job, RunOptions(extend=True))
    found = read_records(tmp_path / "out")
    assert_same_records(inner(found[:-1]), expected)
    assert (found[-1]["path"], found[-1]["status"]) == ("new.zip/n/00.jpg", "ok")


def test_validate_counts_members_and_says_what_is_left_out(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    job = write_tiny_job(tmp_path, input=form_of("tar", photos, tmp_path))
    with tarfile.open(tmp_path / "packed" / "s3.tar", "a") as archive:
        archive.add(photos / "s3" / "30.jpg", "s3/30.jpg")
        for name in ("._30.jpg", "30.cls", "30.txt"):
            archive.addfile(tarfile.TarInfo(f"s3/{name}"))
    told = "2 beside an image (s3/30.cls), 1 replaced (s3/30.jpg), 1 of macOS (s3/._30.jpg)"
    found = batchclf("validate", job, "--json").json
    assert (found["num_images"], found["num_left_out"]) == (NUM_PHOTOS, 4)
    assert sorted(found["left_out"].split(", ")) == sorted(told.split(", "))
    assert f"left out: {found['left_out']}\n" in batchclf("validate", job).stdout
    assert f"input: left out: {found['left_out']}\n" in batchclf("run", job).stderr


@pytest.mark.parametrize("below", ["packed", "packed/*", "p*/*"])
def test_a_folder_or_a_glob_of_archives_says_how_to_read_them(
    tmp_path: Path, photos: Path, below: str
) -> None:
    form_of("tar", photos, tmp_path)
    job = write_tiny_job(tmp_path, input=str(tmp_path / below))
    with pytest.raises(NoImagesError, match=r"found 0 images \(4 files.*packed/\*\.tar"):
        run_here(job)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"<html>404</html>" * 100, "a.tar: no tar archive: .* an HTML page"),
        ("a.zip", b"PK\3\4" + bytes(100), "a.zip: ends without the directory"),
        ("a.tar", bytes(10240), "no members"),
    ],
)
def test_an_archive_without_images_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NoImagesError, match=f"found 0 images .*{message}"):
        run_here(write_tiny_job(tmp_path, input=str(tmp_path / name)))


def test_a_damaged_archive_among_others_is_one_record(tmp_path: Path, photos: Path) -> None:
    form_of("tar", photos, tmp_path)
    (tmp_path / "packed" / "s15.tar").write_bytes(b"<html>404</html>" * 100)
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "packed" / "*.tar")))
    records = read_records(tmp_path / "out")
    assert len(records) == NUM_PHOTOS + 1
    assert records[20]["path"] == "s15.tar"
    assert records[20]["error"]["code"] == "damaged_archive"
