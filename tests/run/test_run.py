"""`batchclf run` end to end: its files, their order and figures, bad input, errors, exit codes."""

import json
import os
import pty
import shutil
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from PIL import Image

from batchclf.errors import ErrorLimitPassed, NoImagesError, UsageError
from batchclf.results.records import Shard
from batchclf.runtime.providers import installed_flavours
from batchclf.spec.options import RunOptions
from tests.conftest import ROOT, Batchclf, command, read_records, write_job
from tests.tiny import (
    DIGITS,
    NUM_CLASSES,
    Log,
    assert_same_records,
    link_digits,
    name_in,
    run_here,
    tiny_model,
    write_tiny_job,
)

SUMMARY_KEYS = {
    *("type", "num_images", "num_new", "num_ok", "num_errors", "errors_by_code"),
    *("wall_s", "startup_s", "bottleneck_why"),
    *("images_per_s", "stage_s", "batch_ms", "bottleneck", "cpu_s", "peak_rss_mb"),
    *("batch_size", "part", "provider", "precision", "precision_check", "decode", "versions"),
}
FINGERPRINT_KEYS = {
    *("model", "preprocess", "labels", "top_k", "precision", "input", "limit", "num_images"),
    *("listing", "recipe", "converted"),
}
IMAGE = DIGITS / "0" / "0079.jpg"


