"""The same images, wherever they lie, have the same records."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Batchclf, command, read_records
from tests.engines.common import started
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


def test_a_run_of_an_archive_that_changed_is_not_resumed_but_listed_anew_with_overwrite(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    def pack(paths: list[Path]) -> None:
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            for path, name in zip(paths, names, strict=True):
                archive.add(path, name)

    paths = sorted((photos / "a").iterdir())
    names = [path.name for path in paths]
    pack(paths)
    job = write_tiny_job(tmp_path, input="all.tar")
    assert batchclf("run", job).exit_code == 0
    expected = read_records(tmp_path / "out")
    predictions = tmp_path / "out" / "predictions.jsonl"
    predictions.write_bytes(predictions.read_bytes().splitlines(keepends=True)[0])
    pack(paths[::-1])
    done = batchclf("run", job)
    assert done.exit_code == 2
    assert "all.tar was written to after it was listed" in done.stderr
    assert batchclf("run", job, "--overwrite").exit_code == 0
    swapped = [
        other | {"path": one["path"]} for one, other in zip(expected, expected[::-1], strict=True)
    ]
    assert_same_records(read_records(tmp_path / "out"), swapped)


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


def test_one_image_is_an_input_whose_path_is_its_name(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    expected = records_of(tmp_path / "folder", str(photos))
    done = batchclf("run", write_tiny_job(tmp_path), "-i", photos / expected[0]["path"])
    assert done.exit_code == 0, done.stderr
    (found,) = read_records(tmp_path / "out")
    name = Path(expected[0]["path"]).name
    assert_same_records([found], [expected[0] | {"path": name}])


def test_a_glob_of_another_case_ends_with_exit_code_2_and_the_glob_to_write(
    tmp_path: Path, photos: Path, batchclf: Batchclf
) -> None:
    for path in (photos / "a").iterdir():
        path.rename(path.with_suffix(path.suffix.upper()))
    done = batchclf("run", write_tiny_job(tmp_path), "-i", photos / "a" / "*.jpg")
    assert done.exit_code == 2
    assert f"found 0 images: no file matches; 4 files are below {photos}/a, 4 of" in done.stderr
    assert f"write {photos}/a/*.JPG" in done.stderr


# ---- lists that can be read once only ------------------------------------------------------------


@pytest.fixture
def expected(tmp_path: Path, photos: Path) -> list[dict[str, Any]]:
    """The records of the photos, as a list relative to the folder above them has them."""
    found = records_of(tmp_path / "folder", str(photos))
    return [one | {"path": f"photos/{one['path']}"} for one in found]


def shell(script: str, cwd: Path, **popen: Any) -> subprocess.CompletedProcess[str]:
    """A script of bash, in which `batchclf` is the command."""
    program = f'batchclf() {{ {shlex.join(command())} "$@"; }}; {script}'
    return subprocess.run(
        ["bash", "-c", program],
        **{"stdin": subprocess.DEVNULL, **popen},
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


FIND = "find photos -type f | LC_ALL=C sort"
STREAMS = {
    "stdin": f"{FIND} | batchclf run job.yaml -i -",
    "stdin by its name": f"{FIND} | batchclf run job.yaml -i /dev/stdin",
    "a file as stdin": f"{FIND} > list; batchclf run job.yaml -i - < list",
    "process substitution": f"batchclf run job.yaml -i <({FIND})",
    "JSON": f"""{FIND} | sed 's/.*/{{"path": "&"}}/' | batchclf run job.yaml -i -""",
    "FIFO": f"mkfifo fifo; (sleep 1; {FIND} > fifo) & batchclf run job.yaml -i fifo",
}
"""Ways to give a list that can be read once only."""


@pytest.mark.parametrize("script", STREAMS.values(), ids=STREAMS)
def test_a_list_that_can_be_read_once_only_is_read_once(
    tmp_path: Path, expected: list[dict[str, Any]], script: str
) -> None:
    write_tiny_job(tmp_path)
    done = shell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_records(read_records(tmp_path / "out"), expected)


def test_a_list_that_can_be_read_once_only_is_not_needed_to_resume(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_tiny_job(tmp_path)
    assert shell(f"{FIND} | batchclf run job.yaml -i -", tmp_path).returncode == 0
    out = tmp_path / "out"
    (out / "predictions.jsonl").write_bytes((out / "predictions.jsonl").read_bytes()[:200])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = shell("batchclf run ../job.yaml -i <(echo another)", elsewhere)
    assert again.returncode == 0, again.stderr
    assert_same_records(read_records(out), expected)


def test_a_kept_list_goes_on_with_a_larger_limit_and_is_read_anew_to_extend_or_overwrite(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_tiny_job(tmp_path)
    out = tmp_path / "out"
    for script, num_records in (
        (f"{FIND} | batchclf run job.yaml -i - --limit 3", 3),
        ("batchclf run job.yaml -i - --limit 5 <&-", 5),
        (f"{FIND} | head -n 7 | batchclf run job.yaml -i - --overwrite", 7),
        (f"{FIND} | batchclf run job.yaml -i - --extend", 8),
    ):
        done = shell(script, tmp_path)
        assert done.returncode == 0, done.stderr
        assert_same_records(read_records(out), expected[:num_records])


def test_shards_share_the_list_that_the_first_of_them_read(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_tiny_job(tmp_path)
    first = shell(f"{FIND} | batchclf run job.yaml -i - --shard 0/2", tmp_path)
    second = shell("batchclf run job.yaml -i <(true) --shard 1/2", tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    names = [f"predictions-0000{number}-of-00002.jsonl" for number in range(2)]
    found = [record for name in names for record in read_records(tmp_path / "out", name)]
    assert_same_records(found, expected)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("true | batchclf run job.yaml -i -", "input: -: found 0 images: it holds no path"),
        ("batchclf run job.yaml -i - <&-", "input: -: stdin is closed"),
        ("echo gone.jpg | batchclf run job.yaml -i -", "gone.jpg: it is not below"),
        ("true | batchclf validate job.yaml -i -", "input: -: found 0 images: it holds no path"),
        ("echo gone.jpg | batchclf validate job.yaml -i -", "gone.jpg: it is not below"),
    ],
)
def test_a_stream_that_names_no_image_ends_with_exit_code_2(
    tmp_path: Path, script: str, said: str
) -> None:
    write_tiny_job(tmp_path)
    done = shell(script, tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert [path.name for path in tmp_path.glob("out/.input*")] == []


@pytest.mark.parametrize("name", ["validate", "verify"])
def test_commands_that_keep_nothing_read_a_stream_as_well(
    tmp_path: Path, photos: Path, name: str
) -> None:
    write_tiny_job(tmp_path)
    done = shell(f"{FIND} | TMPDIR=$PWD batchclf {name} job.yaml -i - --json", tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("batchclf-*")) == []
    if name == "validate":
        assert json.loads(done.stdout)["num_images"] == 8


def test_a_run_that_waits_for_a_list_ends_at_a_signal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    job = write_tiny_job(tmp_path, input=str(tmp_path / "fifo"))
    with started(job) as run:
        run.wait_until(lambda: list(tmp_path.glob("out/.input.txt.tmp")))
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143
    assert list(tmp_path.glob("out/.input*")) == []
