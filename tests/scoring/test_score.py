"""Predictions compared with true labels, wherever these are; and what cannot be compared."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from batchclf.errors import EnvironmentFailed, ResumeRefused, UsageError
from batchclf.results.records import Failure
from batchclf.scoring.score import score_output
from tests.conftest import Batchclf
from tests.outputs import divide, predicted, write_output
from tests.tiny import DIGITS, run_here, write_tiny_job

LABELS = ("cat", "dog", "great white shark")
OUTCOMES = {
    "cat/1.jpg": predicted(LABELS, 0, 1, 2, score=0.8),
    "cat/2.jpg": predicted(LABELS, 1, 0, 2, score=0.6),
    "dog/3.jpg": predicted(LABELS, 1, 0, 2, score=0.7),
    "dog/4.jpg": Failure("truncated", "ends early"),
    "shark/5.jpg": predicted(LABELS, 2, 1, 0, score=0.9),
}
"""Three of five are right."""
TRUE = {
    "1.jpg": "cat",
    "2.jpg": "cat",
    "3.jpg": "dog",
    "4.jpg": "dog",
    "5.jpg": "Great_White-shark",
}


@pytest.fixture(scope="module")
def out(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(template, tmp_path_factory.mktemp("score") / "out", LABELS, OUTCOMES)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder per class."""
    for path in OUTCOMES:
        label, _, name = path.partition("/")
        file = tmp_path / "truth" / ("great white shark" if label == "shark" else label) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "truth"


def table(path: Path, header: str = "path,label", separator: str = ",") -> Path:
    rows = [f"{image}{separator}{TRUE[Path(image).name]}" for image in OUTCOMES]
    path.write_text("\n".join([*([header] if header else []), *rows]) + "\n")
    return path


def test_all_figures_of_a_job(out: Path, tmp_path: Path) -> None:
    score = score_output(out, str(table(tmp_path / "truth.csv")))
    figures = score.figures
    assert (figures.top1.num, figures.top1.of, figures.top1_of_ok.of) == (3, 5, 4)
    assert (figures.top5.num, figures.depth) == (4, 5)
    assert (figures.num_errors, figures.errors_by_code) == (1, {"truncated": 1})
    assert [one.label for one in figures.classes] == list(LABELS)
    assert [one.num_failed for one in figures.classes] == [0, 1, 0]
    assert (1, None, 1) in figures.confusion
    assert (0, 1, 1) in figures.confusion
    assert [one.how for one in score.names] == ["exact", "exact", "spelling"]
    assert score.labels == str(out / "labels.txt")
    assert score.left_out == []


@pytest.mark.parametrize(
    ("name", "header", "separator", "told"),
    [
        ("truth.csv", "Path,Label", ",", "columns `path` and `label`"),
        ("truth.csv", "file name;class", ";", "columns `file_name` and `class`"),
        ("truth.csv", "", ",", "two columns without a header"),
        ("truth.tsv", "image\ttarget", "\t", "columns `image` and `target`"),
        ("truth.csv", "\ufeffpath,label", ",", "columns `path` and `label`"),
    ],
)
def test_a_table_of_any_usual_form_is_read(
    out: Path, tmp_path: Path, name: str, header: str, separator: str, told: str
) -> None:
    score = score_output(out, str(table(tmp_path / name, header, separator)))
    assert told in score.truth
    assert score.truth.endswith("by path")
    assert score.figures.top1.num == 3


