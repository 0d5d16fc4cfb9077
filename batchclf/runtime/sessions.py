"""ONNX Runtime sessions that run where they were asked to, proven, or not at all.

A session is accepted when its provider is first in its own list and holds every node of the graph
but those that compute shapes. What ONNX Runtime says about the cause when a provider does not
open goes to the process's stderr alone, so it is read there.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from batchclf.errors import ModelError, ProviderError, UsageError
from batchclf.results.records import ActiveProvider, Precision
from batchclf.runtime import openvino
from batchclf.runtime.providers import Provider

BATCH_DIMENSION = "batch"
"""Name of the dynamic dimension of a bundle's model."""
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        found
        for found in vars(ort_errors).values()
        if isinstance(found, type) and issubclass(found, Exception)
    ),
)
"""ONNX Runtime's own errors share no base class but Exception."""
ERRORS_ONLY = 3
NOTHING = 4
"""Severity for sessions whose errors are raised, and told of in our own words."""
_SHAPE_OPERATORS = frozenset(
    ("Shape", "Size", "Range", "Gather", "Slice", "Squeeze", "Unsqueeze", "Constant")
)
"""Operators that compute shapes, which every accelerator leaves to the CPU. With the one batch size
that accelerators are given, what is computed with shapes is folded before."""
_IR_TOO_NEW = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_OPSET_TOO_NEW = re.compile(
    r"Opset (\d+) is under development.*support for domain (\S+) is till opset (\d+)", re.DOTALL
)
_PLACE_IN_CODE = re.compile(
    r"/\S+\.(?:h|hpp|cc|cpp):\d+ [^()]*\((?:[^()]|\([^()]*\))*\)(?: const)? "
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_UNKNOWN_OPTION = re.compile(
    r"(Invalid OpenVINO EP option: \w+|Unknown provider option: \S+|"
    r"Unsupported property \w+|Failed to (?:map|parse)[^\n]*option[^\n]*)"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where, and how, a session is to run."""

    provider: Provider
    precision: Precision = "fp32"
    device_type: str = openvino.DEFAULT_DEVICE
    """openvino only."""
    device_id: int = 0
    """cuda only: the number of the GPU."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The user's own options of the provider."""
    streams: int = 1
    """Calls that will be in flight at once."""
    threads: int = 1
    """CPU threads of one call."""
    may_leave_nodes: bool = False
    """Whether the user allowed nodes of the model on the CPU."""


def open_session(
    model: Path,
    target: Target,
    *,
    batch_size: int | None = None,
    compile_cache: Path | None = None,
) -> tuple[ort.InferenceSession, ActiveProvider]:
    """Open a model on a target, and prove that it runs there.

    Args:
        model: an ONNX file whose batch dimension is named `batch`.
        batch_size: the one batch size that accelerators are given; None leaves it open.
        compile_cache: folder for models that a provider compiles.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
        ProviderError: it does not run on the target, with the cause.
        UsageError: an option that the provider does not know.
    """
    provider = target.provider
    options = _provider_options(target, compile_cache)
    settings = _session_options(target, batch_size)
    failure: Exception | None = None
    with _captured_stderr() as said:
        try:
            session = ort.InferenceSession(
                str(model),
                settings,
                providers=[(provider.execution_provider, options)],
                # Without it the Python wrapper retries on the CPU by itself.
                enable_fallback=0,
            )
        except ORT_ERRORS as error:
            failure = error
    if failure is not None and "is not available" not in said():
        raise _explained(model, target, str(failure)) from failure
    if failure is not None:
        raise ProviderError(
            f"provider {provider.name}: no session opens: {_cause(said(), target)}"
        ) from failure
    active = session.get_providers()[0]
    if active != provider.execution_provider:
        raise ProviderError(
            f"provider {provider.name}: asked for {provider.execution_provider}, but ONNX Runtime "
            f"opened the session on {active}: {_cause(said(), target)}"
        )
    nodes, left = _placement(session, provider)
    computing = _require_nodes(nodes, left, target)
    return session, ActiveProvider(
        requested=provider.name,
        active=active,
        device=_device(target),
        nodes=nodes,
        cpu_nodes=left,
        options=options,
        fallback=_some_on_cpu(computing, nodes) if computing else None,
    )


def _session_options(target: Target, batch_size: int | None) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    # Set explicitly: ONNX Runtime's own default ignores cpusets and cgroup quotas.
    settings.intra_op_num_threads = target.threads if target.provider.name == "cpu" else 1
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = ERRORS_ONLY
    # Decoding shares the cores; a thread that spins between batches takes them from it.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if target.provider.name == "cpu":
        avoid_crash(settings)
    if target.provider.name != "cpu" and batch_size is not None:
        # Accelerators compile or plan for a shape: the one that every batch is padded to.
        settings.add_free_dimension_override_by_name(BATCH_DIMENSION, batch_size)
    if target.provider.name == "openvino":
        # OpenVINO optimises the graph itself, and knows its own patterns only.
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if any(name.startswith("NPU") for name in openvino.device_names(target.device_type)):
            # A model that an NPU cannot compile would go to OpenVINO's CPU with a warning.
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return settings


def avoid_crash(settings: ort.SessionOptions) -> None:
    """Leave an optimisation out that ends the process on provider cpu, and gains nothing there.

    A float16 MatMul by a weight, after a Transpose that moves the batch (attention as PyTorch
    exports it), becomes a FusedMatMul, and the passes that come after it crash on that (seen in
    ONNX Runtime 1.24 to 1.32).
    """
    settings.add_session_config_entry(
        "optimization.disable_specified_optimizers", "MatmulTransposeFusion"
    )


def _provider_options(target: Target, compile_cache: Path | None) -> dict[str, str]:
    if target.provider.name == "openvino":
        return openvino.provider_options(
            target.device_type,
            target.precision,
            target.options,
            streams=target.streams,
            threads=target.streams * target.threads,
            cache=compile_cache,
        )
    if target.provider.name == "cuda":
        from batchclf.runtime import cuda

        return cuda.provider_options(target.device_id, target.precision, target.options)
    if target.options:
        raise UsageError(
            f"provider.options: found {', '.join(target.options)}; provider cpu has none "
            "(runtime.threads and runtime.streams say how it uses the machine)"
        )
    return {}


def _device(target: Target) -> str:
    if target.provider.name == "cuda":
        from batchclf.runtime.cuda_machine import device_name

        return device_name(target.device_id)
    return target.device_type if target.provider.name == "openvino" else "CPU"


# ---- proof ---------------------------------------------------------------------------------------


def _placement(
    session: ort.InferenceSession, provider: Provider
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Nodes per execution provider, and those that are not on the one asked for."""
    counts: Counter[str] = Counter()
    left: list[str] = []
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = subgraph.get_nodes()
        counts[subgraph.ep_name] += len(nodes)
        if subgraph.ep_name != provider.execution_provider:
            left += [f"{node.op_type} {node.name}".strip() for node in nodes]
    return dict(counts), tuple(left)


def _require_nodes(nodes: Mapping[str, int], left: tuple[str, ...], target: Target) -> list[str]:
    """The computing nodes that were left to the CPU, where the user allows any.

    Raises:
        ProviderError: there are some, and none is allowed; or the provider took no node at all.
    """
    provider = target.provider
    if not nodes.get(provider.execution_provider):
        raise ProviderError(
            f"provider {provider.name}: it took none of the {sum(nodes.values())} nodes of the "
            "model, so all would run on the CPU"
        )
    computing = [name for name in left if name.partition(" ")[0] not in _SHAPE_OPERATORS]
    if computing and not target.may_leave_nodes:
        raise ProviderError(
            f"provider {provider.name}: {_some_on_cpu(computing, nodes)}, since the provider has "
            "no kernel for them; change the model, take another provider, or allow it with "
            "provider.allow_fallback: true"
        )
    return computing


def _some_on_cpu(computing: Sequence[str], nodes: Mapping[str, int]) -> str:
    some = ", ".join(computing[:3]) + (", ..." if len(computing) > 3 else "")
    return f"{len(computing)} of {sum(nodes.values())} nodes of the model run on the CPU ({some})"


def _explained(
    model: Path, target: Target, message: str
) -> ModelError | ProviderError | UsageError:
    """The error to raise for an exception of ONNX Runtime's."""
    name = target.provider.name
    # GPU numbers are checked while options are read, so a CUDA that fails looks like an option.
    if "CUDA failure" not in message and (unknown := _UNKNOWN_OPTION.search(message)):
        return UsageError(
            f"provider.options: {unknown[1]} (provider {name} of onnxruntime {ort.__version__}); "
            "options are passed to the provider as they are: see its documentation"
        )
    if name == "cpu":
        return not_accepted(model, message)
    return ProviderError(f"provider {name}: no session opens: {last_sentence(message)}")


def not_accepted(model: Path, message: str) -> ModelError:
    """The error to raise for a model that ONNX Runtime does not open; `message` is what it said."""
    runtime = f"ONNX Runtime {ort.__version__}"
    if (found := _IR_TOO_NEW.search(message)) is not None:
        return ModelError(
            f"{model}: is of ONNX IR version {found[1]}, and {runtime} reads up to {found[2]}; "
            f"export it again with an older onnx, or take a newer ONNX Runtime; where the model "
            f"uses nothing that is newer, this will do: model = onnx.load(FILE); "
            f"model.ir_version = {found[2]}; onnx.save(model, OTHER_FILE)"
        )
    if (found := _OPSET_TOO_NEW.search(message)) is not None:
        return ModelError(
            f"{model}: is of opset {found[1]} of {found[2]}, and {runtime} reads up to {found[3]}; "
            f"export it again (torch.onnx.export(..., opset_version={min(18, int(found[3]))})), or "
            f"take a newer ONNX Runtime, or convert it: onnx.save(onnx.version_converter."
            f"convert_version(onnx.load(FILE), {found[3]}), OTHER_FILE)"
        )
    return ModelError(
        f"{model}: ONNX Runtime does not accept it: {last_sentence(message)}; "
        "export it again, with standard operators"
    )


def _cause(said: str, target: Target) -> str:
    """What ONNX Runtime's log says about a provider that did not open, and what mends it."""
    if absent := re.search(r"Device (\S+) is not available", said):
        return (
            f"device {absent[1]} is not available to OpenVINO here{_remedy(absent[1])}; or use "
            "device_type CPU"
        )
    errors = re.findall(r"\[E:onnxruntime:[^\]]*\] (.*)", said)
    if not errors:
        return f"it gave no reason; `batchclf doctor` tells what {target.provider.name} needs"
    return last_sentence(errors[0])


def _remedy(device: str) -> str:
    if device.startswith("GPU"):
        return (
            ": an Intel GPU needs /dev/dri and Intel's compute runtime (Debian, Ubuntu: apt "
            "install intel-opencl-icd), in a container `docker run --device /dev/dri "
            "--group-add $(stat -c %g /dev/dri/renderD128)`"
        )
    if device.startswith("NPU"):
        return ": an Intel NPU needs /dev/accel and the intel-npu driver"
    return ""


def last_sentence(message: str) -> str:
    """An ONNX Runtime message without the C++ files and functions before what it says."""
    message = _PLACE_IN_CODE.sub("", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = lines[-1] if lines else "no reason given"
    return re.sub(r"^.*(?:\[ERROR\]|\[ONNXRuntimeError\][^:]*: \d+ : \w+ :) *", "", text)


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Collects what native code writes to file descriptor 2; read it with the function given.

    ONNX Runtime's default logger has no other outlet in Python.
    """
    text = ""
    if sys.stderr is None:  # closed by whoever started the process
        yield lambda: text
        return
    sys.stderr.flush()
    # Memory, not a temporary file: there may be no folder that can be written.
    with open(os.memfd_create("stderr"), "w+b") as collected:
        kept = os.dup(2)
        os.dup2(collected.fileno(), 2)
        try:
            yield lambda: text
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            collected.seek(0)
            text = _COLOURS.sub("", collected.read().decode(errors="replace"))