def a_few(folder: Path, *names: str | bytes) -> Path:
    """A folder with a good image under each of these names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        target = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(IMAGE, target)
    return folder


# ---- the files of a finished job -----------------------------------------------------------------


def test_a_job_writes_its_files_with_the_keys_of_the_contract(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = a_few(tmp_path / "images", "good.jpg")
    (images / "bad.jpg").write_bytes(b"")
    job = write_tiny_job(tmp_path, input=str(images), top_k=3, batch_size=2)
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "predictions.jsonl",
        "stats.jsonl",
        "run.json",
        "listing.nul",
    }
    bad, good = read_records(out)
    assert list(bad) == ["path", "status", "error"]
    assert bad["path"] == "bad.jpg"
    assert bad["status"] == "error"
    assert list(bad["error"]) == ["code", "message"]
    assert bad["error"]["code"] == "empty_file"
    assert list(good) == ["path", "status", "predictions"]
    assert good["status"] == "ok"
    assert [list(one) for one in good["predictions"]] == [["label", "index", "score"]] * 3

    summary = json.loads((out / "stats.jsonl").read_bytes().splitlines()[-1])
    assert set(summary) == SUMMARY_KEYS
    assert summary["type"] == "summary"
    assert (summary["num_images"], summary["num_ok"], summary["num_errors"]) == (2, 1, 1)
    assert summary["errors_by_code"] == {"empty_file": 1}
    assert set(summary["stage_s"]) == {"list", "decode_wait", "infer", "write"}
    assert set(summary["batch_ms"]) == {"p50", "p95", "p99"}
    assert summary["bottleneck"] in ("decode", "infer", "write")
    assert summary["batch_size"] == 2
    provider = summary["provider"]
    assert set(provider) == {
        *("requested", "active", "device", "nodes"),
        *("cpu_nodes", "options", "fallback"),
    }
    assert (provider["requested"], provider["active"]) == ("cpu", "CPUExecutionProvider")
    assert provider["fallback"] is None
    assert provider["nodes"]["CPUExecutionProvider"] > 0
    versions = {"batchclf", "python", "numpy", "pillow", *installed_flavours()}
    assert versions <= set(summary["versions"])
    assert summary["wall_s"] > 0
    assert summary["peak_rss_mb"] > 1

    run = json.loads((out / "run.json").read_bytes())
    assert run["status"] == "complete"
    assert set(run["fingerprint"]) >= FINGERPRINT_KEYS
    assert not {"provider", "batch_size", "workers", "streams"} & set(run["fingerprint"])
    assert run["job"]["input"] == str(images)
    assert run["job"]["top_k"] == 3
    assert run["num_images"] == 2
    assert (run["started_at"], run["ended_at"]) == tuple(
        sorted((run["started_at"], run["ended_at"]))
    )


def test_json_is_the_only_line_on_stdout_and_the_rest_goes_to_stderr(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    done = batchclf("run", job, "--limit", "20", "--json")
    assert len(done.stdout.splitlines()) == 1
    assert done.json["status"] == "complete"
    assert done.json["exit_code"] == 0
    assert done.json["num_images"] == 20
    assert set(done.json) >= SUMMARY_KEYS
    assert "20 images: 20 ok, 0 errors" in done.stderr
    again = batchclf("run", job, "--limit", "20", "--json")
    assert len(again.stdout.splitlines()) == 1
    assert again.json["was_complete"] is True
    without = batchclf("run", job, "--limit", "20", "--overwrite")
    assert without.stdout == ""
    failed = batchclf("run", job, "--precision", "int8", "--json")
    assert len(failed.stdout.splitlines()) == 1
    assert failed.json["exit_code"] == failed.exit_code == 2
    assert failed.json["status"] == "failed"
    assert failed.json["error"] in failed.stderr


def test_records_stand_depth_first_with_the_names_of_each_folder_sorted_by_bytes(
    tmp_path: Path,
) -> None:
    names = ["B/1.jpg", "a/10.jpg", "a/2.jpg", "a/b/0.jpg", "a-b.jpg", "a.jpg", "z.jpg", "é.jpg"]
    images = a_few(tmp_path / "images", *reversed(names))
    run_here(write_tiny_job(tmp_path, input=str(images), batch_size=3))
    assert [record["path"] for record in read_records(tmp_path / "out")] == names


def test_the_limit_takes_the_first_images_of_the_listing(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job)
    whole = read_records(tmp_path / "out")
    run_here(job, RunOptions(limit=7, overwrite=True))
    assert_same_records(read_records(tmp_path / "out"), whole[:7])
    assert len(whole) == 300


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_cover_everything_once_in_order_under_their_own_names(
    tmp_path: Path, count: int
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=40))
    whole = read_records(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    found: list[dict[str, Any]] = []
    for index in reversed(range(count)):
        suffix = f"-{index:05d}-of-{count:05d}" if count > 1 else ""
        result = run_here(job, RunOptions(Shard(index, count), limit=40))
        assert result.files.predictions.name == f"predictions{suffix}.jsonl"
        assert (tmp_path / "out" / f"stats{suffix}.jsonl").exists()
        assert (tmp_path / "out" / f"run{suffix}.json").exists()
        found = read_records(tmp_path / "out", result.files.predictions.name) + found
    assert_same_records(found, whole)


def test_shards_that_start_at_once_cover_everything_once(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=1))  # the bundle is in the cache from here on
    shutil.rmtree(tmp_path / "out")
    processes = [
        subprocess.Popen(
            command("run", job, "--shard", f"{index}/3"),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(3)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    found: list[dict[str, Any]] = []
    for index in range(3):
        found += read_records(tmp_path / "out", f"predictions-{index:05d}-of-00003.jsonl")
    assert len({record["path"] for record in found}) == len(found) == 300


@pytest.mark.parametrize("shard", ["3/3", "0/0", "-1/3", "1", "a/b", "1/3/4", ""])
def test_a_shard_that_is_none_is_refused(batchclf: Batchclf, tmp_path: Path, shard: str) -> None:
    done = batchclf("run", write_tiny_job(tmp_path), f"--shard={shard}")
    assert done.exit_code == 2, done.stderr
    assert "--shard" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_records_whatever_the_batch_size_workers_and_streams(tmp_path: Path) -> None:
    job = write_job(tmp_path, batch_size=1, runtime={"streams": 1, "threads": 1})
    options = RunOptions(limit=100)
    run_here(job, options)
    expected = read_records(tmp_path / "out")
    for batch_size, workers, streams, threads in (
        (7, 1, 3, 1),
        (64, 4, 2, 2),
        (100, 8, 1, "auto"),
        (33, "auto", "auto", 1),
    ):
        other = write_job(
            tmp_path,
            output=str(tmp_path / f"out{batch_size}"),
            batch_size=batch_size,
            loader={"workers": workers, "prefetch": 1},
            runtime={"streams": streams, "threads": threads},
        )
        run_here(other, options)
        assert_same_records(read_records(tmp_path / f"out{batch_size}"), expected)


def test_a_top_k_larger_than_the_classes_gives_all_of_them(tmp_path: Path) -> None:
    run_here(write_tiny_job(tmp_path, top_k=1000), RunOptions(limit=2))
    for record in read_records(tmp_path / "out"):
        assert sorted(one["index"] for one in record["predictions"]) == list(range(NUM_CLASSES))
        assert sum(one["score"] for one in record["predictions"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("key", ["top_k", "loader.max_pixels"])
def test_a_number_of_any_size_that_a_job_accepts_can_be_run(
    batchclf: Batchclf, tmp_path: Path, key: str
) -> None:
    done = batchclf("run", write_tiny_job(tmp_path), "--limit", "1", "--set", f"{key}={10**20}")
    assert "Traceback" not in done.stderr
    assert done.exit_code in (0, 2)


# ---- bad images ----------------------------------------------------------------------------------


def make_bad_images(folder: Path) -> dict[str, str]:
    """One bad image of each kind in `folder`; the code that each is recorded with."""
    jpeg, png = IMAGE.read_bytes(), (DIGITS / "0" / "0208.png").read_bytes()
    files = {
        "empty.jpg": (b"", "empty_file"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "text.jpg": (b"these are words", "not_an_image"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "not_an_image"),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        "page.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "around").symlink_to(folder)
    (folder / "outside.jpg").symlink_to(IMAGE)
    return {name: code for name, (_, code) in files.items()} | {
        "huge.png": "too_large",
        "pipe.jpg": "not_regular_file",
        "gone.jpg": "vanished",
        "loop.jpg": "symlink_loop",
        "around": "symlink_loop",
        "outside.jpg": "outside_root",
    }


def test_bad_images_cost_their_own_records_and_nothing_else(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(DIGITS / "3", images)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=4)
    run_here(job)
    alone = read_records(tmp_path / "out")
    expected = make_bad_images(images)
    done = batchclf("run", job, "-o", tmp_path / "both", "--json")
    assert done.exit_code == 0, done.stderr
    records = read_records(tmp_path / "both")
    failed = {one["path"]: one["error"]["code"] for one in records if one["status"] == "error"}
    assert failed == expected
    assert all(one["error"]["message"] for one in records if one["status"] == "error")
    assert_same_records([one for one in records if one["status"] == "ok"], alone)
    assert done.json["num_errors"] == len(expected)
    assert sum(done.json["errors_by_code"].values()) == len(expected)
    assert "Traceback" not in done.stderr


def test_an_output_that_is_not_finite_is_recorded_and_never_a_label(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = a_few(tmp_path / "images")
    Image.new("RGB", (8, 8), (200, 100, 50)).save(images / "bright.png")
    Image.new("RGB", (8, 8), (200, 0, 50)).save(images / "dark.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(images / "grey.png")
    job = write_tiny_job(tmp_path, input=str(images), preprocess={"nan_when_dark": True})
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    bright, dark, grey = read_records(tmp_path / "out")
    assert bright["status"] == grey["status"] == "ok"
    assert dark["error"]["code"] == "non_finite_output"
    assert "predictions" not in dark
    assert b"NaN" not in (tmp_path / "out" / "predictions.jsonl").read_bytes().replace(
        dark["error"]["message"].encode(), b""
    )


def test_names_that_are_not_utf8_and_names_with_newlines_come_back_as_they_are(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    names = [
        b"caf\xe9.jpg",
        b"two\nlines.jpg",
        b"\xff\xfe/in\rside.jpg",
        b"-rf.jpg",
        b'"q\\.jpg',
        "sep\u2028arator \U0001f600.jpg".encode(),
        b"\x1b[31mred.jpg",
    ]
    images = a_few(tmp_path / "images", *names)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=2)
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    assert "\x1b" not in done.stderr
    lines = (tmp_path / "out" / "predictions.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [name_in(json.loads(line)) for line in lines] == sorted(names)
    # They are known again when the job resumes.
    predictions = tmp_path / "out" / "predictions.jsonl"
    predictions.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:10])
    log = Log()
    run_here(job, log=log)
    assert log.num_done == 4
    assert predictions.read_bytes().split(b"\n")[:-1] == lines


def test_an_input_and_an_output_whose_own_names_are_not_utf8_can_be_run(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = a_few(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), "1.jpg")
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sultats"))
    done = batchclf("run", write_tiny_job(tmp_path), "-i", images, "-o", out, "--json")
    assert done.exit_code == 0, done.stderr[-800:]
    assert len(read_records(out)) == 1


# ---- the error limit -----------------------------------------------------------------------------


def folder_with_errors(folder: Path) -> Path:
    """20 images; those with an odd number are bad."""
    a_few(folder, *(f"{number:02d}.jpg" for number in range(20)))
    for number in range(1, 20, 2):
        (folder / f"{number:02d}.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("limit", [3, "20%"])
def test_a_job_over_its_error_limit_stops_with_3_and_resumes_when_it_is_raised(
    batchclf: Batchclf, tmp_path: Path, limit: int | str
) -> None:
    images = folder_with_errors(tmp_path / "images")
    job = write_tiny_job(tmp_path, input=str(images), batch_size=2, errors={"max": limit})
    stopped = batchclf("run", job, "--json")
    assert stopped.exit_code == 3, stopped.stderr
    assert stopped.json["exit_code"] == 3
    assert f"errors.max is {limit}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_bytes())["status"] == "failed"
    num_first = len(read_records(out))
    assert 8 <= num_first < 20
    raised = batchclf("run", job, "--set", "errors.max=50%")
    assert raised.exit_code == 0, raised.stderr
    assert f"resuming after {num_first} of 20" in raised.stderr
    assert [record["path"] for record in read_records(out)] == [f"{n:02d}.jpg" for n in range(20)]


@pytest.mark.parametrize("limit", [10, "50%", None])
def test_as_many_errors_as_the_limit_allows_are_no_reason_to_stop(
    tmp_path: Path, limit: int | str | None
) -> None:
    images = folder_with_errors(tmp_path / "images")
    job = write_tiny_job(tmp_path, input=str(images), batch_size=3, errors={"max": limit})
    assert run_here(job).summary.num_errors == 10


def test_a_job_over_its_error_limit_stays_so_however_often_it_is_run(tmp_path: Path) -> None:
    images = folder_with_errors(tmp_path / "images")
    job = write_tiny_job(tmp_path, input=str(images), batch_size=20, errors={"max": 9})
    for _ in range(3):
        with pytest.raises(ErrorLimitPassed):
            run_here(job)
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["status"] != "complete"


def test_running_again_over_the_limit_does_not_creep_towards_the_end(tmp_path: Path) -> None:
    images = folder_with_errors(tmp_path / "images")
    job = write_tiny_job(
        tmp_path, input=str(images), batch_size=1, errors={"max": 0}, runtime={"streams": 1}
    )
    counts = []
    for _ in range(3):
        with pytest.raises(ErrorLimitPassed):
            run_here(job)
        counts.append(len(read_records(tmp_path / "out")))
    assert counts[1:] == counts[:1] * 2


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "openvino"])
def test_a_provider_that_is_not_here_ends_with_4_before_any_work(
    batchclf: Batchclf, tmp_path: Path, name: str
) -> None:
    execution_provider = {"cuda": "CUDAExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
    if execution_provider[name] in onnxruntime.get_available_providers():
        pytest.skip(f"{name} is compiled into the ONNX Runtime here")
    done = batchclf("run", write_job(tmp_path), "--provider", name, "--json")
    assert done.exit_code == done.json["exit_code"] == 4
    assert execution_provider[name] in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_does_not_run_ends_with_2(
    batchclf: Batchclf, tmp_path: Path, precision: str
) -> None:
    done = batchclf("run", write_tiny_job(tmp_path), "--precision", precision)
    assert done.exit_code == 2
    assert precision in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "runs", "runs/deep"])
def test_an_output_inside_the_input_is_refused(tmp_path: Path, below: str) -> None:
    images = a_few(tmp_path / "images", "1.jpg")
    job = write_tiny_job(tmp_path, input=str(images), output=str(images / below))
    with pytest.raises(UsageError, match="lies inside the input"):
        run_here(job)
    assert os.listdir(images) == ["1.jpg"]


def test_an_output_inside_the_input_by_way_of_a_link_is_refused(tmp_path: Path) -> None:
    images = a_few(tmp_path / "images", "1.jpg")
    (tmp_path / "link").symlink_to(images)
    job = write_tiny_job(tmp_path, input=str(images), output=str(tmp_path / "link" / "out"))
    with pytest.raises(UsageError, match="lies inside the input"):
        run_here(job)


def test_an_output_that_a_globs_next_listing_would_hold_is_refused(tmp_path: Path) -> None:
    images = a_few(tmp_path / "images", "1.jpg")
    job = write_tiny_job(tmp_path, input=str(images / "**"), output=str(images / "out"))
    with pytest.raises(UsageError, match="inside the input"):
        run_here(job)


def test_an_output_that_is_a_file_is_refused(batchclf: Batchclf, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = batchclf("run", write_tiny_job(tmp_path))
    assert done.exit_code == 2
    assert f"{tmp_path / 'out'} is a file" in done.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_an_input_without_an_image_is_no_success(tmp_path: Path) -> None:
    images = tmp_path / "images"
    job = write_tiny_job(tmp_path, input=str(images))
    with pytest.raises(NoImagesError, match="no such folder"):
        run_here(job)
    images.mkdir()
    with pytest.raises(NoImagesError, match="found 0 images"):
        run_here(job)
    (images / "notes.txt").write_text("nothing to see")
    with pytest.raises(NoImagesError, match="none of them an image"):
        run_here(job)


# ---- the disk ------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own at `folder`; skips where it cannot be mounted."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", os.fspath(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", os.fspath(folder)], check=True)


def test_a_full_disk_ends_with_5_and_the_job_resumes_when_there_is_room(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    with mounted(tmp_path / "small", "size=64k") as small:
        job = write_tiny_job(tmp_path, output=str(small / "out"), batch_size=16, top_k=6)
        full = batchclf("run", job, "--json")
        assert full.exit_code == 5, full.stderr
        assert full.json["exit_code"] == 5
        assert "No space left on device" in full.stderr
        assert "Traceback" not in full.stderr
        again = batchclf("run", job)
        assert again.exit_code == 5, again.stderr
        subprocess.run(["mount", "-o", "remount,size=1m", os.fspath(small)], check=True)
        roomy = batchclf("run", job)
        assert roomy.exit_code == 0, roomy.stderr
        records = read_records(small / "out")
    assert len({record["path"] for record in records}) == len(records) == 300
    run_here(write_tiny_job(tmp_path, top_k=6))
    assert_same_records(records, read_records(tmp_path / "out"))


def test_an_output_that_cannot_be_written_ends_with_5(batchclf: Batchclf, tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    with mounted(tmp_path / "fixed", "ro,size=64k") as fixed:
        done = batchclf("run", job, "-o", fixed / "out", "--limit", "2")
    assert done.exit_code == 5, done.stderr
    assert f"output: {tmp_path / 'fixed' / 'out'}" in done.stderr
    assert "Traceback" not in done.stderr


# ---- progress ------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_and_nothing_else_does(batchclf: Batchclf, tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 120)
    model = tiny_model(tmp_path, resize=400)
    job = write_tiny_job(tmp_path, input=str(images), model=model, batch_size=8)
    plain = batchclf("run", job)
    assert plain.exit_code == 0, plain.stderr
    assert "\r" not in plain.stderr
    assert all(line.startswith("batchclf: ") for line in plain.stderr.splitlines())
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        command("run", job, "--overwrite"), stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0, seen
    assert stdout == b""
    assert b"100%" in seen
    assert b"120/120" in seen
    assert b"img/s" in seen
    assert b"120 images: 120 ok" in seen


@pytest.mark.parametrize(("num_bad", "exit_code"), [(29, 0), (30, 3)])
def test_a_rate_is_exact(batchclf: Batchclf, tmp_path: Path, num_bad: int, exit_code: int) -> None:
    images = link_digits(tmp_path / "images", 100 - num_bad)
    for number in range(num_bad):
        (images / f"bad-{number}.jpg").write_bytes(b"\xff\xd8")
    job = write_tiny_job(tmp_path, input=str(images), errors={"max": "29%"})
    assert batchclf("run", job).exit_code == exit_code  # 0.29 * 100 is 28.999999999999996
