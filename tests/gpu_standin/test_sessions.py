"""Sessions on the stand-in: engines, copies, and whom they hold up."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.gpu_standin.machine import Machine
from tests.tiny import write_classifier

PROBE = ROOT / "batchclf" / "runtime" / "probe.onnx"
COPY_MS = 100


def tried(machine: Machine, name: str, *arguments: object, **knobs: object) -> Any:
    done = machine.python_with(
        "-m", "tests.gpu_standin.tries", name, *map(str, arguments), knobs=knobs
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("precision", "options", "engine"),
    [
        ("fp32", {}, "p"),
        ("fp16", {}, "t"),
        ("fp32", {"use_tf32": "1"}, "t"),
        ("fp16", {"use_tf32": "0"}, "p"),
    ],
)
def test_fp16_convolves_on_the_tensor_cores_and_fp32_only_when_told_to(
    machine: Machine, precision: str, options: dict[str, str], engine: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    tried(machine, "engines", PROBE, precision, json.dumps(options), trace=trace)
    assert {line for line in trace.read_text().splitlines() if "engine" in line} == {
        f"engine {engine}"
    }


def test_other_threads_run_while_pixels_and_scores_are_copied(
    machine: Machine, tmp_path: Path
) -> None:
    model = write_classifier(tmp_path / "large.onnx", edge=224)
    gap_s, took_s = tried(machine, "longest_gap", model, copy_ms=COPY_MS)
    assert took_s > COPY_MS / 1000
    assert gap_s < COPY_MS / 10 / 1000


def test_a_cuda_graph_reads_and_writes_where_it_was_captured(
    machine: Machine, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    tried(machine, "engines", PROBE, "fp32", '{"enable_cuda_graph": "1"}', trace=trace)
    lines = trace.read_text().splitlines()
    assert lines.index("captured gpu0") < lines.index("replay gpu0")
