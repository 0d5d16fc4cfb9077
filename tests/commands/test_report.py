"""One page about a job: what it counts, what it shows, and that nothing in it can do harm."""

import base64
import hashlib
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchclf.cli import main
from batchclf.commands.report import gallery, pace
from batchclf.commands.report.confusion import confusions_of
from batchclf.commands.report.digest import NUM_OF_KIND, Digest
from batchclf.commands.report.gallery import choose
from batchclf.commands.report.pace import pace_of
from batchclf.commands.report.report import report_output
from batchclf.errors import UsageError
from batchclf.results.files import RunFiles
from batchclf.results.output import Line, open_output
from batchclf.results.records import Entry, Failure
from batchclf.scoring.figures import Tally
from batchclf.scoring.score import score_output
from tests.commands.hostile import TEXTS, hostile_outcomes, write_hostile
from tests.faults.poison import poisoned_environment, write_poison
from tests.outputs import divide, predicted, write_output
from tests.tiny import DIGITS, run_here, write_tiny_job

LABELS = ("cat", "dog", "fox")
OUTCOMES = {
    "a/sure.jpg": predicted(LABELS, 0, 1, score=0.99),
    "a/close.jpg": predicted(LABELS, 0, 1, score=0.002),
    "b/wrong.jpg": predicted(LABELS, 0, 1, score=0.9),
    "b/dog.jpg": predicted(LABELS, 1, 0, score=0.7),
    "b/broken.jpg": Failure("truncated", "ends after 10 of 20 bytes"),
}


class _Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, the text outside of code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.raw: dict[str, str] = {}
        self._inside = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.raw[self._inside] = data
        else:
            self.words.append(data)

    def cards(self) -> list[dict[str, str]]:
        return [found for tag, found in self.elements if found.get("class") == "card"]


def page_of(output: Path, truth: str | None = None) -> _Page:
    target = output.parent / "page.html"
    report_output(output, target, truth=truth, overwrite=True, allow_unmatched=True)
    return _Page(target.read_text())


@pytest.fixture(scope="module")
def out(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    write_output(template, folder, LABELS, OUTCOMES, top_k=2, input=str(folder))
    (folder / "truth.csv").write_text("path,label\nb/wrong.jpg,fox\na/sure.jpg,cat\n")
    return folder


@pytest.fixture(scope="module")
def hostile(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile(template, tmp_path_factory.mktemp("hostile") / "out")


# ---- what it tells -------------------------------------------------------------------------------


def test_a_page_tells_counts_classes_and_errors_with_their_examples(out: Path) -> None:
    page = page_of(out)
    assert "5 images classified" in page.text
    assert "4 with a prediction Errors 1 20.0 %" in page.text
    assert "truncated : 1 image b/broken.jpg : ends after 10 of 20 bytes" in page.text
    assert "cat 3 0.631" in page.text
    assert "Was it right?" not in page.text


def test_pictures_are_of_the_images_and_named_by_why_they_are_shown(tmp_path: Path) -> None:
    run_here(write_tiny_job(tmp_path))
    page = page_of(tmp_path / "out")
    pictures = [found["src"] for tag, found in page.elements if tag == "img"]
    assert len(pictures) == len(page.cards()) > 70
    first = base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,"))
    assert first.startswith(b"\xff\xd8\xff")
    kinds = {kind for card in page.cards() for kind in card["data-kinds"].split()}
    assert kinds == {"unsure", "close", "certain", "sample"}


def test_with_true_labels_a_page_tells_what_score_tells_and_shows_mistakes(out: Path) -> None:
    truth = str(out / "truth.csv")
    page, score = page_of(out, truth), score_output(out, truth, allow_unmatched=True)
    top1 = score.figures.top1
    assert (top1.num, top1.of) == (1, 2)
    assert f"Top 1 50.0 % {100 * top1.low:.1f} to {100 * top1.high:.1f} %; 1 of 2" in page.text
    assert "fox cat 1" in page.text
    assert "it is: fox" in page.text
    (mistake,) = [card for card in page.cards() if "mistake" in card["data-kinds"]]
    assert mistake["data-score"] == "0.9"
    assert "3 images are left out" in page.text


def test_labels_that_match_no_class_are_refused_as_by_score(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no true label"):
        report_output(out, tmp_path / "page.html", truth=str(out / "truth.csv"))
    assert not (tmp_path / "page.html").exists()


def test_a_job_that_runs_is_reported_as_far_as_it_is(template: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_output(template, out, LABELS, OUTCOMES, num_done=2, input=str(out))
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"path":"b/wr')
    page = page_of(out)
    assert "2 images classified" in page.text
    assert "State interrupted 2 of 5 images so far" in page.text


def test_shards_are_reported_as_one(out: Path, tmp_path: Path) -> None:
    divided = divide(out, tmp_path / "out", 2, without=[1])
    stats = json.loads((out.parent / "out" / "run.json").read_text())
    assert stats["num_images"] == 5
    page = page_of(divided)
    assert "2 images classified" in page.text
    assert "State not begun" in page.text


def test_images_that_are_gone_cost_their_pictures_and_the_page_says_so(
    template: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_output(template, out, LABELS, OUTCOMES, input=str(tmp_path / "gone"))
    page = page_of(out)
    assert "The images cannot be read here." in page.text
    assert len(page.cards()) == 5


def test_an_image_that_ends_its_decoder_costs_its_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DIGITS, tmp_path / "in", ignore=lambda folder, names: names[12:])
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "in")))
    for name, value in poisoned_environment().items():
        monkeypatch.setenv(name, value)
    bad = sorted((tmp_path / "in").rglob("*.jpg"))[1]
    write_poison(bad, "segfault")
    page = page_of(tmp_path / "out")
    num_pictures = sum(tag == "img" for tag, _ in page.elements)
    assert num_pictures == len(page.cards()) - 1
    assert "1 image cannot be read any more" in page.text


def test_images_that_hang_hold_a_page_up_no_longer_than_all_pictures_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DIGITS, tmp_path / "in", ignore=lambda folder, names: names[12:])
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "in")))
    for name, value in poisoned_environment().items():
        monkeypatch.setenv(name, value)
    for path in (tmp_path / "in").rglob("*.*"):
        write_poison(path, "hang")
    monkeypatch.setattr(gallery, "MAX_SECONDS", 2.0)
    output = open_output(tmp_path / "out")
    digest = Digest()
    digest.add_all((entry, line, None) for entry, line in output.lines())
    found = gallery.pictures_of(output, choose(digest))
    assert not found.jpegs
    # Waiting for the first few would have taken longer; then, they had been told to be unreadable.
    assert "are left out: all may take 4 MB and 2 s" in str(found.why_missing)


