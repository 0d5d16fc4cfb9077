"""What only shows when the parts of a run are put together: checks that are made, lines that come.

Periods of seconds are shortened, by their names, wherever they lie.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchclf.errors import ModelError, ResumeRefused
from batchclf.results.records import Shard
from batchclf.spec.options import RunOptions
from tests.conftest import read_records
from tests.engines.common import fault, finished, run_json, started, write_job
from tests.tiny import (
    DIGITS,
    Log,
    assert_same_records,
    link_digits,
    run_here,
    tiny_model,
    write_classifier,
    write_tiny_job,
)


def set_everywhere(patch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Change a constant in each module of the package that knows it."""
    modules = [one for key, one in sys.modules.items() if key.startswith("batchclf.")]
    holders = [one for one in modules if hasattr(one, name)]
    assert holders, f"no module has {name}"
    for module in holders:
        patch.setattr(module, name, value)


def stats_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "stats.jsonl").read_bytes().splitlines()]


# ---- checks that are made ------------------------------------------------------------------------


def write_odd_classifier(path: Path, odd: int) -> None:
    """The tiny classifier, with other answers for batches of `odd` images."""
    model = onnx.load(write_classifier(path))
    model.graph.node[-1].output[0] = "even_logits"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(one, name)
            for name, one in {
                "first": np.array(0, "int64"),
                "odd": np.array(odd, "int64"),
                "one": np.array(1, "float32"),
            }.items()
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Gather", ["shape", "first"], ["size"]),
            helper.make_node("Equal", ["size", "odd"], ["is_odd"]),
            helper.make_node("Cast", ["is_odd"], ["extra"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["extra", "one"], ["factor"]),
            helper.make_node("Mul", ["even_logits", "factor"], ["logits"]),
        ]
    )
    onnx.save(model, path)


def test_a_model_of_other_answers_at_the_jobs_batch_size_is_refused(tmp_path: Path) -> None:
    """Also where the model was prepared for a job of another batch size."""
    write_odd_classifier(tmp_path / "odd.onnx", 7)
    model = {**tiny_model(tmp_path), "onnx": str(tmp_path / "odd.onnx")}
    images = str(link_digits(tmp_path / "images", 8))
    run_here(write_tiny_job(tmp_path, input=images, model=model, batch_size=4))
    other: dict[str, Any] = {"output": str(tmp_path / "other"), "input": images, "model": model}
    with pytest.raises(ModelError, match="batch of 7"):
        run_here(write_tiny_job(tmp_path, **other, batch_size=8, runtime={"part": 7}))
    assert not (tmp_path / "other" / "predictions.jsonl").exists()
    run_here(write_tiny_job(tmp_path, **other, batch_size=5))
    assert_same_records(read_records(tmp_path / "other"), read_records(tmp_path / "out"))


@pytest.mark.parametrize("change", ["limit", "allow_outside_links"])
def test_a_shard_of_another_listing_is_refused(tmp_path: Path, change: str) -> None:
    run_here(write_tiny_job(tmp_path), RunOptions(shard=Shard(0, 2), limit=8))
    limit = 6 if change == "limit" else 8
    loader = {"allow_outside_links": change == "allow_outside_links"}
    with pytest.raises(ResumeRefused, match=change):
        run_here(
            write_tiny_job(tmp_path, loader=loader), RunOptions(shard=Shard(1, 2), limit=limit)
        )
    assert not (tmp_path / "out" / "predictions-00001-of-00002.jsonl").exists()


def test_an_int8_model_is_of_the_images_that_it_was_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of the same model and other images share a cache, and no calibration."""
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for digit in "01":  # of its own: a link to a shared one that another test makes changes it
        shutil.copytree(DIGITS / digit, tmp_path / digit)
    for number, digit in enumerate("010"):
        output, log = tmp_path / f"out-{number}", Log()
        job = write_tiny_job(
            tmp_path,
            input=str(tmp_path / digit),
            output=str(output),
            precision="int8",
            min_agreement=0,
        )
        run_here(job, log=log)
        is_made = any("quantising" in line for line in log.lines)
        found.append((run_json(output)["converted_model"]["calibration"], is_made))
    (first, _), (second, _), (again, _) = found
    assert first == again != second
    assert [is_made for _, is_made in found] == [True, True, False]


# ---- lines that come -----------------------------------------------------------------------------


def test_a_run_longer_than_the_interval_writes_lines_of_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = link_digits(tmp_path / "images", 80)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=2)
    set_everywhere(monkeypatch, "INTERVAL_S", 0.001)
    run_here(job)
    *intervals, summary = stats_lines(tmp_path / "out")
    assert [one["type"] for one in intervals] == ["interval"] * len(intervals)
    assert len(intervals) >= 3
    counts = [one["num_images"] for one in intervals]
    assert counts == sorted(counts)
    assert 0 <= counts[0] < counts[-1] <= 80
    assert summary["type"] == "summary"
    assert set(intervals[0]) <= set(summary)
    assert {"images_per_s", "stage_s", "bottleneck"} <= set(intervals[0])


def test_a_run_longer_than_a_few_seconds_tells_its_progress_where_there_is_no_terminal(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 120, slow=True)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"\xff\xd8")
    program = "def change(module):\n    assert module.PLAIN_INTERVAL_S == 30\n"
    program += "    module.PLAIN_INTERVAL_S = 0.001\n"
    exit_code, said = finished(job, env=fault(tmp_path, program, "batchclf.cli.progress"))
    assert exit_code == 0, said
    pattern = (
        r"^batchclf: (\d+)/121 images, (\d) errors, [\d.]+ images/s, [\d.]+ now, "
        r"(\d+:\d\d:\d\d) left(?:, limited by \w+)?$"
    )
    lines = re.findall(pattern, said, re.MULTILINE)
    assert lines, said
    counts = [int(count) for count, _, _ in lines]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert {errors for _, errors, _ in lines} <= {"0", "1"}


# ---- whom the kernel ends first ------------------------------------------------------------------


def test_where_memory_runs_out_decoding_goes_before_the_worker_and_that_before_its_parent(
    tmp_path: Path,
) -> None:
    job = write_job(tmp_path, 200, slow=True, loader={"workers": 2, "backend": "processes"})
    with started(job) as run:
        worker = run.wait_for_worker()
        run.wait_until(lambda: len(worker.children()) == 2)
        decoding = [one.pid for one in worker.children()]
        run.wait_until(lambda: {likelihood(pid) for pid in decoding} == {1000})
        assert likelihood(worker.pid) >= max(500, likelihood(run.process.pid))
        assert run.end() == 0, run.stderr


def likelihood(pid: int) -> int:
    """How likely the kernel's OOM killer is to take a process, from -1000 to 1000."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
