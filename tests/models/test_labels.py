"""Class names: as many as the model has classes, in the order of the file, or a refusal."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.errors import ModelError
from batchclf.models.labels import imagenet_labels, read_labels, require_label_count
from tests.conftest import ROOT, Batchclf, read_records, write_job
from tests.models.onnx_models import PREPROCESS, Classifier, save


def test_imagenet_is_what_torchvisions_weights_carry() -> None:
    models = pytest.importorskip("torchvision.models")
    for weights in (
        models.MobileNet_V2_Weights.IMAGENET1K_V1,
        models.ResNet50_Weights.IMAGENET1K_V2,
        models.ViT_B_16_Weights.IMAGENET1K_V1,
    ):
        assert imagenet_labels() == tuple(weights.meta["categories"])


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(b"tench\ngreat white shark\ncock\n", id="plain"),
        pytest.param(b"tench\ngreat white shark\ncock", id="no newline at the end"),
        pytest.param(b"tench\r\ngreat white shark\r\ncock\r\n", id="CRLF"),
        pytest.param(b"\xef\xbb\xbftench\ngreat white shark\ncock\n", id="BOM"),
        pytest.param(b"\xef\xbb\xbftench\r\ngreat white shark\r\ncock", id="BOM and CRLF"),
        pytest.param(b"tench \n  great white shark\t\ncock\n", id="space around"),
    ],
)
def test_names_are_read_one_per_line_whatever_editor_wrote_them(
    tmp_path: Path, written: bytes
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(written)
    assert read_labels(path) == ("tench", "great white shark", "cock")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=100, deadline=None)
def test_any_names_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], newline: str
) -> None:
    names = [name.removeprefix("\ufeff") or "x" for name in names]
    path = tmp_path_factory.mktemp("labels") / "names.txt"
    path.write_bytes("".join(name + newline for name in names).encode())
    assert read_labels(path) == tuple(names)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\x0b"])
def test_only_line_ends_end_a_name(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(f"great{separator}white\ncock\n", encoding="utf-8")
    assert read_labels(path) == (f"great{separator}white", "cock")


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (b"a\n\nb\n", 2),
        (b"\na\n", 1),
        (b"a\n  \t \nb\n", 2),
        (b"a\nb\n\n", 3),
        (b"a\r\n\r\nb", 2),
        (b"", 1),
        (b"\n", 1),
    ],
)
def test_an_empty_line_is_refused_with_its_number(
    tmp_path: Path, written: bytes, line: int
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(written)
    with pytest.raises(ModelError, match=rf"names\.txt:{line}: found an empty line"):
        read_labels(path)


def test_text_that_is_not_utf8_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("cat\ncafé\n".encode("latin-1"))
    with pytest.raises(ModelError, match=r"not UTF-8 text \(byte at offset 7\)"):
        read_labels(path)


@pytest.mark.parametrize("name", ["absent.txt", ""])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.labels: .*: cannot be read"):
        read_labels(tmp_path / name)


def test_a_background_class_is_guessed_from_one_name_too_many() -> None:
    with pytest.raises(ModelError, match=r"found 1,001 names .* 1,000 classes.*'background'"):
        require_label_count(("background", *imagenet_labels()), 1000, "names.txt")
    with pytest.raises(ModelError) as caught:
        require_label_count(imagenet_labels()[:999], 1000, "names.txt")
    assert "background" not in str(caught.value)
    require_label_count(imagenet_labels(), 1000, "names.txt")


@pytest.mark.parametrize(
    ("lines", "hint"),
    [(('{"0": "ant",', '"1": "bee"}'), "looks like JSON"), (("ant,bee,cat",), "its one line is")],
)
def test_names_that_do_not_stand_one_on_a_line_are_told_as_what_they_are(
    lines: tuple[str, ...], hint: str
) -> None:
    with pytest.raises(ModelError, match=f"names.txt: found .*{hint}.*: write one name per line"):
        require_label_count(lines, 3, "names.txt")


def test_names_that_are_not_there_are_told_with_the_nearest_file_that_is(tmp_path: Path) -> None:
    (tmp_path / "birds.txt").touch()
    with pytest.raises(ModelError, match=f"did you mean {tmp_path / 'birds.txt'}.*`imagenet`"):
        read_labels(tmp_path / "brids.txt")


@pytest.mark.parametrize(("kind", "count"), [("onnx", 999), ("onnx", 1001), ("torchvision", 1001)])
def test_as_many_names_as_classes_or_the_job_ends_with_2_and_caches_nothing(
    batchclf: Batchclf, tmp_path: Path, kind: str, count: int
) -> None:
    model: dict[str, object] = {"name": "squeezenet1_1", "weights": "none"}
    if kind == "onnx":
        path = save(Classifier(num_classes=1000), tmp_path / "own.onnx")
        model = {"onnx": str(path), "preprocess": PREPROCESS}
    (tmp_path / "names.txt").write_text("".join(f"class {number}\n" for number in range(count)))
    job = write_job(tmp_path, model=model | {"labels": "names.txt"})
    cache = tmp_path / "cache"
    done = batchclf("run", job, "--json", env={"BATCHCLF_CACHE_DIR": os.fspath(cache)})
    assert done.exit_code == 2
    assert f"found {count:,} names for a model of 1,000 classes" in done.json["error"]
    assert "names.txt" in done.json["error"]
    assert ("'class 0'" in done.json["error"]) == (count == 1001)
    assert "Traceback" not in done.stderr
    left = [path.name for path in cache.rglob("*") if path.is_file() or path.name.startswith(".")]
    assert all(name.endswith(".lock") for name in left), left
    assert [path for path in cache.glob("bundles/*") if path.is_dir()] == []


def test_new_names_for_a_cached_model_are_used_at_once(batchclf: Batchclf, tmp_path: Path) -> None:
    path = save(Classifier(num_classes=3, seed=3), tmp_path / "own.onnx")
    names = tmp_path / "names.txt"
    found = []
    for text in ("ant\nbee\ncat\n", "one\ntwo\nthree\n"):
        names.write_text(text)
        job = write_job(
            tmp_path,
            input=str(ROOT / "samples" / "photos"),
            model={"onnx": str(path), "labels": str(names), "preprocess": PREPROCESS},
        )
        done = batchclf("run", job, "--overwrite", "--limit", "1")
        assert done.exit_code == 0, done.stderr
        (record,) = read_records(tmp_path / "out")
        found.append({entry["index"]: entry["label"] for entry in record["predictions"]})
    assert found == [{0: "ant", 1: "bee", 2: "cat"}, {0: "one", 1: "two", 2: "three"}]


def test_a_cached_model_still_refuses_the_wrong_number_of_names(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    path = save(Classifier(num_classes=3, seed=4), tmp_path / "own.onnx")
    own = {"onnx": str(path), "preprocess": PREPROCESS}
    job = write_job(tmp_path, input=str(ROOT / "samples" / "photos"), model=own)
    first = batchclf("run", job)
    assert first.exit_code == 0
    assert "no class names come with the model" in first.stderr
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    job = write_job(tmp_path, model=own | {"labels": "names.txt"})
    done = batchclf("run", job, "--overwrite", "--json")
    assert done.exit_code == 2
    assert "found 2 names for a model of 3 classes" in done.json["error"]