def test_pictures_keep_to_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(write_tiny_job(tmp_path))
    monkeypatch.setattr(gallery, "MAX_BYTES", 20_000)
    reported = report_output(tmp_path / "out", tmp_path / "page.html")
    assert 5 < reported.num_pictures < 30
    assert reported.why_missing is not None
    assert "are left out" in reported.why_missing


# ---- what it holds -------------------------------------------------------------------------------


def test_only_its_own_style_and_script_may_run_and_nothing_is_asked_for(hostile: Path) -> None:
    page = page_of(hostile, str(hostile / "truth.jsonl"))
    (policy,) = [
        found["content"]
        for _, found in page.elements
        if found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for name, text in page.raw.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    for tag, found in page.elements:
        assert not [key for key in found if key.startswith("on") or key == "style"], tag
        for key in ("src", "href", "xlink:href", "action"):
            assert re.match(r"^(data:|#)|^$", found.get(key, "")), (tag, found)


def test_hostile_names_and_labels_are_text_on_one_line(hostile: Path, out: Path) -> None:
    page, plain = page_of(hostile, str(hostile / "truth.jsonl")), page_of(hostile)
    harmless = page_of(out, str(out / "truth.csv"))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in harmless.elements}
    assert len(plain.cards()) == len(hostile_outcomes())
    told = [found["title"] for _, found in plain.elements if found.get("class") == "path"]
    assert sum(one.startswith("<script>document") for one in told) == 1
    assert all(one.isprintable() and len(one) <= 160 for one in told)
    assert len(TEXTS) == 30


