"""What a stop leaves behind, whatever stopped it, and that the same command finishes the job."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchclf import __version__
from batchclf.cli import main
from batchclf.errors import Interrupted, ProviderError, ResumeRefused, UsageError
from batchclf.results.records import Shard
from batchclf.run import facts, identity
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.request import Run
from batchclf.runtime.providers import PROVIDERS, compiled_in
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import boot_id
from tests.conftest import ROOT, Batchclf, command, read_records, write_job
from tests.tiny import (
    SLOW,
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
        model=tiny_model(folder, **SLOW),
        **{"batch_size": 4, "loader": {"workers": 2}, **keys},
    )
    warm = write_tiny_job(
        folder,
        name="warm.yaml",
        model=tiny_model(folder, **SLOW),
        output=str(folder / "warm"),
    )
    run_here(warm, RunOptions(limit=8))
    return job


# ---- a kill --------------------------------------------------------------------------------------


def test_a_job_killed_again_and_again_ends_as_an_undisturbed_one(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = slow_job(tmp_path, 2000)
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
        model=tiny_model(tmp_path, **SLOW),
        batch_size=32,
    )
    run_here(undisturbed)
    records = read_records(out)
    assert len({record["path"] for record in records}) == len(records) == 2000
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
    assert result.summary.num_images == 40
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


@pytest.mark.parametrize("retry", [False, True])
def test_what_stands_after_the_records_of_a_finished_job_is_cut_off(
    tmp_path: Path, retry: bool
) -> None:
    job, predictions, _ = with_failures(tmp_path)
    whole = predictions.read_bytes()
    predictions.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    log = Log()
    result = run_here(job, RunOptions(limit=6, retry_failed=retry), log)
    assert any("bytes stood after the record of the last image" in line for line in log.lines)
    if retry:
        assert [record["status"] for record in read_records(tmp_path / "out")] == ["ok"] * 6
    else:
        assert result.was_complete
        assert predictions.read_bytes() == whole


def test_statistics_that_cannot_be_read_are_one_line_and_exit_code_5(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=6))
    stats = tmp_path / "out" / "stats.jsonl"
    stats.unlink()
    stats.symlink_to("/proc/self/mem")  # opens, and reading its beginning is EIO
    done = batchclf("run", job, "--limit", "6")
    assert done.exit_code == 5, done.stderr
    assert f"output: {stats}: cannot be read: Input/output error" in done.stderr
    assert "Traceback" not in done.stderr


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


def test_a_listing_of_another_job_is_refused_though_no_run_tells_of_it(tmp_path: Path) -> None:
    """It may be that of a shard which is just beginning."""
    job = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "first", 5)))
    run_here(job)
    for name in ("run.json", "predictions.jsonl", "stats.jsonl"):
        (tmp_path / "out" / name).unlink()
    other = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "second", 8)))
    with pytest.raises(ResumeRefused, match=r"(?s)listing\.nul.*input: was .*first', is .*second'"):
        run_here(other)
    assert run_here(other, RunOptions(overwrite=True)).summary.num_ok == 8


def test_a_listing_of_this_job_that_no_run_tells_of_is_gone_on_with(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 5)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    for name in ("run.json", "predictions.jsonl", "stats.jsonl"):
        (tmp_path / "out" / name).unlink()
    add_images(images, "new.jpg")
    assert run_here(job).summary.num_ok == 5


# ---- after a power loss, and after a kill --------------------------------------------------------


def interrupted_after(folder: Path, num_durable: int, num_written: int, boot: str) -> bytes:
    """An output of 40 images, of which so many records were durable, and so many written.

    Returns:
        all of the undisturbed lines.
    """
    run_here(write_tiny_job(folder, batch_size=8), RunOptions(limit=40))
    out = folder / "out"
    whole = (out / "predictions.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    durable = len(b"".join(lines[:num_durable]))
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:num_written]))
    run = json.loads((out / "run.json").read_bytes())
    run |= {
        "status": "running",
        "durable": {"num_bytes": durable, "num_images": num_durable, "boot_id": boot},
    }
    (out / "run.json").write_text(json.dumps(run))
    return whole


@pytest.mark.parametrize("tail", [b"", b"\0" * 5000, b"garbage\n"], ids=["records", "NUL", "text"])
def test_after_a_restart_of_the_machine_only_what_was_durable_is_relied_on(
    tmp_path: Path, tail: bytes
) -> None:
    """Even records that look well may be those of an earlier run."""
    whole = interrupted_after(tmp_path, 10, 25, boot="before")
    predictions = tmp_path / "out" / "predictions.jsonl"
    changed = predictions.read_bytes().splitlines(keepends=True)
    changed[15] = re.sub(rb'"score":0\.\d+', b'"score":0.5', changed[15])
    predictions.write_bytes(b"".join(changed) + tail)
    log = Log()
    run_here(write_tiny_job(tmp_path, batch_size=8), RunOptions(limit=40), log)
    assert log.num_done == 10
    assert predictions.read_bytes() == whole


def test_after_a_mere_kill_every_whole_record_is_kept_and_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = interrupted_after(tmp_path, 10, 25, boot=boot_id())
    predictions = tmp_path / "out" / "predictions.jsonl"
    kept = predictions.read_bytes()
    written: list[bytes] = []
    write = os.write

    def note(descriptor: int, data: bytes) -> int:
        written.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", note)
    log = Log()
    run_here(write_tiny_job(tmp_path, batch_size=8), RunOptions(limit=40), log)
    assert log.num_done == 25
    assert predictions.read_bytes() == whole
    durable = len(b"".join(kept.splitlines(keepends=True)[:10]))
    assert written[0] == kept[durable:], "written again: a failed sync may have lost it"


def test_durable_records_that_are_damaged_are_told_of_and_made_again(tmp_path: Path) -> None:
    whole = interrupted_after(tmp_path, 20, 25, boot="before")
    predictions = tmp_path / "out" / "predictions.jsonl"
    data = predictions.read_bytes()
    predictions.write_bytes(data[:1000] + b"\0" * 512 + data[1512:])
    log = Log()
    run_here(write_tiny_job(tmp_path, batch_size=8), RunOptions(limit=40), log)
    told = [line for line in log.lines if "20 records had been safe on disk, but only" in line]
    assert len(told) == 1
    assert 0 < log.num_done < 10
    assert predictions.read_bytes() == whole


def test_a_torn_line_of_statistics_is_cut_off(tmp_path: Path) -> None:
    interrupted_after(tmp_path, 10, 25, boot=boot_id())
    stats = tmp_path / "out" / "stats.jsonl"
    whole = stats.read_bytes()
    stats.write_bytes(whole + b'{"type":"interval","num_ima')
    run_here(write_tiny_job(tmp_path, batch_size=8), RunOptions(limit=40))
    assert stats.read_bytes().startswith(whole)
    assert [json.loads(line)["type"] for line in stats.read_bytes().splitlines()] == ["summary"] * 2


# ---- new files, and failed ones ------------------------------------------------------------------


def add_images(images: Path, *names: str) -> None:
    some = next(images.iterdir()).read_bytes()
    for name in names:
        (images / name).write_bytes(some)


def test_files_that_appear_later_are_added_when_that_is_asked_for(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 6)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    first = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    add_images(images, "000000-new.jpg", "zz.jpg")
    assert run_here(job).was_complete
    log = Log()
    summary = run_here(job, RunOptions(extend=True), log).summary
    assert "--extend: 2 new images in the listing" in log.lines
    assert (summary.num_images, summary.num_new) == (8, 2)
    data = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert data.startswith(first)
    paths = [record["path"] for record in read_records(tmp_path / "out")]
    assert paths[6:] == ["000000-new.jpg", "zz.jpg"]
    log = Log()
    assert run_here(job, RunOptions(extend=True), log).was_complete
    assert "--extend: 0 new images in the listing" in log.lines
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == data


def test_a_job_that_was_not_finished_can_be_extended(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 20)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=4)
    run_here(job)
    predictions = tmp_path / "out" / "predictions.jsonl"
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:7]))
    add_images(images, "000000-new.jpg")
    log = Log()
    run_here(job, RunOptions(extend=True), log)
    assert log.num_done == 7
    paths = [record["path"] for record in read_records(tmp_path / "out")]
    assert paths == [*sorted(paths[:-1]), "000000-new.jpg"]


@pytest.mark.parametrize("change", ["input", "top_k"])
def test_another_jobs_listing_is_not_extended(tmp_path: Path, change: str) -> None:
    images = link_digits(tmp_path / "images", 20)
    run_here(write_tiny_job(tmp_path, input=str(images)))
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    keys: dict[str, Any] = {"input": str(images)}
    if change == "input":
        keys = {"input": str(link_digits(tmp_path / "others", 30))}
    elif change == "top_k":
        keys["top_k"] = 2
    with pytest.raises(ResumeRefused, match=change):
        run_here(write_tiny_job(tmp_path, **keys), RunOptions(extend=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_listing_that_shards_divide_is_not_extended(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    job = write_tiny_job(tmp_path, input=str(images))
    for index in (0, 1):
        run_here(job, RunOptions(shard=Shard(index, 2)))
    add_images(images, "new.jpg")
    before = (tmp_path / "out" / "listing.nul").read_bytes()
    with pytest.raises(ResumeRefused, match="is divided otherwise"):
        run_here(job, RunOptions(extend=True))
    assert (tmp_path / "out" / "listing.nul").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ("--extend", "--overwrite"),
        ("--extend", "--retry-failed"),
        ("--extend", "--limit", "3"),
        ("--extend", "--shard", "0/2"),
        ("--overwrite", "--retry-failed"),
        ("--codes", "truncated"),
        ("--retry-failed", "--codes", "Truncated!"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    refused = CliRunner().invoke(main, ["run", str(write_tiny_job(tmp_path)), *options])
    assert refused.exit_code == 2
    assert "--" in refused.stderr
    assert not (tmp_path / "out").exists()


def with_failures(folder: Path) -> tuple[Path, Path, list[bytes]]:
    """A finished job whose images 1 and 4 had vanished, 2 was empty; they are good by now."""
    images = link_digits(folder / "images", 6)
    names = sorted(path.name for path in images.iterdir())
    good = {name: (images / name).read_bytes() for name in names}
    job = write_tiny_job(folder, input=str(images))
    run_here(job, RunOptions(limit=6))
    (folder / "out" / "predictions.jsonl").unlink()
    for number in (1, 2, 4):
        (images / names[number]).unlink()
    (images / names[2]).write_bytes(b"")
    run_here(job, RunOptions(limit=6))
    for name, data in good.items():
        (images / name).unlink(missing_ok=True)
        (images / name).write_bytes(data)
    predictions = folder / "out" / "predictions.jsonl"
    return job, predictions, predictions.read_bytes().splitlines()


def test_only_errors_with_the_codes_named_are_tried_again(tmp_path: Path) -> None:
    job, predictions, before = with_failures(tmp_path)
    options = RunOptions(limit=6, retry_failed=True, codes=frozenset({"vanished"}))
    summary = run_here(job, options).summary
    assert (summary.num_new, summary.num_errors) == (2, 1)
    after = predictions.read_bytes().splitlines()
    assert [number for number in range(6) if after[number] != before[number]] == [1, 4]
    assert json.loads(after[2])["error"]["code"] == "empty_file"
    assert [json.loads(line)["status"] for line in after].count("ok") == 5


@pytest.mark.parametrize(
    ("attempt", "boot", "num_kept"),
    [
        ({}, boot_id(), 1),
        ({"codes": ["vanished"]}, boot_id(), 0),
        ({"limits": {"max_pixels": 1}}, boot_id(), 0),
        ({}, "before", 0),
    ],
    ids=["the same", "with other codes", "with other limits", "before a restart"],
)
def test_a_stopped_retry_is_gone_on_with_only_by_the_very_same_attempt(
    tmp_path: Path, attempt: dict[str, Any], boot: str, num_kept: int
) -> None:
    job, predictions, before = with_failures(tmp_path)
    run_file = predictions.with_name("run.json")
    run = json.loads(run_file.read_bytes())
    stopped = {**run["segments"][0], "codes": ["empty_file", "vanished"], **attempt}
    durable = {**run["durable"], "boot_id": boot}
    changes = {"status": "interrupted", "retry": stopped, "durable": durable}
    run_file.write_text(json.dumps(run | changes))
    path = json.loads(before[1])["path"]
    kept = {"path": path, "status": "error", "error": {"code": "kept", "message": "of before"}}
    predictions.with_name(".retry.jsonl").write_text(json.dumps(kept) + "\n")
    summary = run_here(job, RunOptions(limit=6, retry_failed=True)).summary
    assert summary.errors_by_code.get("kept", 0) == summary.num_errors == num_kept
    assert summary.num_new == 3 - num_kept


def test_errors_are_not_tried_again_before_the_job_is_finished(tmp_path: Path) -> None:
    job, predictions, before = with_failures(tmp_path)
    predictions.write_bytes(b"".join(line + b"\n" for line in before[:4]))
    said = "4 of 6 images have a record; finish the job first, by running it without"
    with pytest.raises(UsageError, match=said):
        run_here(job, RunOptions(limit=6, retry_failed=True))
    assert predictions.read_bytes().splitlines() == before[:4]


@pytest.mark.parametrize("codes", ["no_such_code,timeout", None])
def test_where_no_error_is_to_be_tried_again_nothing_is_and_that_is_said(
    tmp_path: Path, codes: str | None
) -> None:
    if codes is None:
        job = write_tiny_job(tmp_path)
        run_here(job, RunOptions(limit=6))
        predictions = tmp_path / "out" / "predictions.jsonl"
    else:
        job, predictions, _ = with_failures(tmp_path)
    before = predictions.read_bytes()
    log = Log()
    wanted = None if codes is None else frozenset(codes.split(","))
    assert run_here(job, RunOptions(limit=6, retry_failed=True, codes=wanted), log).was_complete
    (said,) = [line for line in log.lines if "--retry-failed" in line]
    assert "nothing is tried again" in said
    if codes is not None:
        assert "with the code no_such_code or timeout" in said
        assert "(found: 1 empty_file, 2 vanished)" in said
    assert predictions.read_bytes() == before


def test_a_retry_whose_end_was_lost_with_the_power_is_finished_by_the_same_command(
    tmp_path: Path,
) -> None:
    """The new records are in their places, and durable; that it was so is not in run.json."""
    job, predictions, _ = with_failures(tmp_path)
    noted = predictions.stat().st_size
    options = RunOptions(limit=6, retry_failed=True)
    run_here(job, options)
    whole = predictions.read_bytes()
    run_file = tmp_path / "out" / "run.json"
    run = json.loads(run_file.read_bytes())
    assert run["durable"]["num_bytes"] == len(whole) > noted
    durable = {"num_bytes": noted, "num_images": 6, "boot_id": "before"}
    retry = {"retry": run["retries"][-1], "retries": []}
    run_file.write_text(json.dumps(run | retry | {"status": "running", "durable": durable}))
    log = Log()
    result = run_here(job, options, log)
    assert result.summary.num_ok == 6
    assert not any("safe on disk" in line for line in log.lines)
    assert predictions.read_bytes() == whole
    assert status_of(tmp_path / "out") == "complete"


def test_a_job_whose_last_word_was_lost_with_the_power_needs_its_images_no_more(
    tmp_path: Path,
) -> None:
    images = link_digits(tmp_path / "images", 6)
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    run_file = tmp_path / "out" / "run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_bytes()) | {"status": "running"}))
    shutil.rmtree(images)
    assert run_here(job).summary.num_ok == 6
    assert status_of(tmp_path / "out") == "complete"


def test_a_retry_of_records_that_no_part_is_known_of_is_one_more_part(tmp_path: Path) -> None:
    job, _, _ = with_failures(tmp_path)
    run_file = tmp_path / "out" / "run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_bytes()) | {"segments": []}))
    run_here(job, RunOptions(limit=6, retry_failed=True))
    assert run_here(job, RunOptions(limit=6)).was_complete


def contents(out: Path) -> dict[str, bytes]:
    """The files of an output, but for those that say whose it is."""
    names = [path for path in out.glob("*") if not path.name.startswith((".lock", ".lease"))]
    return {path.name: path.read_bytes() for path in names}


class Fenced(Log):
    """Of a run whose output may be another's by now: it is never told that it may write."""

    def before_write(self) -> None:
        raise InterruptedError


