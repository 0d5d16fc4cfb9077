"""NVIDIA GPUs: options of the CUDA execution provider, and memory that GPUs copy from and to.

Memory is had, and copied, by the CUDA runtime that ONNX Runtime has loaded (CUDA Runtime API,
https://docs.nvidia.com/cuda/cuda-runtime-api). Its functions are called through ctypes, which lets
other Python threads run meanwhile; ONNX Runtime's own copies hold them all up.
"""

import ctypes
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from onnxruntime.capi import build_and_package_info

from batchclf.errors import UsageError
from batchclf.results.records import Pixels, Precision

_TENSOR_CORES = "use_tf32"
_FIRST_WITH_TF32 = 80
"""10 times the compute capability of Ampere; those before have tensor cores for fp16 alone."""
_IDLE = "fp32 leaves the tensor cores unused; precision: fp16 uses them"
_NO_MEMORY = 2
"""cudaErrorMemoryAllocation."""
_GRAPH = "enable_cuda_graph"
_DEFAULTS = {
    # One shape only, so the arena need not grow in powers of two.
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    "do_copy_in_default_stream": "1",
}
_PORTABLE = 1
"""Flag of page-locked memory: for all GPUs of the process."""
_NON_BLOCKING = 1
"""Flag of a stream: it does not wait for the default stream."""
_LITTLE_MB = 500
"""Kernels, workspaces and handles take some 100 MB at once."""
_EITHER_WAY = 4
"""Kind of a copy: its direction is that of the two addresses."""


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
        # Without it, convolutions of any precision are kept off the tensor cores.
        ours[_TENSOR_CORES] = "1"
    else:
        # TF32 keeps 10 bits of fp32's 23; whoever wants it asks for it.
        ours[_TENSOR_CORES] = "0"
    return {**ours, **user}


def cuda_major() -> int:
    """Of the CUDA that the installed onnxruntime-gpu was built for."""
    return int(str(build_and_package_info.cuda_version).partition(".")[0])


def idle_tensor_cores(
    options: Mapping[str, str], precision: Precision, architecture: int
) -> str | None:
    """What a session with these options loses by leaving the tensor cores unused; None: nothing.

    `architecture`: 10 times the compute capability of its GPU.
    """
    is_on = asks_for_tf32(options)
    asked = f"options: {{{_TENSOR_CORES}: {options.get(_TENSOR_CORES)}}}"
    if precision == "fp32" and not has_tf32(architecture):
        in_vain = f"; {asked} changes nothing on this GPU, which has no TF32"
        return _IDLE + in_vain if is_on else _IDLE
    if is_on:
        return None
    if precision == "fp32":
        return f"{_IDLE}, and so does options: {{{_TENSOR_CORES}: 1}}, with 10 bits of 23"
    return (
        f"{asked} leaves the tensor cores unused at {precision} as well; without it they are used"
    )


def asks_for_tf32(options: Mapping[str, str]) -> bool:
    """Whether these options let a session at fp32 compute in TF32."""
    return _is_on(options, _TENSOR_CORES)


def has_tf32(architecture: int) -> bool:
    """Whether there is such a thing; `architecture`: as of `idle_tensor_cores`."""
    return architecture >= _FIRST_WITH_TF32


def refuse_graph(options: Mapping[str, str]) -> None:
    """Refuse a CUDA graph for a session whose pixels are not bound to one place.

    Raises:
        UsageError: the option is on.
    """
    if _is_on(options, _GRAPH):
        raise UsageError(
            f"provider.options.{_GRAPH}: found {options[_GRAPH]}; a CUDA graph reads its pixels "
            "from one place, and this session takes them from anywhere: leave it out"
        )


def _is_on(options: Mapping[str, str], name: str) -> bool:
    """Whether an option of yes or no is set, as ONNX Runtime reads it."""
    return options.get(name, "0").lower() in ("1", "true")


# ---- memory and copies ---------------------------------------------------------------------------


