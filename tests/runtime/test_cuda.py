"""What the CUDA provider is told, and how a library that is missing is named.

The refusals themselves are in tests/sessions/test_refusals.py, in processes of their own.
"""

from pathlib import Path

import pytest

from batchclf.errors import UsageError
from batchclf.results.records import Precision
from batchclf.runtime.classifier import open_classifier
from batchclf.runtime.cuda import idle_tensor_cores, provider_options
from batchclf.runtime.cuda_machine import _load_problem
from batchclf.runtime.providers import PROVIDERS, installed_flavours
from batchclf.runtime.sessions import Target

for_cuda = pytest.mark.skipif(
    "onnxruntime-gpu" not in installed_flavours(),
    reason="needs onnxruntime-gpu, which tells its CUDA version: nox -s gpu",
)


def test_the_gpu_is_told_by_its_number_and_computes_in_full_fp32() -> None:
    options = provider_options(3, "fp32", {})
    assert options["device_id"] == "3"
    assert options["use_tf32"] == "0"
    assert "prefer_nhwc" not in options


def test_fp16_is_let_onto_the_tensor_cores_and_prefers_their_layout() -> None:
    options = provider_options(0, "fp16", {})
    assert options["prefer_nhwc"] == "1"
    assert options["use_tf32"] == "1"  # without it, no precision's convolutions run on them


def test_an_option_of_the_users_goes_before_ours() -> None:
    user = {"use_tf32": "1", "prefer_nhwc": "0", "gpu_mem_limit": "1000000000"}
    assert provider_options(0, "fp16", user).items() >= user.items()


LEAVES = "fp32 leaves the tensor cores unused; precision: fp16 uses them"
ADVISED = f"{LEAVES}, and so does options: {{use_tf32: 1}}, with 10 bits of 23"
IN_VAIN = f"{LEAVES}; options: {{use_tf32: 1}} changes nothing on this GPU, which has no TF32"


@pytest.mark.parametrize(
    ("precision", "options", "architecture", "loss"),
    [
        ("fp32", {}, 80, ADVISED),
        ("fp32", {"use_tf32": "1"}, 80, None),
        ("fp16", {}, 80, None),
        ("fp32", {}, 75, LEAVES),
        ("fp32", {"use_tf32": "1"}, 75, IN_VAIN),
        ("fp16", {}, 75, None),
    ],
)
def test_tf32_is_advised_where_there_is_such_a_thing(
    precision: Precision, options: dict[str, str], architecture: int, loss: str | None
) -> None:
    asked = provider_options(0, precision, options)
    assert idle_tensor_cores(asked, precision, architecture) == loss


@pytest.mark.parametrize("on", ["1", "true", "True"])
def test_a_cuda_graph_is_refused_without_bound_pixels(on: str, tmp_path: Path) -> None:
    target = Target(PROVIDERS["cuda"], options={"enable_cuda_graph": on})
    with pytest.raises(UsageError, match=rf"enable_cuda_graph: found {on}; .*: leave it out"):
        open_classifier(tmp_path / "unread.onnx", target, bind=False)


def test_the_number_of_a_gpu_is_no_option() -> None:
    with pytest.raises(UsageError, match=r"found 1; use provider\.devices"):
        provider_options(0, "fp32", {"device_id": "1"})


def test_a_library_that_loads_is_no_problem() -> None:
    assert _load_problem("libc.so.6") is None


@for_cuda
def test_a_library_that_is_not_there_or_none_is_named_with_what_installs_it(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"no library")
    for library, cause in (("libnone.so.9", "No such file"), (str(broken), "too short")):
        problem = _load_problem(library)
        assert problem is not None
        assert problem.startswith(f"{Path(library).name} cannot be loaded (")
        assert cause in problem
        assert "pip install 'batchclf[gpu]'" in problem


@for_cuda
def test_libraries_for_another_cuda_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "nvidia_cublas_cu12-12.9.1.4.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: nvidia-cublas-cu12\nVersion: 12.9.1.4\n")
    assert "nvidia-cublas-cu12" not in str(_load_problem("libnone.so.9"))
    monkeypatch.syspath_prepend(tmp_path)
    assert "nvidia-cublas-cu12" in str(_load_problem("libnone.so.9"))
