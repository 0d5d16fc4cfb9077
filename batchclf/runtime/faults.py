"""What is behind an error of ONNX Runtime's, which has no exceptions of its own for it.

The texts for a lack of memory are those of ONNX Runtime's arena ("Failed to allocate memory for
requested buffer", "Available memory of 9 is smaller than requested bytes of 10"), of CUDA's error 2
(cudaErrorMemoryAllocation, "out of memory"), of cuBLAS and cuDNN where their workspace does not
fit, of OpenVINO's GPU plugin (OpenCL's CL_OUT_OF_RESOURCES and others), and of C++ (std::bad_alloc)
and Python.

Some texts of a GPU's tell nothing, or the wrong thing: what it says itself goes before them.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

_TEXTS = re.compile(
    r"failed to allocate memory|available memory of \d+ is smaller than requested"
    r"|out[ _]of[ _](host[ _]|device[ _])?memory|CUDA (error|failure) 2\b"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|CL_OUT_OF_RESOURCES|CL_MEM_OBJECT_ALLOCATION_FAILURE|exceeded max size of memory"
    r"|bad_alloc|bad allocation|cannot allocate memory|can't start new thread",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"CUDA (error|failure) (46|214|70[029]|71\d|999)\b|cudaError(IllegalAddress|LaunchFailure"
    r"|LaunchTimeout|HardwareStackError|IllegalInstruction|MisalignedAddress|Assert|ECCUncorrectable"
    r"|DevicesUnavailable|Unknown)|illegal memory access|unspecified launch failure"
    r"|the launch timed out|busy or unavailable|uncorrectable ECC error|device-side assert"
    r"|device (is )?lost|CL_DEVICE_NOT_AVAILABLE|ZE_RESULT_ERROR_DEVICE_LOST",
    re.IGNORECASE,
)
_HIDING = re.compile(
    r"CUDNN_FE failure|CUDNN_BACKEND_API_FAILED"
    r"|CU(DNN|BLAS)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)",
    re.IGNORECASE,
)
"""What cuDNN and cuBLAS say of a lack of memory and a lost GPU as well as of their own faults."""


class Fault(NamedTuple):
    """What is behind an error, and all that is known of it."""

    kind: Literal["memory", "device", "other"]
    message: str


def fault_of(error: BaseException, gpus: Sequence[int]) -> Fault:
    """What is behind an error of a session's; `gpus`: numbers of those that it may have run on."""
    if gpus:
        from batchclf.runtime.cuda import ask

        answers = [answer for gpu in gpus if (answer := ask(gpu)) is not None]
        for answer in answers:
            if answer.error is not None:
                return Fault("device", f"{error}; asked, GPU {answer.gpu} says: {answer.error}")
        full = next((answer for answer in answers if answer.is_full), None)
        if full is not None and _HIDING.search(str(error)):
            return Fault("memory", f"{error}; GPU {full.gpu} has {full.free_mb:,.0f} MB left")
    if is_out_of_memory(error):
        return Fault("memory", str(error))
    return Fault("device" if is_device_lost(error) else "other", str(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory did not suffice."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or _TEXTS.search(str(found)):
            return True
        found = found.__cause__
    return False


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that this process's use of the device is over, until its end.

    The texts are those of CUDA's sticky errors, after which every further call fails (CUDA Runtime
    API, error handling: "the process must be terminated and relaunched"), and of OpenCL and Level
    Zero.
    """
    return _LOST.search(str(error)) is not None
