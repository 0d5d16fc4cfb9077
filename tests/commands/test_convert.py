"""Records in another form: the same facts, harmless to who opens them, whole or not there."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.commands.convert import folders, parquet, target
from batchclf.commands.convert.convert import convert_output
from batchclf.commands.convert.csv import harmless
from batchclf.commands.convert.folders import Choice, folder_name
from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.results.records import Failure
from batchclf.system import rename
from tests.conftest import ROOT, Batchclf, read_records
from tests.outputs import divide, predicted, write_output
from tests.tiny import DIGITS, run_here, write_tiny_job

LABELS = ("cat", "=cmd|' /C calc'!A0", "../../etc", "CON/..")
OUTCOMES = {
    "a/1.jpg": predicted(LABELS, 0, 1, 2, score=0.8),
    "a/2.jpg": predicted(LABELS, 1, 0, 2, score=0.4),
    "b/1.jpg": predicted(LABELS, 0, 1, 2, score=0.7),
    "b/broken.jpg": Failure("truncated", 'ends "early",\nin the middle'),
    "b/gone.jpg": Failure("not_found", "no such file"),
    "-b;=1+1.jpg": predicted(LABELS, 2, 0, 1, score=0.9),
    "@c.jpg": predicted(LABELS, 3, 0, 1, score=0.9),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each image but one; its content is its path."""
    folder = tmp_path_factory.mktemp("images")
    for path in OUTCOMES:
        if path != "b/gone.jpg":
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(path)
    return folder


