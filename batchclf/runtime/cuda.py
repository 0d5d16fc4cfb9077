"""NVIDIA GPUs: how the CUDA execution provider is set up, and why it does not run.

ONNX Runtime answers a missing driver or library with a log line and a session on the CPU. The
causes are looked up here, at the driver and the loader themselves, in the order in which they
have to be mended. Driver functions and error codes are those of the CUDA driver API
(https://docs.nvidia.com/cuda/cuda-driver-api).
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import build_and_package_info

from batchclf.errors import EnvironmentFailed, ProviderError, UsageError
from batchclf.results.records import Pixels, Precision

_NO_DEVICE = 100
_HOST_ALLOC_PORTABLE = 1
_INSTALL = "pip install 'batchclf[gpu]'"
_DEFAULTS = {
    # One shape only, so the arena need not grow in powers of two.
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    "do_copy_in_default_stream": "1",
    # TF32 keeps 10 bits of fp32's 23; whoever wants it asks for it.
    "use_tf32": "0",
}


def provider_options(device: int, precision: Precision, user: Mapping[str, str]) -> dict[str, str]:
    """Options for GPU number `device`: ours, with the user's in their place.

    Raises:
        UsageError: an option that a key of the job file stands for.
    """
    if "device_id" in user:
        raise UsageError(
            f"provider.options.device_id: found {user['device_id']}; use provider.devices for it"
        )
    ours = {**_DEFAULTS, "device_id": str(device)}
    if precision == "fp16":
        ours["prefer_nhwc"] = "1"  # the layout of the tensor cores' convolutions
    return {**ours, **user}


def device_name(device: int) -> str:
    """Number and name of a GPU, such as `0: NVIDIA H100 80GB HBM3`."""
    driver = _driver()
    handle = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(handle), device) or driver.cuDeviceGetName(
        name, len(name), handle
    ):
        raise ProviderError(f"provider cuda: the driver does not tell the name of GPU {device}")
    return f"{device}: {name.value.decode(errors='replace')}"


def require_cuda(devices: Sequence[int]) -> None:
    """Refuse what the CUDA execution provider cannot run on, and load its libraries.

    Raises:
        ProviderError: no driver, no GPU, a driver or libraries of another CUDA, a missing
            library, or a device number that is not there; with what mends it.
    """
    _require_devices(devices)
    # Prints what it does not find, on stdout; what matters of it is found again below.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    # cuDNN is not among the needed libraries, but convolutions are slow or on the CPU without it.
    for library in (str(provider), "libcudnn.so.9"):
        if problem := _load_problem(library):
            raise ProviderError(f"provider cuda: {problem}")


def _require_devices(devices: Sequence[int]) -> None:
    driver = _driver()
    version = ctypes.c_int()
    if code := driver.cuDriverGetVersion(ctypes.byref(version)):
        raise ProviderError(f"provider cuda: the NVIDIA driver does not answer (error {code})")
    needed = str(build_and_package_info.cuda_version).partition(".")[0]
    has = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if version.value // 1000 < int(needed):
        raise ProviderError(
            f"provider cuda: the NVIDIA driver is for CUDA {has}, and onnxruntime-gpu "
            f"{ort.__version__} needs CUDA {needed}: update the driver, or take a version for "
            "CUDA 12: pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"
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
    """Why a library cannot be loaded, and what installs what it lacks; None: it can."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        missing = re.match(r"(lib\w+\.so[.\d]*): cannot open", str(error))
        name = missing[1] if missing else Path(library).name
        needed = str(build_and_package_info.cuda_version).partition(".")[0]
        others = sorted(
            name
            for name in {one.metadata["Name"] or "" for one in importlib.metadata.distributions()}
            if re.fullmatch(r"nvidia-.*-cu\d+", name) and not name.endswith(f"-cu{needed}")
        )
        wrong = f"; {', '.join(others)} are for another CUDA" if others else ""
        return (
            f"{name} cannot be loaded ({error}){wrong}. onnxruntime-gpu {ort.__version__} needs "
            f"CUDA {needed} and cuDNN 9: {_INSTALL}"
        )
    return None


# ---- pinned memory -------------------------------------------------------------------------------


def pinned_pixels(shape: Sequence[int], device: int) -> Pixels:
    """A zeroed uint8 array in page-locked host memory, which GPUs copy from without a detour.

    `device` is one of the job's: the memory belongs to it, and is no other GPU's business.

    It is freed with the process: batches are allocated once, at the start of a job.

    Raises:
        EnvironmentFailed: the memory is not to be had.
    """
    num_bytes = math.prod(shape)
    pointer = ctypes.c_void_p()
    code = _cudart().cudaSetDevice(ctypes.c_int(device)) or _cudart().cudaHostAlloc(
        ctypes.byref(pointer), ctypes.c_size_t(num_bytes), ctypes.c_uint(_HOST_ALLOC_PORTABLE)
    )
    if code:
        raise EnvironmentFailed(
            f"{num_bytes / 1e6:,.0f} MB of page-locked memory cannot be had (error {code} of "
            "cudaHostAlloc); choose a smaller batch_size or loader.prefetch"
        )
    buffer = (ctypes.c_uint8 * num_bytes).from_address(pointer.value or 0)
    pixels: Pixels = np.ctypeslib.as_array(buffer).reshape(shape)
    pixels[:] = 0
    return pixels


@functools.cache
def _cudart() -> Any:
    major = str(build_and_package_info.cuda_version).partition(".")[0]
    return ctypes.CDLL(f"libcudart.so.{major}")  # loaded already, with the provider
