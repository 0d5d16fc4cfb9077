"""What the CUDA execution provider needs of this machine, and why it does not run.

ONNX Runtime answers a missing driver or library with a log line and a session on the CPU. The
causes are looked up here, at the driver and the loader themselves, in the order in which they
have to be mended. Driver functions and error codes are those of the CUDA driver API
(https://docs.nvidia.com/cuda/cuda-driver-api).
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from batchclf.errors import ProviderError
from batchclf.runtime.cuda import cuda_major
from batchclf.runtime.machine_code import code_in

_NO_DEVICE = 100
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""Attributes of a GPU."""
_LOOK = "see what `nvidia-smi` says"
_INSTALL = "pip install 'batchclf[gpu]'"


def device_name(device: int) -> str:
    """Number and name of a GPU, such as `0: NVIDIA H100 80GB HBM3`."""
    name = ctypes.create_string_buffer(256)
    if _driver().cuDeviceGetName(name, len(name), _handle(device)):
        raise ProviderError(
            f"provider cuda: the driver does not tell the name of GPU {device}; {_LOOK}"
        )
    return f"{device}: {name.value.decode(errors='replace')}"


def architecture_of(device: int) -> int:
    """10 times the compute capability of a GPU."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    handle = _handle(device)
    for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        if _driver().cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
            raise ProviderError(
                f"provider cuda: the driver does not tell what GPU {device} is; {_LOOK}"
            )
    return 10 * major.value + minor.value


def _handle(device: int) -> ctypes.c_int:
    handle = ctypes.c_int()
    if code := _driver().cuDeviceGet(ctypes.byref(handle), device):
        raise ProviderError(
            f"provider cuda: the driver does not give GPU {device} (error {code}); {_LOOK}"
        )
    return handle


def require_cuda(devices: Sequence[int]) -> None:
    """Refuse what the CUDA execution provider cannot run on, and load its libraries.

    Raises:
        ProviderError: no driver, no GPU, one that is too new or too old, a driver or libraries of
            another CUDA, a missing library, or a device number that is not there; with what mends
            it.
    """
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    _require_devices(devices)
    _require_code(provider, devices)
    # Prints what it does not find, on stdout; what matters of it is found again below.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    # cuDNN is not among the needed libraries, but convolutions are slow or on the CPU without it.
    for library in (str(provider), "libcudnn.so.9"):
        if problem := _load_problem(library):
            raise ProviderError(f"provider cuda: {problem}")


def _require_devices(devices: Sequence[int]) -> None:
    driver = _driver()
    version = ctypes.c_int()
    if code := driver.cuDriverGetVersion(ctypes.byref(version)):
        raise ProviderError(
            f"provider cuda: the NVIDIA driver does not answer (error {code}); {_LOOK}"
        )
    has = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if version.value // 1000 < cuda_major():
        raise ProviderError(
            f"provider cuda: the NVIDIA driver is for CUDA {has}, and onnxruntime-gpu "
            f"{ort.__version__} needs CUDA {cuda_major()}: update the driver, or take a version "
            "for CUDA 12: pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        remedy = "see what `nvidia-smi` lists; in a container, run with `docker run --gpus all`"
        if visible is not None:
            remedy = "unset CUDA_VISIBLE_DEVICES, or name GPUs that `nvidia-smi` lists"
        raise ProviderError(
            f"provider cuda: the NVIDIA driver (CUDA {has}) finds no GPU{hint}: {remedy}"
        )
    if code:
        raise ProviderError(
            f"provider cuda: the NVIDIA driver (CUDA {has}) does not start (error {code} of "
            f"cuInit){hint}: see what `nvidia-smi` says"
        )
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if absent := [device for device in devices if device >= count.value]:
        raise ProviderError(
            f"provider cuda: GPU {', '.join(map(str, absent))} is not there; provider.devices "
            f"counts from 0, and the driver finds {count.value}{hint}"
        )


def _require_code(provider: Path, devices: Sequence[int]) -> None:
    """Otherwise some kernel fails, at the first batch or later, or is another's that does run."""
    code = code_in(provider)
    for device in devices:
        architecture = architecture_of(device)
        if code is not None and not code.runs_on(architecture):
            has = ", ".join(_capability(one) for one in sorted(code.machine | code.ptx))
            raise ProviderError(
                f"provider cuda: GPU {device_name(device)} is of compute capability "
                f"{_capability(architecture)}, for which onnxruntime-gpu {ort.__version__} has no "
                f"machine code (it has {has}): take a version that has it, or build one with "
                f"CMAKE_CUDA_ARCHITECTURES={architecture} "
                "(https://onnxruntime.ai/docs/build/eps.html#cuda), or name other GPUs in "
                "provider.devices"
            )


def _capability(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ProviderError(
            f"provider cuda: no NVIDIA driver here ({error}). Install the driver for your GPU; "
            "in a container, install the NVIDIA container toolkit on the host and run with "
            "`docker run --gpus all`"
        ) from None


def _load_problem(library: str) -> str | None:
    """Why a library cannot be loaded, and what installs what it lacks; None: it is.

    What it lacks is loaded from where torch has it, if that is of the same CUDA.
    """
    loaded: set[str] = set()
    while True:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            lacking = re.match(r"(lib\w+\.so[.\d]*): cannot open", str(error))
            name = lacking[1] if lacking else Path(library).name
            if lacking is None or name in loaded or not _loads_from_torch(name):
                return _not_loading(name, error)
            loaded.add(name)
        else:
            return None


def _loads_from_torch(library: str) -> bool:
    root, major = _torch()
    if root is None or major != cuda_major():
        return False
    folders = (root / "lib", *root.parent.glob("nvidia/*/lib"))
    found = next((one / library for one in folders if (one / library).exists()), None)
    if found is None:
        return False
    try:
        ctypes.CDLL(str(found))
    except OSError:  # what it lacks itself, or is, is told of by the loader of what needs it
        return False
    return True


@functools.cache
def _torch() -> tuple[Path | None, int | None]:
    """Where torch is installed, and the major version of its CUDA; it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    root = Path(spec.origin).parent
    try:
        told = re.search(r"^cuda\b.*= *'(\d+)", (root / "version.py").read_text(), re.MULTILINE)
    except OSError:
        return root, None
    return root, int(told[1]) if told else None


def _not_loading(name: str, error: OSError) -> str:
    needed = cuda_major()
    others = sorted(
        name
        for name in {one.metadata["Name"] or "" for one in importlib.metadata.distributions()}
        if re.fullmatch(r"nvidia-.*-cu\d+", name) and not name.endswith(f"-cu{needed}")
    )
    wrong = f"; {', '.join(others)} are for another CUDA" if others else ""
    root, major = _torch()
    if root is not None and major != needed:
        wrong += f"; torch in {root.parent} has " + (f"CUDA {major}" if major else "no CUDA")
    elif root is not None:
        wrong += f"; torch in {root.parent}, which is of CUDA {needed}, does not have it either"
    return (
        f"{name} cannot be loaded ({error}){wrong}. onnxruntime-gpu {ort.__version__} needs "
        f"CUDA {needed} and cuDNN 9: {_INSTALL}"
    )
