"""What a stop leaves behind, whatever stopped it, and that the same command finishes the job."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchclf.errors import Interrupted, ResumeRefused
from batchclf.interrupt import StopRequest
from batchclf.jobfile import load_job
from batchclf.pipeline import run_job
from batchclf.request import RunOptions
from batchclf.runtime.providers import PROVIDERS, compiled_in
from tests.conftest import ROOT, Batchclf, command, read_records, write_job
from tests.tiny import (
    SLOW_RESIZE,
    Log,
    assert_same_records,
    link_digits,
    run_here,
    tiny_model,
    write_tiny_job,
)

WAIT_S = 30.0


@contextmanager
def started(job: Path, *options: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A real `batchclf run`, killed at the end of the block at the latest."""
    process = subprocess.Popen(
        command("run", job, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something a running job does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the job did not get there"
        time.sleep(0.005)


def has_records(output: Path) -> Callable[[], bool]:
    predictions = output / "predictions.jsonl"
    return lambda: predictions.exists() and predictions.stat().st_size > 0


def status_of(output: Path) -> str:
    return str(json.loads((output / "run.json").read_bytes())["status"])


def slow_job(folder: Path, num_images: int, **keys: Any) -> Path:
    """A job of some seconds, its bundle already in the cache."""
    images = link_digits(folder / "images", num_images)
    job = write_tiny_job(
        folder,
        input=str(images),
        model=tiny_model(folder, resize=SLOW_RESIZE),
        **{"batch_size": 4, "loader": {"workers": 2}, **keys},
    )
    warm = write_tiny_job(
        folder,
        name="warm.yaml",
        model=tiny_model(folder, resize=SLOW_RESIZE),
        output=str(folder / "warm"),
    )
    run_here(warm, RunOptions(limit=8))
    return job


# ---- a kill --------------------------------------------------------------------------------------


def test_a_job_killed_again_and_again_ends_as_an_undisturbed_one(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = slow_job(tmp_path, 600)
    out = tmp_path / "out"
    moments = random.Random(20)
    sizes = [0]
    for attempt in range(5):
        with started(job) as process:
            if attempt == 0:
                time.sleep(moments.uniform(0.1, 0.5))  # perhaps before anything is written
            else:
                wait_until(partial(_is_larger, out, sizes[-1]), process)
                time.sleep(moments.uniform(0, 0.25))
            process.kill()
        sizes.append(_size(out))
    assert sizes[-1] > 0
    last = batchclf("run", job)
    assert last.exit_code == 0, last.stderr
    assert "resuming after" in last.stderr
    undisturbed = write_tiny_job(
        tmp_path,
        input=str(tmp_path / "images"),
        output=str(tmp_path / "undisturbed"),
        model=tiny_model(tmp_path, resize=SLOW_RESIZE),
        batch_size=32,
    )
    run_here(undisturbed)
    records = read_records(out)
    assert len({record["path"] for record in records}) == len(records) == 600
    assert_same_records(records, read_records(tmp_path / "undisturbed"))
    assert status_of(out) == "complete"


def _is_larger(output: Path, num_bytes: int) -> bool:
    return _size(output) > num_bytes


def _size(output: Path) -> int:
    predictions = output / "predictions.jsonl"
    return predictions.stat().st_size if predictions.exists() else 0


@pytest.mark.parametrize(
    "tail",
    [
        b'{"path":"0/0208.png","status":"ok","predic',
        b"garbage after the last newline",
        b"garbage\n",
        b"\0" * 4096,
        b"\0" * 100 + b"\n",
        b'{"path":"caf\xc3',
        b'{"path":"0/0208.png","status":"ok","predictions":[]}',
        b"\n",
        b'{"path":"elsewhere.jpg","status":"ok","predictions":[]}\n',
    ],
)
def test_whatever_stands_after_the_last_whole_record_is_cut_off(
    tmp_path: Path, tail: bytes
) -> None:
    job = write_tiny_job(tmp_path, batch_size=8)
    options = RunOptions(limit=40)
    run_here(job, options)
    predictions = tmp_path / "out" / "predictions.jsonl"
    whole = predictions.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:9])
    predictions.write_bytes(kept + tail)
    log = Log()
    result = run_here(job, options, log)
    assert log.num_done == 9
    assert not result.was_complete
    assert result.summary["num_images"] == 40
    assert predictions.read_bytes() == whole


def test_a_missing_last_newline_costs_one_record(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    options = RunOptions(limit=40)
    run_here(job, options)
    predictions = tmp_path / "out" / "predictions.jsonl"
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[:-1])
    log = Log()
    run_here(job, options, log)
    assert log.num_done == 39
    assert predictions.read_bytes() == whole


def test_records_lost_with_their_file_are_written_again(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=10))
    (tmp_path / "out" / "predictions.jsonl").unlink()
    result = run_here(job, RunOptions(limit=10))
    assert not result.was_complete
    assert len(read_records(tmp_path / "out")) == 10


# ---- a finished job ------------------------------------------------------------------------------