@pytest.mark.parametrize("command", ["run", "resume", "overwrite", "extend", "retry"])
def test_nothing_is_written_before_the_output_is_known_to_be_this_runs(
    tmp_path: Path, command: str
) -> None:
    job, predictions, _ = with_failures(tmp_path)
    out = predictions.parent
    if command == "run":
        shutil.rmtree(out)
    elif command == "resume":
        predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:3]))
    elif command == "extend":
        run_here(job, RunOptions(overwrite=True))
    kept = contents(out)
    option = {"retry": "retry_failed"}.get(command, command)
    options = {option: True} if command not in ("run", "resume") else {}
    limit = None if command == "extend" else 6
    with pytest.raises(InterruptedError):
        run_here(job, RunOptions(limit=limit, **options), Fenced())  # type: ignore[arg-type]
    assert contents(out) == kept


# ---- shards --------------------------------------------------------------------------------------


def test_a_shard_starts_anew_on_the_listing_that_it_shares(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    job = write_tiny_job(tmp_path, input=str(images))
    for index in (0, 1):
        run_here(job, RunOptions(shard=Shard(index, 2)))
    predictions = tmp_path / "out" / "predictions-00000-of-00002.jsonl"
    whole = predictions.read_bytes()
    add_images(images, "000000-new.jpg")
    log = Log()
    run_here(job, RunOptions(shard=Shard(0, 2), overwrite=True), log)
    assert [line for line in log.lines if "other shards use the listing, so it stays" in line]
    assert predictions.read_bytes() == whole


def test_a_shard_of_another_input_throws_nothing_away(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    for index in (0, 1):
        run_here(write_tiny_job(tmp_path, input=str(images)), RunOptions(shard=Shard(index, 2)))
    out = tmp_path / "out"
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    other = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "others", 9)))
    with pytest.raises(ResumeRefused, match="input: was"):
        run_here(other, RunOptions(shard=Shard(0, 2), overwrite=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


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
        "sixteen_bit": ({"loader": {"sixteen_bit": "clip"}}, "preprocess"),
        "input": ({"input": str(link_digits(folder / "images", 3))}, "input"),
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
        "sixteen_bit",
        "input",
    ],
)
def test_another_jobs_output_is_refused_and_left_alone(tmp_path: Path, change: str) -> None:
    run_here(write_tiny_job(tmp_path), RunOptions(limit=5))
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    keys, name = changed_jobs(tmp_path)[change]
    with pytest.raises(ResumeRefused, match=rf"\n  {name}[.\w]*: was .*, is ") as refused:
        run_here(write_tiny_job(tmp_path, **keys), RunOptions(limit=5))
    assert refused.value.exit_code == 2
    assert "--overwrite" in str(refused.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("resize", r"(?s)\n  preprocess\.resize: was \d+, is 9\n(?!.*preprocess)"),
        ("model", r"\n  model: was one with digest \w{12}, is one with digest \w{12}\n"),
    ],
)
def test_another_jobs_output_is_told_with_what_differs_alone(
    tmp_path: Path, change: str, told: str
) -> None:
    run_here(write_tiny_job(tmp_path), RunOptions(limit=5))
    keys, _ = changed_jobs(tmp_path)[change]
    with pytest.raises(ResumeRefused, match=told):
        run_here(write_tiny_job(tmp_path, **keys), RunOptions(limit=5))