class Copies:
    """Copies to and from one GPU, one after the other, in a stream of their own."""

    def __init__(self, device: int) -> None:
        """Raises RuntimeError, as ONNX Runtime does, where CUDA fails."""
        self._device = device
        self._stream = ctypes.c_void_p()
        runtime = _cudart()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NON_BLOCKING)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream).atexit = False

    def __call__(self, target: int, source: int, num_bytes: int) -> None:
        """Copy between two addresses; it is done when this returns.

        Raises:
            RuntimeError: CUDA fails, be it that something failed before.
        """
        size = ctypes.c_size_t(num_bytes)
        addresses = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *addresses, size, _EITHER_WAY, self._stream)
        self._call("cudaStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: object) -> None:
        runtime = _cudart()
        code = runtime.cudaSetDevice(self._device) or getattr(runtime, name)(*arguments)
        if code:
            raise RuntimeError(
                f"CUDA failure {code}: {_description(code)} ; GPU={self._device} ; {name}"
            )


def pinned_pixels(shape: Sequence[int], device: int, log: Callable[[str], None]) -> Pixels:
    """A zeroed uint8 array in page-locked host memory, which GPUs copy from without a detour.

    `device` is one of the job's: the memory belongs to it, and is no other GPU's business. Where it
    is not to be had, `log` is told, and ordinary memory serves: of that there may be more.

    It is freed with the process: batches are allocated once, at the start of a job.
    """
    num_bytes = math.prod(shape)
    pointer = ctypes.c_void_p()
    code = _cudart().cudaSetDevice(device) or _cudart().cudaHostAlloc(
        ctypes.byref(pointer), ctypes.c_size_t(num_bytes), _PORTABLE
    )
    if code:
        why = _refusal(code, "cudaHostAlloc", num_bytes, "of batches")
        log(f"{why}; a smaller batch_size or loader.prefetch needs less")
        return np.zeros(shape, np.uint8)
    buffer = (ctypes.c_uint8 * num_bytes).from_address(pointer.value or 0)
    pixels: Pixels = np.ctypeslib.as_array(buffer).reshape(shape)
    pixels[:] = 0
    return pixels


@contextmanager
def page_locked(pixels: Pixels, device: int, log: Callable[[str], None]) -> Iterator[None]:
    """Have the pages of an array, which must begin with one, locked in memory during the block.

    Where that is refused, they are copied by a detour, and `log` is told.
    """
    runtime = _cudart()
    address = ctypes.c_void_p(pixels.ctypes.data)
    code = runtime.cudaSetDevice(device) or runtime.cudaHostRegister(
        address, ctypes.c_size_t(pixels.nbytes), _PORTABLE
    )
    if code:
        why = _refusal(code, "cudaHostRegister", pixels.nbytes, "that decoding processes share")
        log(f"{why}; loader.backend: threads has memory that needs none")
    try:
        yield
    finally:
        if not code:
            runtime.cudaHostUnregister(address)


def _refusal(code: int, call: str, num_bytes: int, of_what: str) -> str:
    """What is told of memory that is not page-locked."""
    _cudart().cudaGetLastError()  # else whoever asks next takes this error for its own
    return (
        f"the {num_bytes / 1e6:,.0f} MB {of_what} cannot be page-locked (error {code} of {call}: "
        f"{_description(code)}): copies to the GPU take a detour"
    )


class Answer(NamedTuple):
    """What a GPU says when it is asked how it is."""

    gpu: int
    error: str | None
    """Why this process cannot use it any more; None: it can."""
    free_mb: float

    @property
    def is_full(self) -> bool:
        """Whether cuDNN or cuBLAS may have been left without memory."""
        return self.free_mb < _LITTLE_MB


def ask(gpu: int) -> Answer | None:
    """How a GPU is; None: this process does not use CUDA."""
    try:
        ctypes.CDLL(_cudart_name(), os.RTLD_NOLOAD)
    except OSError:
        return None
    runtime = _cudart()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = (
        runtime.cudaSetDevice(gpu)
        or runtime.cudaDeviceSynchronize()
        or runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    )
    if code == _NO_MEMORY:  # not even for being asked; it can be used when there is some again
        return Answer(gpu, None, 0.0)
    error = f"CUDA failure {code}: {_description(code)}" if code else None
    return Answer(gpu, error, free.value / 1e6)


def _description(code: int) -> str:
    text: bytes = _cudart().cudaGetErrorString(code)
    return text.decode(errors="replace")


def _cudart_name() -> str:
    return f"libcudart.so.{cuda_major()}"


@functools.cache
def _cudart() -> Any:
    runtime = ctypes.CDLL(_cudart_name())  # loaded already, with the provider
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