def test_a_finished_job_run_again_says_so_and_touches_nothing(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job)
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.name != ".lock")
    before = [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0
    assert "already complete: 300 images" in done.stderr
    assert done.json["was_complete"] is True
    assert done.json["num_images"] == 300
    after = [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    assert after == before


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=9))
    log = Log()
    result = run_here(job, RunOptions(limit=5, overwrite=True), log)
    assert (log.num_done, result.was_complete) == (0, False)
    assert len(read_records(tmp_path / "out")) == 5
    assert len((tmp_path / "out" / "stats.jsonl").read_bytes().splitlines()) == 1


def test_the_listing_of_the_first_start_stands(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 6)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    predictions = tmp_path / "out" / "predictions.jsonl"
    names = sorted(path.name for path in images.iterdir())
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:2]))
    (images / "000000-new.jpg").write_bytes((images / names[0]).read_bytes())
    (images / names[4]).unlink()
    run_here(job)
    records = read_records(tmp_path / "out")
    assert [record["path"] for record in records] == names
    assert records[4]["error"]["code"] == "vanished"


def test_a_listing_left_by_a_start_that_never_began_is_not_taken_for_another_job(
    tmp_path: Path,
) -> None:
    job = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "first", 5)))
    run_here(job)
    for name in ("run.json", "predictions.jsonl", "stats.jsonl"):
        (tmp_path / "out" / name).unlink()
    other = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "second", 8)))
    assert run_here(other).summary["num_ok"] == 8


# ---- another job ---------------------------------------------------------------------------------