@pytest.mark.parametrize("recipe", ["PIXELS_RECIPE", "RECORDS_RECIPE"])
def test_a_version_that_makes_other_pixels_or_records_goes_on_with_none_of_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=5))
    monkeypatch.setattr(identity, recipe, 99)
    with pytest.raises(ResumeRefused, match=r"recipe\.\w+: was \d, is 99"):
        run_here(job, RunOptions(limit=5))
    assert run_here(job, RunOptions(limit=5, overwrite=True)).summary.num_ok == 5


def test_each_part_of_the_records_says_which_version_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_tiny_job(tmp_path)
    predictions = tmp_path / "out" / "predictions.jsonl"
    run_here(job)
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:7]))
    monkeypatch.setattr(facts, "__version__", "9.9")
    run_here(job)
    segments = json.loads((tmp_path / "out" / "run.json").read_bytes())["segments"]
    assert [(one["first"], one["batchclf"]) for one in segments] == [(0, __version__), (7, "9.9")]


def test_a_smaller_limit_is_another_job_and_the_refusal_names_the_values(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=5))
    done = batchclf("run", job, "--limit", "4", "--top-k", "2")
    assert done.exit_code == 2
    assert "limit: was 5, is 4" in done.stderr
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


@pytest.mark.parametrize(
    ("data", "why"),
    [(None, r"no run\.json says which job wrote it"), (b"\0" * 100, "it is no JSON")],
)
def test_records_without_a_run_json_are_not_written_over(
    tmp_path: Path, data: bytes | None, why: str
) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job, RunOptions(limit=5))
    run_file = tmp_path / "out" / "run.json"
    if data is None:
        run_file.unlink()
    else:
        run_file.write_bytes(data)
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    with pytest.raises(ResumeRefused, match=why):
        run_here(job, RunOptions(limit=5))
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_drains_and_the_same_command_finishes(batchclf: Batchclf, tmp_path: Path) -> None:
    job = slow_job(tmp_path, 300)
    out = tmp_path / "out"
    with started(job, "--json") as process:
        wait_until(has_records(out), process)
        process.terminate()
        stdout, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM; run the same command to resume" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["exit_code"] == 143
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
        _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in cache.rglob("*") if path.suffix != ".lock"] == ["bundles"]


