"""Every strict refusal, for real: the command in a process, the installed ONNX Runtime, no mocks.

Each test needs one of ONNX Runtime's flavours and skips in an environment of another; `nox` runs
them in an environment of each. The one thing that stands in for something else is the NVIDIA
driver: a small library in C that answers as a driver in that state would (tests/gpu_standin).
"""

import ctypes
import ctypes.util
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchclf.runtime.providers import installed_flavours
from batchclf.system.machine import cpu_name_and_flags
from tests.conftest import ROOT, Batchclf, command, write_job
from tests.gpu_standin.machine import CUDA_PACKAGES, environment_without, made_driver
from tests.tiny import write_tiny_job

WITHIN_CPU_S = 10.0
"""Of the refused command and what it starts: by the clock, others at work would count as well."""
HANGS_S = 100.0
FLAVOURS = installed_flavours()
CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"


def needs(flavour: str, session: str) -> pytest.MarkDecorator:
    """Skip in an environment of another flavour, naming the nox session that has this one."""
    found = ", ".join(FLAVOURS)
    return pytest.mark.skipif(
        flavour not in FLAVOURS, reason=f"needs {flavour}, found {found}: nox -s {session}"
    )


cpu_environment = needs("onnxruntime", "cpu")
gpu_environment = needs("onnxruntime-gpu", "gpu")
openvino_environment = needs("onnxruntime-openvino", "openvino")


def children_cpu_s() -> float:
    """CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def refused(
    folder: Path,
    provider: str | Mapping[str, Any],
    *,
    python: str | Path = sys.executable,
    env: Mapping[str, str] | None = None,
    exit_code: int = 4,
    **keys: Any,
) -> str:
    """The message of a job that has to be refused, within the time and before any work."""
    job = write_job(folder, provider=provider, **keys)
    surroundings = {key: value for key, value in os.environ.items() if key != CUDA_VISIBLE}
    cache = folder / "cache"
    before_s = children_cpu_s()
    done = subprocess.run(
        [os.fspath(python), *command("run", job, "--json")[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**surroundings, "BATCHCLF_CACHE_DIR": str(cache), **(env or {})},
        timeout=HANGS_S,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    assert children_cpu_s() - before_s < WITHIN_CPU_S
    (line,) = done.stdout.splitlines()
    answer: dict[str, Any] = json.loads(line)
    message: str = answer.pop("error")
    assert answer == {"status": "failed", "exit_code": exit_code}
    assert done.stderr == f"batchclf: {message}\n"
    assert not (folder / "out").exists()
    assert not cache.exists()
    return message


# ---- the flavour ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "provider", "missing", "extra"),
    [
        pytest.param("onnxruntime", "cuda", "CUDA", "gpu", marks=cpu_environment),
        pytest.param("onnxruntime", "openvino", "OpenVINO", "openvino", marks=cpu_environment),
        pytest.param("onnxruntime-gpu", "openvino", "OpenVINO", "openvino", marks=gpu_environment),
        pytest.param("onnxruntime-openvino", "cuda", "CUDA", "gpu", marks=openvino_environment),
    ],
)
def test_a_provider_of_another_flavour_is_refused_with_what_installs_it(
    flavour: str, provider: str, missing: str, extra: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, provider)
    assert f"the installed {flavour} {FLAVOURS[flavour]} has no {missing}Execution" in message
    assert "CPUExecutionProvider" in message
    assert f"in an environment of its own: pip install 'batchclf[{extra}]" in message


@pytest.mark.parametrize("provider", ["cpu", {"name": "cuda", "allow_fallback": True}])
def test_two_flavours_side_by_side_are_refused_with_the_command_that_mends_it(
    provider: str | Mapping[str, Any], second_flavour: Path, tmp_path: Path
) -> None:
    message = refused(tmp_path, provider, env={"PYTHONPATH": str(second_flavour)})
    (first,) = FLAVOURS
    second = "onnxruntime-openvino" if first == "onnxruntime" else "onnxruntime"
    both = sorted((first, second))
    assert all(f"pip uninstall -y {name}" in message for name in both)
    assert f"{second} {version_in(second_flavour, second)} in {second_flavour}" in message
    metadata = second_flavour / second.replace("-", "_")
    assert f"mv {second_flavour}/onnxruntime {metadata}-" in message


def version_in(folder: Path, name: str) -> str:
    (found,) = importlib.metadata.distributions(name=name, path=[str(folder)])
    return found.version


@pytest.fixture(scope="session")
def second_flavour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another flavour in it, for PYTHONPATH; skips where none can be installed."""
    flavour = "onnxruntime-openvino" if "onnxruntime" in FLAVOURS else "onnxruntime"
    folder = tmp_path_factory.mktemp("second") / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*pip, str(folder), flavour], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"{flavour} cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder


@pytest.mark.parametrize("provider", ["cpu", "cuda", "openvino"])
def test_an_environment_without_onnxruntime_is_refused_with_what_to_install(
    provider: str, tmp_path: Path
) -> None:
    python = environment_without(tmp_path / "venv", "onnxruntime")
    message = refused(tmp_path, provider, python=python)
    assert "ONNX Runtime is not installed" in message
    assert "pip install 'batchclf[cpu]' (or [gpu], or [openvino])" in message


# ---- cuda ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cuda() -> int:
    """The major version of CUDA that the installed ONNX Runtime was built for."""
    from onnxruntime.capi import build_and_package_info

    return int(str(build_and_package_info.cuda_version).partition(".")[0])


@pytest.fixture(scope="session")
def driver(cuda: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a driver is found: for this ONNX Runtime's CUDA, and with a GPU."""
    driver = made_driver(tmp_path_factory.mktemp("machine") / "driver")
    return {**driver, "STANDIN_DRIVER": str(cuda * 1000), "STANDIN_GPUS": "1"}


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


without_driver = pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here")


@gpu_environment
@without_driver
def test_cuda_without_a_driver_is_refused_naming_the_driver_and_the_container_toolkit(
    tmp_path: Path,
) -> None:
    message = refused(tmp_path, "cuda")
    assert message.startswith("provider cuda: no NVIDIA driver here (libcuda.so.1: cannot open")
    assert "Install the driver" in message
    assert "NVIDIA container toolkit" in message
    assert "docker run --gpus all" in message


@gpu_environment
@pytest.mark.parametrize(
    ("state", "cause", "remedies"),
    [
        (
            {"STANDIN_DRIVER": "12040"},
            "driver is for CUDA 12.4, and onnxruntime-gpu {version} needs CUDA {cuda}:",
            ("update the driver", "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"),
        ),
        (
            {"STANDIN_INIT": "100"},
            "driver (CUDA {cuda}.0) finds no GPU:",
            ("`nvidia-smi`", "`docker run --gpus all`"),
        ),
        (
            {"STANDIN_INIT": "100", CUDA_VISIBLE: "7"},
            f"driver (CUDA {{cuda}}.0) finds no GPU ({CUDA_VISIBLE} is '7'):",
            (f"unset {CUDA_VISIBLE}", "`nvidia-smi`"),
        ),
        (
            {"STANDIN_INIT": "803"},
            "driver (CUDA {cuda}.0) does not start (error 803 of cuInit):",
            ("`nvidia-smi`",),
        ),
    ],
    ids=["another CUDA", "no GPU", "no visible GPU", "error 803"],
)
def test_cuda_with_a_driver_that_cannot_serve_is_refused_with_its_cause_and_remedy(
    state: dict[str, str],
    cause: str,
    remedies: tuple[str, ...],
    cuda: int,
    driver: dict[str, str],
    tmp_path: Path,
) -> None:
    message = refused(tmp_path, "cuda", env=driver | state)
    version = FLAVOURS["onnxruntime-gpu"]
    found = "provider cuda: the NVIDIA " + cause.format(cuda=cuda, version=version)
    assert message.startswith(found)
    for remedy in remedies:
        assert remedy in message[len(found) :]


@gpu_environment
def test_a_gpu_that_is_not_there_is_refused_whatever_the_others_are(
    driver: dict[str, str], tmp_path: Path
) -> None:
    message = refused(tmp_path, {"name": "cuda", "devices": [0, 3]}, env=driver)
    assert "GPU 3 is not there" in message
    assert "provider.devices counts from 0, and the driver finds 1" in message


@gpu_environment
@pytest.mark.parametrize(
    ("has_cuda", "library"),
    [(False, "libcublasLt.so.{cuda}"), (True, "libcudnn.so.9")],
    ids=["no CUDA", "no cuDNN"],
)
def test_a_missing_library_of_cuda_is_named_with_what_installs_it(
    has_cuda: bool, library: str, cuda: int, driver: dict[str, str], tmp_path: Path
) -> None:
    missing = library.format(cuda=cuda)
    if ctypes.util.find_library(missing.removeprefix("lib").partition(".")[0]):
        pytest.skip(f"this system has a {missing} of its own")
    python = environment_without(tmp_path / "venv", *CUDA_PACKAGES)
    if has_cuda:
        (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
        (site_packages / "nvidia").mkdir()
        installed = Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{cuda}"
        (site_packages / "nvidia" / installed.name).symlink_to(installed)
    message = refused(tmp_path, "cuda", python=python, env=driver)
    assert message.startswith(f"provider cuda: {missing} cannot be loaded ({missing}: cannot open")
    assert f"needs CUDA {cuda} and cuDNN 9: pip install 'batchclf[gpu]'" in message


@gpu_environment
def test_a_gpu_for_which_there_is_no_machine_code_is_refused_with_that_reason(
    driver: dict[str, str], tmp_path: Path
) -> None:
    message = refused(tmp_path, "cuda", env={**driver, "STANDIN_ARCH": "100"})
    version = FLAVOURS["onnxruntime-gpu"]
    assert message.startswith(
        "provider cuda: GPU 0: Stand-in is of compute capability 10.0, for which onnxruntime-gpu "
        f"{version} has no machine code (it has 7.5, "
    )
    assert "CMAKE_CUDA_ARCHITECTURES=100" in message


@gpu_environment
def test_a_gpu_that_answers_the_driver_but_not_cuda_is_refused(
    driver: dict[str, str], tmp_path: Path
) -> None:
    message = refused(tmp_path, "cuda", env=driver)
    assert message.startswith("provider cuda: ")
    assert "CUDA failure" in message


# ---- openvino ------------------------------------------------------------------------------------


def openvino(device_type: str = "CPU", **keys: Any) -> dict[str, Any]:
    """The `provider` of a job on OpenVINO."""
    return {"name": "openvino", "device_type": device_type, **keys}


@openvino_environment
@pytest.mark.parametrize(
    ("device_type", "device", "remedy"),
    [
        ("GPU", "GPU", "apt install intel-opencl-icd"),
        ("GPU.1", "GPU.1", "docker run --device /dev/dri"),
        ("NPU", "NPU", "/dev/accel and the intel-npu driver"),
        ("AUTO:GPU,CPU", "GPU", "/dev/dri and Intel's compute runtime"),
    ],
)
def test_an_intel_device_that_is_not_there_is_refused_with_what_it_needs(
    device_type: str, device: str, remedy: str, tmp_path: Path
) -> None:
    node = Path("/dev/accel" if device == "NPU" else "/dev/dri")
    if node.exists():
        pytest.skip(f"{node} exists: this machine may have the device")
    message = refused(tmp_path, openvino(device_type))
    assert f"device {device} is not available to OpenVINO here" in message
    assert remedy in message
    assert "or use device_type CPU" in message


@openvino_environment
@pytest.mark.parametrize("device_type", ["AUTO", "BANANA", "cpu", "AUTO:BANANA,CPU", "CPU.0"])
def test_a_device_type_that_openvino_lets_pass_is_refused_naming_those_there_are(
    device_type: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, openvino(device_type))
    assert f"device_type {device_type} is none of OpenVINO's; give CPU, GPU, GPU.1, NPU" in message
    assert "such as AUTO:GPU,CPU" in message


@openvino_environment
@pytest.mark.parametrize(
    ("precision", "flags", "instructions"),
    [
        ("bf16", {"avx512bw", "amx_bf16", "avx_ne_convert"}, "AVX-512, AMX or AVX-NE-CONVERT"),
        ("fp16", {"avx512_fp16", "amx_fp16", "avx_ne_convert"}, "AVX-512 FP16"),
    ],
)
def test_a_precision_this_cpu_would_compute_in_fp32_is_refused_naming_the_instructions(
    precision: str, flags: set[str], instructions: str, tmp_path: Path
) -> None:
    if has := flags & cpu_name_and_flags()[1]:
        pytest.skip(f"this CPU has {', '.join(sorted(has))}")
    message = refused(tmp_path, "openvino", precision=precision)
    assert f"precision {precision} needs a CPU with {instructions}" in message
    assert "Use precision fp32 or int8" in message


# ---- options of the provider ---------------------------------------------------------------------


def load_config(**devices: Mapping[str, str]) -> dict[str, str]:
    """The option of OpenVINO's provider that holds properties per device, as JSON text."""
    return {"load_config": json.dumps(devices)}


@openvino_environment
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"banana": 1}, "provider.options: Invalid OpenVINO EP option: banana"),
        (load_config(CPU={"BANANA": "1"}), "provider.options: Unsupported property BANANA"),
        ({"load_config": "nonsense"}, "provider.options.load_config: not JSON"),
        ({"load_config": "[1]"}, "provider.options.load_config: found [1]; allowed: JSON such"),
        (load_config(GPU={"NUM_STREAMS": "1"}), "load_config: found settings for GPU; the job's"),
        (
            load_config(CPU={"INFERENCE_PRECISION_HINT": "bf16"}),
            "load_config: found INFERENCE_PRECISION_HINT; use precision for it",
        ),
        (
            {"device_type": "GPU"},
            "provider.options.device_type: found GPU; use provider.device_type",
        ),
        ({"precision": "FP16"}, "provider.options.precision: found FP16; use precision for it"),
        ({"num_streams": "banana"}, "found num_streams: banana; provider openvino works without"),
        (load_config(CPU={"NUM_STREAMS": "banana"}), "Could not read number of streams"),
    ],
)
def test_an_option_that_openvino_does_not_know_or_the_job_stands_for_is_named(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, openvino(options=options), exit_code=2)
    assert named in message


