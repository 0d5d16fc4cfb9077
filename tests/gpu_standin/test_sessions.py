"""Sessions on the stand-in: engines, copies, and whom they hold up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BY_HAND, ROOT
from tests.gpu_standin.machine import Machine
from tests.gpu_standin.models import write_convolving

PROBE = ROOT / "batchclf" / "runtime" / "probe.onnx"
COPY_MS = 300


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


def test_other_threads_run_while_pixels_are_copied(machine: Machine, tmp_path: Path) -> None:
    model = write_convolving(tmp_path / "large.onnx", 224)
    gap_s, took_s = tried(machine, "longest_gap", model, copy_ms=COPY_MS)
    assert took_s > COPY_MS / 1000
    assert gap_s < took_s / 2, "a copy that held the interpreter would be one gap"


def test_memory_that_is_refused_to_be_page_locked_leaves_no_error_behind(machine: Machine) -> None:
    (said,) = tried(machine, "refused_pages", PROBE, fault="register:801:1")
    assert "1 MB that decoding processes share cannot be page-locked (error 801" in said
    assert "operation not supported" in said


@pytest.mark.parametrize(
    ("kind", "place"), [("pageable", "pageable"), ("pinned", "pinned"), ("registered", "pinned")]
)
def test_a_visit_measures_the_copies_that_a_job_makes(
    machine: Machine, kind: str, place: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    (row,) = tried(machine, "copied", kind, trace=trace)
    assert row["num_bytes"] == 2 * 224 * 224 * 3
    assert row["to_device"] > 0
    assert row["from_device"] > 0
    copies = {line for line in trace.read_text().splitlines() if line.startswith("copy")}
    size = row["num_bytes"]
    assert copies == {
        f"copy async {size} {place}>gpu0 gpu0",
        f"copy async {size} gpu0>{place} gpu0",
    }


def test_a_cuda_graph_is_captured_once_and_replayed_for_every_batch(
    machine: Machine, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    options = '{"enable_cuda_graph": "1"}'
    tried(machine, "engines", PROBE, "fp32", options, "4", trace=trace)
    lines = trace.read_text().splitlines()
    assert lines.count("captured gpu0") == 1
    assert lines.count("replay gpu0") == 4
    later = lines[lines.index("replay gpu0") :]
    assert not [line for line in later if line.startswith(("launch", "malloc"))]


@pytest.mark.parametrize(
    ("fault", "kind", "seen"),
    [
        ("malloc:2:4", "memory", "Failed to allocate memory for requested buffer"),
        ("malloc:700:4", "device", "Failed to allocate memory"),
        ("launch:2:1", "memory", "cudaErrorMemoryAllocation:out of memory"),
        ("launch:700:1", "device", "cudaErrorIllegalAddress:"),
        ("launch:719:1", "device", "cudaErrorLaunchFailure:"),
        ("sync:46:4", "device", "CUDA failure 46: CUDA-capable device"),
        ("sync:700:4", "device", "CUDA failure 700: an illegal memory access"),
        ("sync:214:1", "device", "CUDA failure 214: uncorrectable ECC error"),
        ("copy:719:2", "device", "CUDA failure 719: unspecified launch failure"),
        ("execute:2:1", "memory", "CUDNN_BACKEND_API_FAILED"),
        ("execute:700:1", "device", "CUDNN_BACKEND_API_FAILED"),
    ],
)
def test_the_wheels_own_errors_are_told_as_what_they_are(
    machine: Machine, fault: str, kind: str, seen: str
) -> None:
    found, message = tried(machine, "fault", PROBE, "{}", fault=fault)
    assert seen in message
    assert found == kind, message


def test_a_session_that_may_take_no_more_memory_says_so_in_other_words(
    machine: Machine, tmp_path: Path
) -> None:
    model = write_convolving(tmp_path / "large.onnx", 224)
    kind, message = tried(machine, "fault", model, '{"gpu_mem_limit": "1000000"}')
    assert re.search(r"Available memory of \d+ is smaller than requested bytes of \d+", message)
    assert kind == "memory"


@pytest.mark.parametrize(
    ("has_bias", "options", "num_additions"),
    [(True, {}, 1), (True, {"fuse_conv_bias": "1"}, 0), (False, {}, 0)],
)
def test_a_bias_costs_an_addition_unless_there_is_none_or_it_is_fused(
    machine: Machine, has_bias: bool, options: dict[str, str], num_additions: int, tmp_path: Path
) -> None:
    model = write_convolving(tmp_path / "model.onnx", 8, has_bias=has_bias)
    trace = tmp_path / "trace"
    tried(machine, "engines", model, "fp32", json.dumps(options), trace=trace)
    assert trace.read_text().splitlines().count("bias") == num_additions


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=BY_HAND)])
def test_no_node_of_any_torchvision_family_is_left_on_the_cpu(
    machine: Machine, precision: str, tmp_path: Path
) -> None:
    left = tried(machine, "placement", precision, tmp_path)
    assert len(left) > 20
    assert {name: nodes for name, nodes in left.items() if nodes} == {}


def test_every_convolution_of_a_resnet_at_fp16_runs_on_the_tensor_cores(
    machine: Machine, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    tried(machine, "one_batch", "resnet50", "fp16", tmp_path, trace=trace)
    engines = [line for line in trace.read_text().splitlines() if line.startswith("engine")]
    assert engines == ["engine t"] * 53