def test_a_signal_before_the_first_batch_is_not_forgotten(tmp_path: Path) -> None:
    stop = StopRequest()
    log = Log()

    def begin(num_images: int, num_done: int, num_errors: int) -> None:
        stop.signal_number = signal.SIGTERM

    log.begin = begin  # type: ignore[method-assign]
    job = write_tiny_job(tmp_path)
    spec = load_job(job)
    with hold_output(spec), pytest.raises(Interrupted):
        run_job(Run(spec, RunOptions(), log, stop))
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


@pytest.mark.parametrize("change", ["images", "extend", "retry"])
def test_an_int8_job_goes_on_with_the_model_it_began_with_whatever_became_of_its_images(
    batchclf: Batchclf, tmp_path: Path, change: str
) -> None:
    images = link_digits(tmp_path / "images", 40)
    job = write_tiny_job(tmp_path, input=str(images), precision="int8", min_agreement=0)
    predictions = tmp_path / "out" / "predictions.jsonl"
    if change == "retry":
        first, *_ = sorted(images.iterdir())
        good = first.read_bytes()
        first.unlink()
        first.write_bytes(b"")
    assert batchclf("run", job).exit_code == 0
    lines = predictions.read_bytes().splitlines(keepends=True)
    options = {"extend": ("--extend",), "retry": ("--retry-failed",)}.get(change, ())
    if change == "retry":
        first.write_bytes(good)
    elif change == "extend":
        add_images(images, "zz.jpg")
    else:
        predictions.write_bytes(b"".join(lines[:10]))
        for path in sorted(images.iterdir())[20:30]:
            path.unlink()
    done = batchclf("run", job, *options)
    assert done.exit_code == 0, done.stderr
    assert "quantising" not in done.stderr
    after = predictions.read_bytes().splitlines(keepends=True)
    same = {"images": [*range(20), *range(30, 40)], "retry": range(1, 40)}.get(change, range(40))
    assert [number for number in same if after[number] != lines[number]] == []
    assert len(after) == (41 if change == "extend" else 40)


