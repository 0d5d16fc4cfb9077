"""What is behind an error of ONNX Runtime's: the texts are what its wheels say.

Those of CUDA are said on a stand-in for GPUs too, by the wheel itself (tests/gpu_standin).
"""

from types import SimpleNamespace

import pytest

from batchclf.errors import ProviderError
from batchclf.runtime import cuda
from batchclf.runtime.cuda import Answer
from batchclf.runtime.faults import Fault, fault_of

NODE = "Error in execution: Non-zero status code returned while running Conv node. Name:'' Status "
ARENA = (
    NODE + "Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) "
)
PLACE = (
    " ; GPU=0 ; hostname=vm ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/"
    "cuda_stream_handle.cc ; line=122 ; expr=cudaStreamSynchronize(static_cast<cudaStream_t>("
    "GetHandle())); "
)
HIDING = NODE + "Message: CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED" + PLACE
MEMORY = [
    ARENA + "Failed to allocate memory for requested buffer of size 4816896",
    ARENA + "Available memory of 999936 is smaller than requested bytes of 4816896",
    NODE + "Message: CUDA error cudaErrorMemoryAllocation:out of memory",
    "CUDA failure 2: out of memory" + PLACE,
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "[GPU] Exceeded max size of memory object allocation",
    "clEnqueueNDRangeKernel, error code: -5 CL_OUT_OF_RESOURCES",
]
DEVICE = [
    "CUDA failure 46",
    "CUDA failure 46: CUDA-capable device(s) is/are busy or unavailable" + PLACE,
    "Deserialize tensor weight failed.CUDA failure 214: uncorrectable ECC error encountered",
    "CUDA failure 700: an illegal memory access was encountered" + PLACE,
    NODE + "Message: CUDA error cudaErrorIllegalAddress:an illegal memory access was encountered",
    NODE + "Message: CUDA error cudaErrorLaunchFailure:unspecified launch failure",
    "CUDA failure 719: unspecified launch failure ; GPU=0 ; cudaMemcpyAsync",
    "[GPU] clWaitForEvents: CL_DEVICE_NOT_AVAILABLE",
]
OTHER = [
    "CUDA error 209: no kernel image is available for execution on the device",
    "CUDA failure 460: nothing of the kind",
    "Got invalid dimensions for input: image",
    "the device ran out of patience",
    HIDING,
]
TABLE = [
    *(("memory", text) for text in MEMORY),
    *(("device", text) for text in DEVICE),
    *(("other", text) for text in OTHER),
]


@pytest.mark.parametrize(("kind", "text"), TABLE)
def test_what_is_behind_an_error_is_told_by_its_text(kind: str, text: str) -> None:
    assert fault_of(RuntimeError(text), ()) == (kind, text)


@pytest.mark.parametrize("text", MEMORY)
def test_a_lack_of_memory_is_known_behind_another_error(text: str) -> None:
    wrapped = ProviderError("provider cuda: a first batch of 512 does not run")
    wrapped.__cause__ = RuntimeError(text)
    assert fault_of(wrapped, ()).kind == "memory"
    assert fault_of(MemoryError(), ()).kind == "memory"


WELL, FULL = Answer(0, None, 70_000.0), Answer(0, None, 12.0)
LOST = Answer(1, "CUDA failure 700: an illegal memory access was encountered", 0.0)


@pytest.mark.parametrize(
    ("text", "answers", "kind", "told"),
    [
        (HIDING, [WELL], "other", ""),
        (HIDING, [FULL], "memory", "; GPU 0 has 12 MB left"),
        (HIDING, [WELL, LOST], "device", f"; asked, GPU 1 says: {LOST.error}"),
        (MEMORY[0], [LOST], "device", f"; asked, GPU 1 says: {LOST.error}"),
        (MEMORY[0], [WELL], "memory", ""),
        (DEVICE[0], [WELL], "device", ""),
        (OTHER[2], [FULL], "other", ""),
        (HIDING, [None], "other", ""),
    ],
)
def test_what_the_gpu_says_goes_before_a_text_that_hides_it(
    text: str,
    answers: list[Answer | None],
    kind: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "ask", lambda gpu: answers[gpu])
    found = fault_of(RuntimeError(text), range(len(answers)))
    assert found == Fault(found.kind, text + told)
    assert found.kind == kind


def test_a_gpu_that_has_no_memory_to_be_asked_is_full_and_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "_cudart_name", lambda: "libc.so.6")  # which is loaded
    monkeypatch.setattr(cuda, "_cudart", lambda: SimpleNamespace(cudaSetDevice=lambda gpu: 2))
    answer = cuda.ask(0)
    assert answer == Answer(0, None, 0.0)
    assert fault_of(RuntimeError(HIDING), [0]).kind == "memory"