@pytest.fixture(scope="module")
def out(template: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "out"
    return write_output(template, folder, LABELS, OUTCOMES, top_k=3, input=str(images))


def tree(folder: Path) -> dict[str, str]:
    """The content of each file in a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != target.MARK
    }


# ---- tables --------------------------------------------------------------------------------------


def test_a_row_of_csv_holds_all_of_a_record(out: Path, tmp_path: Path) -> None:
    converted = convert_output(out, "csv", tmp_path / "night.csv")
    assert (converted.num_records, converted.num_errors) == (7, 2)
    with (tmp_path / "night.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = read_records(out)
    assert [row["path"].removeprefix("'") for row in rows] == [one["path"] for one in records]
    for row, record in zip(rows, records, strict=True):
        assert row["status"] == record["status"]
        assert row["error_code"] == record.get("error", {}).get("code", "")
        assert row["error_message"] == record.get("error", {}).get("message", "")
        for number, one in enumerate(record.get("predictions", ()), start=1):
            assert row[f"label_{number}"].removeprefix("'") == one["label"]
            assert int(row[f"index_{number}"]) == one["index"]
            assert float(row[f"score_{number}"]) == one["score"]


def test_no_cell_of_csv_is_a_formula_and_no_text_ends_its_cell(out: Path, tmp_path: Path) -> None:
    convert_output(out, "csv", tmp_path / "night.csv")
    text = (tmp_path / "night.csv").read_text()
    for separator in ",;\t":  # whichever a spreadsheet's language has
        for row in csv.reader(io.StringIO(text), delimiter=separator):
            assert not [cell for cell in row if cell.startswith(tuple("=+-@"))]
    assert '"\'-b;=1+1.jpg"' in text


@given(st.text(st.sampled_from("'=+-@\t\r\n \uff1da1\u00a0"), max_size=4))
def test_an_apostrophe_keeps_text_from_being_a_formula_and_can_be_taken_away(text: str) -> None:
    found = harmless(text)
    assert found.removeprefix("'") == text
    assert not found.startswith(("\t", "\r", "\n"))
    assert not found.lstrip().startswith(tuple("=+-@\uff1d"))


def test_a_name_that_is_not_utf_8_is_told_in_both_tables(template: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    name = b"caf\xe9.jpg"
    shutil.copy(os.fsencode(next(DIGITS.rglob("*.jpg"))), os.fsencode(folder) + b"/" + name)
    run_here(write_tiny_job(tmp_path, input=str(folder)))
    convert_output(tmp_path / "out", "csv", tmp_path / "night.csv")
    assert r'"caf\xe9.jpg","Y2Fm6S5qcGc=","ok"' in (tmp_path / "night.csv").read_text()
    convert_output(tmp_path / "out", "parquet", tmp_path / "night.parquet")
    (row,) = rows_of(tmp_path / "night.parquet")
    assert (row["path"], row["path_b64"]) == (r"caf\xe9.jpg", "Y2Fm6S5qcGc=")
    converted = convert_output(tmp_path / "out", "folders", tmp_path / "sorted")
    assert os.listdir(os.fsencode(tmp_path / "sorted" / next(iter(converted.folders)))) == [name]


def rows_of(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table

    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    return rows


def test_a_row_of_parquet_holds_all_of_a_record(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow.parquet import ParquetFile

    monkeypatch.setattr(parquet, "GROUP_ROWS", 3)
    convert_output(out, "parquet", tmp_path / "night.parquet")
    assert ParquetFile(tmp_path / "night.parquet").metadata.num_row_groups == 3
    for row, record in zip(rows_of(tmp_path / "night.parquet"), read_records(out), strict=True):
        assert (row["path"], row["status"]) == (record["path"], record["status"])
        error = record.get("error", {})
        assert (row["error_code"], row["error_message"]) == (
            error.get("code"),
            error.get("message"),
        )
        predictions = record.get("predictions")
        for name, key in (("labels", "label"), ("indices", "index"), ("scores", "score")):
            assert row[name] == (predictions and [one[key] for one in predictions])


def test_without_pyarrow_parquet_is_refused_before_any_work(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'batchclf\[parquet\]'"):
        convert_output(out, "parquet", tmp_path / "night.parquet")
    assert os.listdir(tmp_path) == []


def test_shards_are_converted_as_one_as_far_as_they_are(out: Path, tmp_path: Path) -> None:
    convert_output(out, "csv", tmp_path / "whole.csv")
    convert_output(divide(out, tmp_path / "all", 3), "csv", tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    some = convert_output(divide(out, tmp_path / "some", 3, without=[0]), "csv", tmp_path / "1.csv")
    assert (some.num_records, some.num_images) == (5, 7)


# ---- folders -------------------------------------------------------------------------------------


def test_images_are_linked_into_a_folder_per_label(out: Path, images: Path, tmp_path: Path) -> None:
    converted = convert_output(out, "folders", tmp_path / "sorted", choice=Choice(min_score=0.5))
    assert tree(tmp_path / "sorted") == {
        "_failed/broken.jpg": "b/broken.jpg",
        "_unsure/2.jpg": "a/2.jpg",
        "cat/1-2.jpg": "b/1.jpg",
        "cat/1.jpg": "a/1.jpg",
        "_.._etc-2/-b;=1+1.jpg": "-b;=1+1.jpg",
        "CON_-3/@c.jpg": "@c.jpg",
    }
    assert converted.left_out == {"not_found": 1}
    assert converted.folders == {
        "cat": 2, "_unsure": 1, "_failed": 1, "_.._etc-2": 1, "CON_-3": 1
    }  # fmt: skip
    link = tmp_path / "sorted" / "cat" / "1.jpg"
    assert os.readlink(link) == str(images / "a" / "1.jpg")


@pytest.mark.parametrize("way", ["copies", "hard links"])
def test_images_may_be_copied_or_linked_hard(
    out: Path, images: Path, tmp_path: Path, way: folders.Way
) -> None:
    converted = convert_output(out, "folders", tmp_path / "sorted", choice=Choice(way))
    copy = tmp_path / "sorted" / "cat" / "1.jpg"
    assert copy.read_text() == "a/1.jpg"
    assert not copy.is_symlink()
    assert os.path.samefile(copy, images / "a" / "1.jpg") == (way == "hard links")
    assert converted.left_out == {"vanished" if way == "copies" else "not_found": 1}
    assert converted.num_written_out == 0


@pytest.mark.parametrize("way", ["symlinks", "hard links", "copies"])
def test_no_link_leads_on_to_what_a_link_in_the_input_led_out_to(
    template: Path, tmp_path: Path, way: folders.Way
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").touch()
    (tmp_path / "in" / "1.jpg").symlink_to(tmp_path / "secret")
    outcomes = {"1.jpg": Failure("outside_root", "its target is outside of the input")}
    images = str(tmp_path / "in")
    out = write_output(template, tmp_path / "out", LABELS, outcomes, input=images)
    converted = convert_output(out, "folders", tmp_path / "sorted", choice=Choice(way))
    assert converted.left_out == {"outside_root": 1}
    assert tree(tmp_path / "sorted") == {}


def test_a_hard_link_to_another_file_system_is_refused_with_what_to_do(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError, match="Invalid cross-device link; give a path on its own file"):
        convert_output(out, "folders", tmp_path / "sorted", choice=Choice("hard links"))
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_links_folders_are_refused_with_what_to_do(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(UsageError, match=r"Operation not permitted, as on .*, or --copy"):
        convert_output(out, "folders", tmp_path / "sorted")
    assert os.listdir(tmp_path) == []


def test_images_in_archives_are_written_out_with_a_name_of_their_own(tmp_path: Path) -> None:
    image = next(DIGITS.rglob("*.jpg")).read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (
            ("a/1.jpg", image),
            ("b/1.jpg", image),
            ("b/2", image),
            ("c.jpg", b""),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    run_here(write_tiny_job(tmp_path, input=[str(tmp_path / "0.tar"), str(DIGITS / "0")]))
    converted = convert_output(tmp_path / "out", "folders", tmp_path / "sorted")
    num_digits = len(list((DIGITS / "0").iterdir()))
    assert converted.num_records == num_digits + 4
    assert sum(converted.folders.values()) == num_digits + 4
    assert converted.num_written_out == 4
    files = [path for path in (tmp_path / "sorted").rglob("*.jpg") if not path.is_symlink()]
    assert sorted(path.name for path in files) == ["1-1.jpg", "1.jpg", "2.jpg", "c.jpg"]
    assert {path.read_bytes() for path in files} == {image, b""}


@given(
    st.lists(st.text(max_size=8) | st.sampled_from(["a", "A", "a-1", "a-0", ".", "..", "_failed"]))
)
def test_every_class_has_a_folder_of_its_own_inside_the_target(labels: list[str]) -> None:
    taken = {folders.FAILED, folders.UNSURE}
    for index, label in enumerate(labels):
        name = folder_name(label, index, taken)
        assert name.casefold() not in taken
        assert not set(name) & set('/\\\0\n"$`*?<>|:;!')
        assert name.strip(" .-") != ""
        assert not name.startswith((".", "-"))
        assert len(name.encode()) < 255
        taken.add(name.casefold())


def test_a_long_label_has_a_short_folder() -> None:
    assert len(folder_name("\U0001f63a" * 300 + "猫" * 300, 7, set()).encode()) < 255


# ---- where it goes -------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_where_that_is_asked_for(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "night.csv"
    path.write_text("mine")
    with pytest.raises(UsageError, match="is there; give another path, or --overwrite"):
        convert_output(out, "csv", path)
    assert path.read_text() == "mine"
    convert_output(out, "csv", path, overwrite=True)
    assert path.read_text().startswith('"path"')


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_of_a_conversion_is_replaced_whole(
    out: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(rename, "_RENAME_EXCHANGE", 1 << 20)
    convert_output(out, "folders", tmp_path / "sorted", choice=Choice(min_score=0.5))
    (tmp_path / "sorted" / "cat" / "note.txt").write_text("of the one before")
    convert_output(out, "folders", tmp_path / "sorted", overwrite=True)
    found = tree(tmp_path / "sorted")
    assert "cat/note.txt" not in found
    assert "_unsure/2.jpg" not in found
    assert len(found) == 6
    assert os.listdir(tmp_path) == ["sorted"]
    assert len(tree(images)) == 6, "what the links lead to is left alone"


def test_a_folder_of_somebody_else_is_never_replaced(out: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    with pytest.raises(UsageError, match="is a folder that `convert` did not write"):
        convert_output(out, "folders", tmp_path / "photos", overwrite=True)
    with pytest.raises(UsageError, match="is there, and is not a file"):
        convert_output(out, "csv", tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "1.jpg").exists()


def test_neither_the_job_nor_its_input_is_written_to(
    out: Path, images: Path, tmp_path: Path
) -> None:
    before = (out / "predictions.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(out / "predictions.jsonl")
    for path in (out / "predictions.jsonl", tmp_path / "link"):
        with pytest.raises(UsageError, match="is a file of the job itself"):
            convert_output(out, "csv", path, overwrite=True)
    assert (out / "predictions.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="lies inside the input"):
        convert_output(out, "folders", images / "sorted")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    assert convert_output(out, "csv", tmp_path / "nowhere").path == str(tmp_path / "nothing")


@pytest.mark.parametrize("to", ["csv", "parquet", "folders"])
def test_a_conversion_that_fails_leaves_what_was_there(out: Path, tmp_path: Path, to: Any) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    convert_output(copy, to, tmp_path / "night")
    before = (tmp_path / "night").stat()
    records = copy / "predictions.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:4]))
    with pytest.raises(EnvironmentFailed, match="4 records are there, not 7"):
        convert_output(copy, to, tmp_path / "night", overwrite=True)
    assert (tmp_path / "night").stat() == before
    assert sorted(os.listdir(tmp_path)) == ["night", "out"]


def test_a_full_disk_is_told(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentFailed, match=r"No space left on device \(ENOSPC\); nothing is"):
        convert_output(out, "csv", tmp_path / "night.csv")
    assert os.listdir(tmp_path) == []


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(out: Path, tmp_path: Path, batchclf: Batchclf) -> None:
    sorted_ = tmp_path / "sorted"
    said = batchclf("convert", out, "--to", "folders", "-o", sorted_, "--min-score", "0.5")
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith("images:   7, 2 errors\n        2  cat\n        1  _unsure\n")
    assert said.stdout.endswith(
        f"left out: 1 that could not be had: not_found\nwritten:  {sorted_}\n"
    )
    refused = batchclf("convert", out, "--to", "csv", "-o", tmp_path / "1.csv", "--copy", "--json")
    assert refused.exit_code == 2
    assert refused.json["error"] == "--copy: goes with --to folders, not with --to csv"


GUIDE = (ROOT / "docs" / "results.md").read_text()
ONE_LINERS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("batchclf convert", "python -c", "jq"))
]
EXPECTED = {
    "jq": "b/gone.jpg\tnot_found",
    "pandas": "error    2",
    "polars": "b/1.jpg",
    "duckdb": "2",
}


def test_the_one_liners_of_the_guide_run_as_they_stand(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "runs" / "night")
    assert len(ONE_LINERS) == 5
    absent = []
    for line in ONE_LINERS:
        tool = next((name for name in EXPECTED if name in line), "batchclf")
        is_there = shutil.which("jq") if tool == "jq" else find_spec(tool)
        if not is_there:
            absent.append(tool)
            continue
        for word in ("python", "batchclf"):
            program = f"{sys.executable} {'-m batchclf' if word == 'batchclf' else ''}"
            line = re.sub(rf"^{word} ", f"{program} ", line)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert EXPECTED.get(tool, "written:") in done.stdout, done.stdout
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (the extra `test` brings all but jq)")