def test_records_of_a_model_that_would_be_calibrated_anew_are_not_added_to(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    """Where the model is no longer in the cache, and images it was calibrated on have changed."""
    images = link_digits(tmp_path / "images", 40)
    job = write_tiny_job(tmp_path, input=str(images), precision="int8", min_agreement=0)
    cache = {"BATCHCLF_CACHE_DIR": str(tmp_path / "cache")}
    assert batchclf("run", job, env=cache).exit_code == 0
    predictions = tmp_path / "out" / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    predictions.write_bytes(b"".join(lines[:10]))
    shutil.rmtree(tmp_path / "cache")
    assert batchclf("run", job, env=cache).exit_code == 0, "made again, and the same"
    assert predictions.read_bytes() == b"".join(lines)
    predictions.write_bytes(b"".join(lines[:10]))
    shutil.rmtree(tmp_path / "cache")
    for path in sorted(images.iterdir())[20:]:
        path.unlink()
    done = batchclf("run", job, env=cache)
    assert done.exit_code == 2, done.stderr
    assert "ONNX Runtime or images of its calibration changed" in done.stderr
    assert predictions.read_bytes() == b"".join(lines[:10])


# ---- killed at every step ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["overwrite", "extend", "retry"])
def test_a_kill_at_any_call_on_the_output_is_mended_by_the_same_command(
    tmp_path: Path, command: str
) -> None:
    images = link_digits(tmp_path / "images", 12)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=12)
    names = sorted(images.iterdir())
    if command == "retry":
        for path in names[3:6]:
            path.rename(tmp_path / path.name)
            path.write_bytes(b"")
    run_here(job)
    if command == "extend":
        add_images(images, "000000-new.jpg", "zz.jpg")
    elif command == "retry":
        for path in names[3:6]:
            (tmp_path / path.name).replace(path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.killed", job, tmp_path / "out", command],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["killed"] for one in told] == [False, *[True] * (len(told) - 2), False]
    assert len(told) > 12, "calls"
    assert not [one for one in told if not one["same"] or one["status"] != "complete"]
    records = read_records(tmp_path / "out")
    assert len(records) == {"overwrite": 12, "extend": 14, "retry": 12}[command]
    assert all(record["status"] == "ok" for record in records)


def job_with_parts(folder: Path) -> tuple[Path, bytes]:
    """A job with 10 records in their file and others in parts; and all as they are to be."""
    images = link_digits(folder / "images", 60)
    job = write_tiny_job(folder, input=str(images), batch_size=4)
    run_here(job)
    out = folder / "out"
    whole = (out / "predictions.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "parts").mkdir()
    for first, stop in ((10, 20), (20, 24), (30, 40)):
        (out / "parts" / f"{first:08d}.jsonl").write_bytes(b"".join(lines[first:stop]))
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:10]))
    record = json.loads((out / "run.json").read_text())
    durable = {**record["durable"], "num_images": 10, "num_bytes": len(b"".join(lines[:10]))}
    changed = {**record, "status": "interrupted", "durable": durable}
    (out / "run.json").write_text(json.dumps(changed))
    return job, whole