@openvino_environment
@pytest.mark.parametrize("device_type", ["AUTO:CPU", "MULTI:CPU", "HETERO:CPU"])
def test_a_property_that_openvino_would_pass_over_in_a_list_of_devices_is_named(
    device_type: str, tmp_path: Path
) -> None:
    options = load_config(CPU={"BANANA": "1"})
    provider = openvino(device_type=device_type, options=options)
    assert "Unsupported property BANANA" in refused(tmp_path, provider, exit_code=2)


def write_classifier_with_doubles(path: Path) -> None:
    """10 classes of 8 x 8 pixels, with a double Mul that OpenVINO's provider leaves."""
    weights_CK11 = np.random.default_rng(0).normal(size=(10, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["maps"]),
        helper.make_node("Cast", ["maps"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Mul", ["wide", "two"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["narrow"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["narrow"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "doubles",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [
            numpy_helper.from_array(weights_CK11, "weights"),
            numpy_helper.from_array(np.array([2.0]), "two"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


@openvino_environment
def test_nodes_that_stay_on_the_cpu_are_refused_or_stand_in_the_summary(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    write_classifier_with_doubles(tmp_path / "doubles.onnx")
    preprocess = {"resize": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    model = {"onnx": str(tmp_path / "doubles.onnx"), "preprocess": preprocess}
    job = write_tiny_job(tmp_path, model=model, provider="openvino")
    done = batchclf("run", job, "--json")
    assert done.exit_code == 4, done.stderr
    assert "nodes of the model run on the CPU" in done.json["error"]
    assert "Mul" in done.json["error"]
    assert "provider.allow_fallback: true" in done.json["error"]
    allowed = batchclf(
        *("run", job, "--json", "--provider", "openvino"),
        *("--set", "provider.allow_fallback=true"),
    )
    assert allowed.exit_code == 0, allowed.stderr
    provider = allowed.json["provider"]
    assert provider["active"] == "OpenVINOExecutionProvider"
    assert "nodes of the model run on the CPU" in provider["fallback"]
    assert "FALLING BACK TO THE CPU IN PART" in allowed.stderr
    assert "FELL BACK TO THE CPU" in allowed.stderr


@openvino_environment
@pytest.mark.parametrize("device_type", ["AUTO:CPU", "MULTI:CPU", "HETERO:CPU"])
def test_a_precision_is_refused_for_a_cpu_in_a_list_of_devices_as_well(
    device_type: str, tmp_path: Path
) -> None:
    if cpu_name_and_flags()[1] & {"avx512bw", "amx_bf16", "avx_ne_convert"}:
        pytest.skip("this CPU computes in bf16")
    message = refused(tmp_path, openvino(device_type=device_type), precision="bf16")
    assert "precision bf16 needs a CPU with" in message


@gpu_environment
def test_the_number_of_a_gpu_is_a_key_of_the_job_and_no_option(
    driver: dict[str, str], tmp_path: Path
) -> None:
    provider = {"name": "cuda", "options": {"device_id": 1}}
    message = refused(tmp_path, provider, env=driver, exit_code=2)
    assert message == "provider.options.device_id: found 1; use provider.devices for it"


def test_the_cpu_has_no_options(tmp_path: Path) -> None:
    message = refused(tmp_path, {"name": "cpu", "options": {"banana": 1}}, exit_code=2)
    assert "provider.options: found banana; provider cpu has none" in message


@openvino_environment
@pytest.mark.parametrize(
    ("options", "stands"),
    [
        ({"num_streams": 2}, {"num_streams": "2"}),
        ({"disable_dynamic_shapes": True}, {"disable_dynamic_shapes": "true"}),
    ],
)
def test_an_option_that_openvino_knows_is_passed_on_and_stands_in_the_run(
    options: dict[str, Any], stands: dict[str, str], batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, provider=openvino(options=options))
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    provider = json.loads((tmp_path / "out" / "run.json").read_bytes())["provider"]
    assert provider["active"] == "OpenVINOExecutionProvider"
    assert stands.items() <= provider["options"].items()


# ---- the fall-back that a job allows -------------------------------------------------------------

FALLBACKS = [
    pytest.param("cuda", "pip install 'batchclf[gpu]", marks=cpu_environment),
    pytest.param("cuda", "no NVIDIA driver here", marks=[gpu_environment, without_driver]),
    pytest.param("cuda", "pip install 'batchclf[gpu]", marks=openvino_environment),
    pytest.param("openvino", "device NPU is not available", marks=openvino_environment),
]


def falling_back(name: str) -> dict[str, Any]:
    """A provider that does not work on a machine without an accelerator, and may be replaced."""
    device = {"device_type": "NPU"} if name == "openvino" else {}
    return {"name": name, "allow_fallback": True, **device}


@pytest.mark.parametrize(("name", "cause"), FALLBACKS)
def test_an_allowed_fall_back_runs_on_the_cpu_and_says_so_everywhere(
    name: str, cause: str, batchclf: Batchclf, tmp_path: Path
) -> None:
    done = batchclf("run", write_tiny_job(tmp_path, provider=falling_back(name)), "--json")
    assert done.exit_code == 0, done.stderr
    log, *_ = done.stderr.splitlines()
    assert log.startswith("batchclf: FALLING BACK TO THE CPU, as provider.allow_fallback allows: ")
    assert cause in log
    assert "batchclf: FELL BACK TO THE CPU, as the job allows: " in done.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    summary = json.loads((tmp_path / "out" / "stats.jsonl").read_bytes().splitlines()[-1])
    for provider in (done.json["provider"], run["provider"], summary["provider"]):
        assert provider["requested"] == name
        assert provider["active"] == "CPUExecutionProvider"
        assert cause in provider["fallback"]


@pytest.mark.parametrize(("name", "cause"), FALLBACKS)
def test_a_fall_back_to_a_precision_the_cpu_does_not_run_is_refused(
    name: str, cause: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, falling_back(name), precision="fp16")
    assert cause in message
    assert "provider.allow_fallback: the CPU does not run fp16 either" in message


@pytest.mark.parametrize(("name", "cause"), FALLBACKS)
def test_without_allow_fallback_the_same_job_is_refused(
    name: str, cause: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, falling_back(name) | {"allow_fallback": False})
    assert cause in message
