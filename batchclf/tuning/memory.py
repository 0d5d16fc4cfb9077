"""Is an error a lack of memory? ONNX Runtime has no exception of its own for that.

The texts are those of ONNX Runtime's arena ("Failed to allocate memory for requested buffer"), of
CUDA's error 2 (cudaErrorMemoryAllocation, "out of memory"), of cuBLAS and cuDNN where their
workspace does not fit, of OpenVINO's GPU plugin (OpenCL's CL_OUT_OF_RESOURCES and others), and of
C++ (std::bad_alloc) and Python.
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory did not suffice."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or _TEXTS.search(str(found)):
            return True
        found = found.__cause__
    return False