def test_a_job_goes_on_from_the_parts_that_several_workers_have_committed(tmp_path: Path) -> None:
    job, whole = job_with_parts(tmp_path)
    log = Log()
    result = run_here(job, log=log)
    assert "resuming after 24 of 60 images" in log.lines
    assert (result.summary.num_images, result.summary.num_new) == (60, 36)
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == whole
    assert not (tmp_path / "out" / "parts").exists()


def test_parts_are_appended_only_once_the_job_is_known_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = job_with_parts(tmp_path)
    predictions = tmp_path / "out" / "predictions.jsonl"
    before = predictions.read_bytes()
    with pytest.raises(UsageError, match="--retry-failed: 10 of 60 images have a record; finish"):
        run_here(job, RunOptions(retry_failed=True))

    def refuse(*args: object) -> None:
        raise ProviderError("it does not run here")

    monkeypatch.setattr("batchclf.run.job.make_ready", refuse)
    with pytest.raises(ProviderError):
        run_here(job)
    assert predictions.read_bytes() == before
    assert len(os.listdir(tmp_path / "out" / "parts")) == 3


def test_parts_that_no_run_json_tells_of_are_not_taken_for_this_jobs(tmp_path: Path) -> None:
    job, whole = job_with_parts(tmp_path)
    out = tmp_path / "out"
    for name in ("run.json", "predictions.jsonl"):
        (out / name).unlink()
    with pytest.raises(ResumeRefused, match=r"parts is there, but no run\.json says which job"):
        run_here(job)
    assert len(os.listdir(out / "parts")) == 3
    run_here(job, RunOptions(overwrite=True))
    assert (out / "predictions.jsonl").read_bytes() == whole
