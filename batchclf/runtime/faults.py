"""What is behind an error of ONNX Runtime's, which has no exceptions of its own for it.

The texts for a lack of memory are those of ONNX Runtime's arena ("Failed to allocate memory for
requested buffer"), of CUDA's error 2 (cudaErrorMemoryAllocation, "out of memory"), of cuBLAS and
cuDNN where their workspace does not fit, of OpenVINO's GPU plugin (OpenCL's CL_OUT_OF_RESOURCES and
others), and of C++ (std::bad_alloc) and Python.
"""

import re

_TEXTS = re.compile(
    r"failed to allocate memory|out[ _]of[ _](host[ _]|device[ _])?memory|CUDA (error|failure) 2\b"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|CL_OUT_OF_RESOURCES|CL_MEM_OBJECT_ALLOCATION_FAILURE|exceeded max size of memory"
    r"|bad_alloc|bad allocation|cannot allocate memory|can't start new thread"
    r"|page-locked memory cannot be had",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"CUDA (error|failure) (214|70[029]|71\d|999)\b|cudaError(IllegalAddress|LaunchFailure"
    r"|LaunchTimeout|HardwareStackError|IllegalInstruction|MisalignedAddress|Assert|ECCUncorrectable"
    r"|DevicesUnavailable|Unknown)|illegal memory access|unspecified launch failure"
    r"|the launch timed out|uncorrectable ECC error|device-side assert"
    r"|device (is )?lost|CL_DEVICE_NOT_AVAILABLE|ZE_RESULT_ERROR_DEVICE_LOST",
    re.IGNORECASE,
)


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