def changed_jobs(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Keys that make another job, and the name under which the refusal tells of it."""
    labels = folder / "labels.txt"
    labels.write_text("".join(f"class {index}\n" for index in range(10)))
    model = tiny_model(folder)
    other = tiny_model(folder, nan_when_dark=True)
    other["onnx"] = str(Path(other["onnx"]).rename(folder / "other.onnx"))
    tiny_model(folder)
    preprocess = model["preprocess"]
    return {
        "top_k": ({"top_k": 4}, "top_k"),
        "model": ({"model": other}, "model"),
        "labels": ({"model": {**model, "labels": str(labels)}}, "labels"),
        "resize": ({"model": {**model, "preprocess": {**preprocess, "resize": 9}}}, "preprocess"),
        "interpolation": (
            {"model": {**model, "preprocess": {**preprocess, "interpolation": "bicubic"}}},
            "preprocess",
        ),
        "exif": (
            {"model": {**model, "preprocess": {**preprocess, "exif_transpose": True}}},
            "preprocess",
        ),
        "decode": ({"loader": {"decode": "fast"}}, "preprocess"),
        "input": ({"input": str(link_digits(folder / "images", 3))}, "input"),
        "outside links": ({"loader": {"allow_outside_links": True}}, "allow_outside_links"),
    }


@pytest.mark.parametrize(
    "change",
    [
        "top_k",
        "model",
        "labels",
        "resize",
        "interpolation",
        "exif",
        "decode",
        "input",
        "outside links",
    ],
)
def test_another_jobs_output_is_refused_and_left_alone(tmp_path: Path, change: str) -> None:
    run_here(write_tiny_job(tmp_path), RunOptions(limit=5))
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    keys, name = changed_jobs(tmp_path)[change]
    with pytest.raises(ResumeRefused, match=f"\n  {name}: was .*, is |{name}") as refused:
        run_here(write_tiny_job(tmp_path, **keys), RunOptions(limit=5))
    assert refused.value.exit_code == 2
    assert "--overwrite" in str(refused.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_limit_is_another_job_and_the_refusal_names_the_values(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=5))
    done = batchclf("run", job, "--limit", "6", "--top-k", "2")
    assert done.exit_code == 2
    assert "limit: was 5, is 6" in done.stderr
    assert "top_k: was 5, is 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_how_the_machine_is_used_may_change_between_runs(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path, batch_size=16)
    options = RunOptions(limit=40)
    run_here(job, options)
    predictions = tmp_path / "out" / "predictions.jsonl"
    expected = read_records(tmp_path / "out")
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:11]))
    other = write_tiny_job(
        tmp_path,
        batch_size=3,
        loader={"workers": 5, "prefetch": 7},
        runtime={"streams": 3, "threads": 2},
        errors={"max": 10},
    )
    log = Log()
    run_here(other, options, log)
    assert log.num_done == 11
    assert_same_records(read_records(tmp_path / "out"), expected)


def test_records_without_a_run_json_are_not_written_over(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=5))
    (tmp_path / "out" / "run.json").write_bytes(b"\0" * 100)
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    with pytest.raises(ResumeRefused, match=r"no readable run\.json"):
        run_here(job, RunOptions(limit=5))
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


# ---- two at once, and signals --------------------------------------------------------------------


def test_a_second_process_on_the_same_output_is_refused_while_the_first_runs(
    tmp_path: Path,
) -> None:
    job = slow_job(tmp_path, 800)
    with started(job) as first:
        wait_until(has_records(tmp_path / "out"), first)
        with started(job) as second, started(job, "--overwrite") as third:
            for refused in (second, third):
                _, stderr = refused.communicate(timeout=60)
                assert refused.returncode == 2, stderr
                assert "another batchclf is writing there" in stderr
        assert first.poll() is None, "the first job was too short to tell"
        _, stderr = first.communicate(timeout=60)
        assert first.returncode == 0, stderr
    assert len(read_records(tmp_path / "out")) == 800


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_drains_within_8_s_and_the_same_command_finishes(
    batchclf: Batchclf, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    job = slow_job(tmp_path, 300)
    out = tmp_path / "out"
    with started(job, "--json") as process:
        wait_until(has_records(out), process)
        process.send_signal(number)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=8)
        assert time.monotonic() - sent < 8
    assert process.returncode == exit_code, stderr
    assert f"stopped by {number.name}; run the same command to resume" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["exit_code"] == exit_code
    assert status_of(out) == "interrupted"
    data = (out / "predictions.jsonl").read_bytes()
    assert data.endswith(b"\n")
    num_first = len(data.splitlines())
    assert 0 < num_first < 300
    resumed = batchclf("run", job)
    assert resumed.exit_code == 0, resumed.stderr
    assert f"resuming after {num_first} of 300 images" in resumed.stderr
    assert (out / "predictions.jsonl").read_bytes().startswith(data)
    assert len({record["path"] for record in read_records(out)}) == 300
    assert status_of(out) == "complete"


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, resize=4000)
    run_here(
        write_tiny_job(tmp_path, model=model, output=str(tmp_path / "warm")), RunOptions(limit=1)
    )
    job = write_tiny_job(tmp_path, model=model, batch_size=64, loader={"workers": 1})
    out = tmp_path / "out"
    with started(job) as process:
        wait_until(lambda: (out / "run.json").exists(), process)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=4) == 130
    assert status_of(out) == "running"


def test_a_signal_during_the_export_of_a_model_stops_it_and_leaves_no_half_bundle(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    job = write_job(tmp_path)
    with started(job, BATCHCLF_CACHE_DIR=str(cache)) as process:
        assert process.stderr is not None
        assert "exporting shufflenet_v2_x0_5" in process.stderr.readline()
        wait_until(lambda: any(cache.rglob("bundle")), process)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=8)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in cache.rglob("*") if path.suffix != ".lock"] == ["bundles"]


def test_a_signal_before_the_first_batch_is_not_forgotten(tmp_path: Path) -> None:
    stop = StopRequest()
    log = Log()

    def begin(num_images: int, num_done: int) -> None:
        stop.signal_number = signal.SIGTERM

    log.begin = begin  # type: ignore[method-assign]
    job = write_tiny_job(tmp_path)
    with pytest.raises(Interrupted):
        run_job(load_job(job), RunOptions(), reporter=log, stop=stop)
    assert status_of(tmp_path / "out") == "interrupted"
    run_here(job)
    assert len(read_records(tmp_path / "out")) == 300


def test_overwrite_throws_nothing_away_before_what_replaces_it_runs(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, precision="int8", min_agreement=0)
    assert batchclf("run", job).exit_code == 0
    out = tmp_path / "out"
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    dark = tmp_path / "dark"
    dark.mkdir()
    (dark / "broken.jpg").write_bytes(b"\xff\xd8")
    refused = batchclf("run", job, "--overwrite", "-i", dark)
    assert refused.exit_code == 2, refused.stderr
    assert "sampled can be decoded" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == kept
    assert batchclf("run", job, "--overwrite", "--limit", "7").exit_code == 0
    assert len(read_records(out)) == 7


def test_a_finished_job_is_finished_where_its_provider_does_not_work(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    assert batchclf("run", job).exit_code == 0
    elsewhere = next(name for name in ("cuda", "openvino") if name not in works_here())
    again = batchclf("run", job, "--provider", elsewhere, "--json")
    assert again.exit_code == 0, again.stderr
    assert again.json["was_complete"]
    assert batchclf("run", job, "--provider", elsewhere, "--overwrite").exit_code == 4
    assert len(read_records(tmp_path / "out")) == 300


def works_here() -> list[str]:
    return [name for name, one in PROVIDERS.items() if one.execution_provider in compiled_in()]


def test_records_of_a_model_that_would_be_calibrated_anew_are_not_added_to(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(ROOT / "samples" / "digits", images)
    job = write_job(tmp_path, input=str(images), precision="int8")
    assert batchclf("run", job).exit_code == 0
    predictions = tmp_path / "out" / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    predictions.write_bytes(b"".join(lines[:100]))
    assert batchclf("run", job).exit_code == 0
    assert predictions.read_bytes() == b"".join(lines)
    predictions.write_bytes(b"".join(lines[:100]))
    shown = sorted(path for path in images.rglob("*") if path.is_file())
    for path in shown[150:]:
        shutil.copyfile(shown[0], path)
    done = batchclf("run", job)
    assert done.exit_code == 2, done.stderr
    assert "ONNX Runtime or images of its calibration changed" in done.stderr
    assert predictions.read_bytes() == b"".join(lines[:100])