def test_names_that_are_no_utf8_are_shown(template: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    source = next(DIGITS.rglob("*.png"))
    (images / os.fsdecode(b"caf\xe9.png")).write_bytes(source.read_bytes())
    run_here(write_tiny_job(tmp_path, input=str(images)))
    page = page_of(tmp_path / "out")
    (told,) = [found["title"] for _, found in page.elements if found.get("class") == "path"]
    assert told == "caf\\udce9.png"
    assert [tag for tag, _ in page.elements].count("img") == 1


# ---- counting ------------------------------------------------------------------------------------


def lines_of(num_images: int, num_classes: int = 10) -> Iterator[tuple[Entry, Line, int | None]]:
    for number in range(num_images):
        score = number * 7919 % num_images / num_images
        index = number % num_classes
        ranked = [
            {"label": f"class {one}", "index": one, "score": round(score / (1 + rank), 6)}
            for rank, one in enumerate((index, (index + 1) % num_classes))
        ]
        path = f"folder/{number:08d}.jpg"
        yield Entry(path.encode()), {"path": path, "status": "ok", "predictions": ranked}, index


def test_examples_are_the_highest_of_all_each_image_once() -> None:
    digest = Digest()
    digest.add_all(lines_of(5000))
    assert digest.num_images == sum(digest.bins) == 5000
    assert {one.num_images for one in digest.classes()} == {500}
    cards = choose(digest)
    assert len(cards) == len({card.example.ref.index for card in cards})
    scores = sorted(
        (line["predictions"][0]["score"] for _, line, _ in lines_of(5000)), reverse=True
    )
    found = {
        kind: [card.example.line["predictions"][0]["score"] for card in cards if kind in card.kinds]
        for kind in ("certain", "unsure")
    }
    assert sorted(found["certain"], reverse=True) == scores[:NUM_OF_KIND]
    assert sorted(found["unsure"]) == scores[::-1][:NUM_OF_KIND]


def test_what_is_kept_does_not_grow_with_the_records() -> None:
    def kept(num_images: int) -> int:
        tracemalloc.start()
        digest = Digest()
        digest.add_all(lines_of(num_images))
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert digest.num_images == num_images
        return current

    assert kept(40_000) < 1.1 * kept(4_000) + 20_000


def test_speed_over_time_is_told_over_all_runs_and_in_so_many_steps(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    with files.stats.open("w") as file:
        for wall_s, num_new in ((10, 100), (20, 300), (10, 50), (15, 60)):
            stage_s = {"list": 0, "decode_wait": wall_s / 2, "infer": wall_s, "write": 0}
            line = {"type": "interval", "wall_s": wall_s, "num_new": num_new, "stage_s": stage_s}
            file.write(f"{json.dumps(line)}\n")
        file.write('{"type": "interv')
    found = pace_of(files)
    assert [step.num_images for step in found.steps] == [100, 200, 50, 10]
    assert found.seconds == 35
    assert found.steps[0].shares == pytest.approx((1 / 3, 2 / 3, 0))
    with files.stats.open("w") as file:
        for number in range(1, 5001):
            line = {"type": "interval", "wall_s": 10 * number, "num_new": 3 * number}
            file.write(f"{json.dumps(line | {'stage_s': stage_s})}\n")
    found = pace_of(files)
    assert len(found.steps) <= 2 * pace.MAX_STEPS
    assert found.seconds == 50_000
    assert sum(step.num_images for step in found.steps) == 15_000


def test_runs_are_told_apart_though_all_figures_of_the_next_are_higher(
    template: Path, tmp_path: Path
) -> None:
    out = write_output(template, tmp_path / "out", LABELS, OUTCOMES, num_done=2)
    runs = [(1.0, 5, 30), (2.0, 10, 80), (2.0, 20, 100)]
    with (out / "stats.jsonl").open("w") as file:
        for startup_s, wall_s, num_new in runs:
            stage_s = {"list": 0, "decode_wait": 0, "infer": wall_s, "write": 0}
            line = {"type": "interval", "wall_s": wall_s, "num_new": num_new, "stage_s": stage_s}
            line |= {"startup_s": startup_s, "images_per_s": num_new / wall_s}
            file.write(f"{json.dumps(line | {'bottleneck': 'infer'})}\n")
    found = pace_of(RunFiles(out))
    steps = [(step.seconds, step.num_images) for step in found.steps]
    assert steps == [(5, 30), (10, 80), (10, 20)]
    page = page_of(out)
    assert "Speed 5.2 images/s Running time 0:00:25 without start-up" in page.text
    assert "The model limited its last run" in page.text


def test_fp32_that_was_compared_with_fp32_is_called_tf32(template: Path, tmp_path: Path) -> None:
    out = write_output(template, tmp_path / "out", LABELS, OUTCOMES)
    run = json.loads((out / "run.json").read_text())
    check = {"num_images": 5, "top1_agreement": 0.99, "max_score_difference": 0.01, "speed": None}
    (out / "run.json").write_text(json.dumps(run | {"precision_check": check}))
    assert "Precision TF32 same top class as fp32 on 99.0 % of 5 images" in page_of(out).text


def test_a_matrix_shows_the_classes_with_most_errors_and_counts_the_others() -> None:
    tally = Tally(1)
    for truth in range(30):
        for predicted_ in (truth, (truth + 1) % 30 if truth < 3 else truth):
            ranked = [{"index": predicted_, "score": 0.9}]
            tally.add(truth, {"status": "ok", "predictions": ranked})
    tally.add(0, {"status": "error", "error": {"code": "corrupt"}})
    found = confusions_of(tally.figures({index: f"class {index}" for index in range(30)}))
    assert (len(found.rows), found.num_classes) == (20, 30)
    first = found.rows[0]
    assert [cell.count for cell in first.cells[:3]] == [1, 1, 0]
    assert (first.cells[0].is_right, first.cells[1].is_right) == (True, False)
    assert (first.num_failed, first.num_elsewhere) == (1, 0)
    assert found.pairs[0] == ("class 0", "class 1", 1)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_page_once_and_again_where_it_is_told_to(
    out: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"

    def said(*options: str) -> Result:
        return CliRunner().invoke(main, ["report", str(out), "-o", str(page), *options])

    done = said()
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("images:   5, 1 errors\npictures: 0\n")
    refused = said()
    assert refused.exit_code == 2
    assert "is there; give another path, or --overwrite" in refused.stderr
    again = json.loads(said("--overwrite", "--json").stdout)
    assert again["num_bytes"] == page.stat().st_size


def test_without_its_libraries_the_command_says_what_to_install(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchclf.cli.report.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["report", str(out), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 2
    assert "report needs jinja2: pip install 'batchclf[report]'" in done.stderr