def test_a_table_of_indices_beside_other_columns_is_read(out: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.csv"
    rows = [f"x,{index},./{one}" for index, one in zip((0, 0, 1, 1, 2), OUTCOMES, strict=True)]
    truth.write_text("\n".join(["who,class_id,file", *rows]))
    score = score_output(out, str(truth))
    assert {one.how for one in score.names} == {"index"}
    assert score.truth.endswith("columns `file` and `class_id`, by path")
    assert score.figures.top1.num == 3


def test_json_lines_hold_names_and_indices(out: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    named = [{"path": path, "label": TRUE[Path(path).name]} for path in OUTCOMES]
    lines = [{"path": "cat/1.jpg", "index": 0}, *named[1:]]
    truth.write_text("\n".join(map(json.dumps, lines)))
    score = score_output(out, str(truth))
    assert score.figures.top1.num == 3
    assert [one.how for one in score.names] == ["index", "exact", "exact", "spelling"]


def test_a_folder_per_class_is_matched_by_path_or_by_file_name(
    template: Path, folders: Path, tmp_path: Path, out: Path
) -> None:
    renamed = {path.replace("shark/", "great white shark/"): one for path, one in OUTCOMES.items()}
    by_path = write_output(template, tmp_path / "by_path", LABELS, renamed)
    assert score_output(by_path, str(folders)).truth.endswith("by path")
    flat = {Path(path).name: one for path, one in OUTCOMES.items()}
    by_name = write_output(template, tmp_path / "by_name", LABELS, flat)
    score = score_output(by_name, str(folders))
    assert score.truth.endswith("by file name (no image has a path in it)")
    assert score.figures.top1.num == 3
    with pytest.raises(UsageError, match=r"such as shark/5\.jpg: there is no true label"):
        score_output(out, str(folders))


def test_a_file_name_of_several_images_or_rows_tells_nothing(
    template: Path, tmp_path: Path
) -> None:
    outcome = predicted(LABELS, 0, 1, 2)
    names = ("a/1.jpg", "b/1.jpg", "a/2.jpg", "a/3.jpg")
    out = write_output(template, tmp_path / "out", LABELS, dict.fromkeys(names, outcome))
    truth = tmp_path / "truth.csv"
    truth.write_text("1.jpg,cat\nx/2.jpg,cat\ny/2.jpg,cat\n3.jpg,cat\n")
    with pytest.raises(UsageError, match=r"3 images, such as a/1\.jpg: several true labels"):
        score_output(out, str(truth))
    score = score_output(out, str(truth), allow_unmatched=True)
    assert score.figures.top1.of == 1


def test_a_path_with_two_labels_has_none(out: Path, tmp_path: Path) -> None:
    truth = table(tmp_path / "truth.csv")
    truth.write_text(truth.read_text() + "cat/1.jpg,cat\n")
    assert score_output(out, str(truth)).figures.top1.of == 5
    truth.write_text(truth.read_text() + "cat/1.jpg,dog\n")
    with pytest.raises(UsageError, match=r"1 images, such as cat/1\.jpg: several true labels"):
        score_output(out, str(truth))


def test_the_labels_beside_images_in_archives_are_found(template: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, image in enumerate(sorted(DIGITS.rglob("*.jpg"))[:3]):
            for suffix, content in (("jpg", image.read_bytes()), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "0.tar")))
    score = score_output(tmp_path / "out", "input")
    assert score.truth == "beside the images in the input"
    assert score.labels == "the model's bundle"
    assert [one.name for one in score.names] == ["0", "1", "2"]
    assert score.figures.top1.of == 3


def test_what_is_not_matched_is_listed_and_left_out_only_where_that_is_allowed(
    out: Path, tmp_path: Path, batchclf: Batchclf
) -> None:
    truth = table(tmp_path / "truth.csv")
    truth.write_text(truth.read_text().replace("dog/3.jpg,dog", "dog/3.jpg,dogs"))
    truth.write_text(truth.read_text().replace("shark/5.jpg", "shark/55.jpg"))
    refused = batchclf("score", out, "--truth", truth)
    assert refused.exit_code == 2
    assert "'dogs' is no class; did you mean 'dog'?" in refused.stderr
    assert "such as shark/5.jpg: there is no true label of it" in refused.stderr
    assert refused.stdout == ""
    found = batchclf("score", out, "--truth", truth, "--allow-unmatched", "--json").json
    assert found["figures"]["num_images"] == 3
    assert [one["num_images"] for one in found["left_out"]] == [1, 1]
    said = batchclf("score", out, "--truth", truth, "--allow-unmatched").stdout
    assert "left out:  1 images, such as dog/3.jpg" in said
    assert "      1  cat → dog\n" in said


def test_without_the_bundle_labels_are_those_of_the_records(template: Path, tmp_path: Path) -> None:
    out = write_output(template, tmp_path / "out", LABELS, OUTCOMES)
    (out / "labels.txt").unlink()
    score = score_output(out, str(table(tmp_path / "truth.csv")))
    assert score.labels.startswith("the records")
    assert score.figures.top1.num == 3
    (out / "labels.txt").write_text("cat\ndog\nother\n")
    assert score_output(out, str(tmp_path / "truth.csv")).labels.startswith("the records")


def test_shards_are_scored_as_one_as_far_as_they_are(
    template: Path, out: Path, tmp_path: Path
) -> None:
    truth = str(table(tmp_path / "truth.csv"))
    assert score_output(divide(out, tmp_path / "all", 3), truth).figures == (
        score_output(out, truth).figures
    )
    some = score_output(divide(out, tmp_path / "some", 3, without=[1]), truth)
    assert (some.num_done, some.num_images) == (3, 5)
    stopped = write_output(template, tmp_path / "stopped", LABELS, OUTCOMES, num_done=2)
    with (stopped / "predictions.jsonl").open("ab") as file:
        file.write(b'{"path":"dog/3.jpg","sta')
    assert score_output(stopped, truth).num_done == 2


def test_fewer_classes_than_five_are_said(
    template: Path, tmp_path: Path, batchclf: Batchclf
) -> None:
    outcomes = {"cat/1.jpg": predicted(LABELS, 0, 1)}
    out = write_output(template, tmp_path / "out", LABELS, outcomes, top_k=2)
    said = batchclf("score", out, "--truth", table(tmp_path / "truth.csv"))
    assert "top 5:     1.0000 (0.2065 to 1.0000), 1 of 1 (of 2: the job's top_k)" in said.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("truth.csv", "", "is empty"),
        ("truth.csv", "a,b,c\n1,2,3\n", "found 3 columns, a, b, c"),
        ("truth.csv", "path,label\ncat/1.jpg\n", r"truth\.csv:2: found 1 cells"),
        ("truth.csv", 'path,label\n"cat/1.jpg,cat\n', r"truth\.csv:2: is no CSV"),
        ("truth.jsonl", '{"path": "cat/1.jpg"}\n', "found the keys path"),
        ("truth.jsonl", "[1]\n", "is no JSON object"),
        ("truth.jsonl", "cat/1.jpg cat\n", r"truth\.jsonl:1: is no JSON"),
        ("truth.txt", "cat/1.jpg cat\n", "its suffix does not tell"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_line(
    out: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        score_output(out, str(tmp_path / name))


def test_a_truth_or_an_output_that_is_not_there_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found nothing there; give a folder"):
        score_output(out, str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="holds no folder"):
        score_output(out, str(tmp_path))
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        score_output(tmp_path, "input")


def test_records_that_are_not_those_of_the_listing_are_refused(
    out: Path, template: Path, tmp_path: Path
) -> None:
    truth = str(table(tmp_path / "truth.csv"))
    copy = write_output(template, tmp_path / "out", LABELS, OUTCOMES)
    lines = (copy / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "predictions.jsonl").write_bytes(b"".join(lines[1:]))
    with pytest.raises(EnvironmentFailed, match=r"jsonl:1: is not the record of cat/1\.jpg"):
        score_output(copy, truth)
    (copy / "predictions.jsonl").write_bytes(b"".join(lines[:3]))
    with pytest.raises(EnvironmentFailed, match="3 records are there, not 5"):
        score_output(copy, truth)
    divide(out, tmp_path / "two", 2)
    (tmp_path / "two" / "run-00000-of-00003.json").write_bytes((out / "run.json").read_bytes())
    with pytest.raises(ResumeRefused, match="shards of several divisions"):
        score_output(tmp_path / "two", truth)
