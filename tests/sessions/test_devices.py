"""From the job's provider to the sessions to open: devices, streams, threads, compile caches."""

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from batchclf.commands import validate
from batchclf.errors import EnvironmentFailed, ProviderError
from batchclf.models.bundle import Bundle, BundleMeta
from batchclf.results.records import Precision, Preprocess
from batchclf.runtime.providers import PROVIDERS, compiled_in
from batchclf.runtime.sessions import Target
from batchclf.sessions import open as opening
from batchclf.sessions.open import _compile_cache, _rounding, settle_apart, targets
from batchclf.spec.job import JobSpec
from batchclf.system.machine import usable_cores

CORES = usable_cores()


def job(**keys: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"input": "images", "output": "out", "model": {"name": "resnet18"}, **keys}
    )


def require(provider: str) -> None:
    if PROVIDERS[provider].execution_provider not in compiled_in():
        pytest.skip(f"another environment's: no {PROVIDERS[provider].execution_provider} here")


def test_the_cpu_gets_one_threaded_streams_for_its_cores() -> None:
    spec = job()
    (target,) = targets(spec.provider, spec)
    assert (target.streams, target.threads) == (min(CORES, 8), max(1, CORES // min(CORES, 8)))


def test_streams_and_threads_of_the_job_are_taken() -> None:
    spec = job(runtime={"streams": 3, "threads": 5})
    (target,) = targets(spec.provider, spec)
    assert (target.streams, target.threads) == (3, 5)


@pytest.mark.parametrize(("devices", "expected"), [(None, [0]), ([1], [1]), ([0, 2], [0, 2])])
def test_each_nvidia_gpu_is_a_target_with_two_batches_in_flight(
    devices: list[int] | None, expected: list[int]
) -> None:
    require("cuda")
    spec = job(provider={"name": "cuda", "devices": devices})
    found = targets(spec.provider, spec)
    assert [target.device_id for target in found] == expected
    assert {target.streams for target in found} == {2}


@pytest.mark.parametrize(
    ("device_type", "streams"),
    [(None, min(CORES, 8)), ("CPU", min(CORES, 8)), ("GPU", 2), ("NPU", 2), ("AUTO:GPU,CPU", 2)],
)
def test_openvino_gets_streams_for_its_device(device_type: str | None, streams: int) -> None:
    require("openvino")
    spec = job(provider={"name": "openvino", "device_type": device_type})
    (target,) = targets(spec.provider, spec)
    assert target.device_type == (device_type or "CPU")
    assert target.streams == streams


def test_options_reach_the_provider_as_text() -> None:
    options = {"a": 1, "b": True, "c": False, "d": 0.5, "e": "text"}
    spec = job(provider={"name": "cpu", "options": options})
    (target,) = targets(spec.provider, spec)
    assert target.options == {"a": "1", "b": "true", "c": "false", "d": "0.5", "e": "text"}


@pytest.mark.parametrize(("architecture", "rounding"), [(75, "fp32"), (80, "fp16"), (90, "fp16")])
def test_tf32_is_expected_to_round_where_it_was_asked_for_and_there_is_such_a_thing(
    architecture: int, rounding: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchclf.runtime.cuda_machine.architecture_of", lambda _: architecture)
    cuda = PROVIDERS["cuda"]
    assert _rounding(Target(cuda)) == "fp32"
    assert _rounding(Target(cuda, options={"use_tf32": "1"})) == rounding
    assert _rounding(Target(cuda, precision="fp16", options={"use_tf32": "1"})) == "fp16"
    assert _rounding(Target(PROVIDERS["openvino"], precision="bf16")) == "bf16"


def test_a_compile_cache_is_of_one_model_provider_device_precision_and_shape() -> None:
    def bundle(digest: str) -> Bundle:
        meta = BundleMeta(
            name="x",
            source={},
            preprocess=Preprocess(8, (8, 8), "bilinear", None, None),
            labels=("a", "b"),
            activation="softmax",
            files={"model.onnx": digest},
            golden_sha256="",
        )
        return Bundle(Path("unused"), meta)

    openvino, cpu = PROVIDERS["openvino"], PROVIDERS["cpu"]
    one = Target(openvino, device_type="GPU.0")
    caches = [
        _compile_cache(bundle("a"), one, 8),
        _compile_cache(bundle("b"), one, 8),
        _compile_cache(bundle("a"), one, 16),
        _compile_cache(bundle("a"), Target(openvino, device_type="GPU.1"), 8),
        _compile_cache(bundle("a"), Target(openvino, device_type="GPU.0", precision="fp16"), 8),
        _compile_cache(bundle("a"), Target(openvino, device_type="GPU.0", options={"x": "1"}), 8),
        _compile_cache(bundle("a"), Target(cpu, device_type="GPU.0"), 8),
    ]
    assert len(set(caches)) == len(caches)
    assert _compile_cache(bundle("a"), one, 8) == caches[0]


def _crash(job: JobSpec) -> NoReturn:
    os._exit(3)


def test_devices_the_trial_of_which_ends_its_process_are_refused_or_fallen_back_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "_settle_and_tell", _crash)
    said: list[str] = []
    with pytest.raises(ProviderError, match=r"trying its devices fails: .* has ended: exit code 3"):
        settle_apart(job(provider={"name": "cuda", "devices": [0, 1]}), said.append)
    assert said == []
    allowed = {"name": "cuda", "devices": [0, 1], "allow_fallback": True}
    fallback = settle_apart(job(provider=allowed), said.append)
    assert fallback is not None
    assert "has ended: exit code 3" in fallback
    assert "FALLING BACK TO THE CPU" in said[0]


def _read_nothing(job: JobSpec) -> NoReturn:
    raise PermissionError(13, "Permission denied", "libonnxruntime_providers_cuda.so")


def test_an_error_of_the_trial_of_devices_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "_settle_and_tell", _read_nothing)
    allowed = {"name": "cuda", "devices": [0, 1], "allow_fallback": True}
    with pytest.raises(PermissionError, match="libonnxruntime_providers_cuda"):
        settle_apart(job(provider=allowed), print)


def test_without_a_process_to_try_devices_in_the_environment_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: object, **keys: object) -> NoReturn:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("batchclf.system.apart.start_serving", refused)
    with pytest.raises(EnvironmentFailed, match="no process is to be had: Resource temporarily"):
        settle_apart(job(provider={"name": "cuda", "devices": [0, 1]}), print)


@pytest.mark.parametrize(("devices", "where"), [([1], "here"), ([0, 1], "apart")])
def test_several_gpus_are_tried_in_a_process_of_their_own_by_validate_as_well(
    devices: list[int], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(opening, "settle_provider", lambda *_: tried.append("here"))
    monkeypatch.setattr(opening, "settle_apart", lambda *_: tried.append("apart"))
    said = validate._provider(job(provider={"name": "cuda", "devices": devices}), print)
    assert tried == [where]
    assert said.startswith("CUDAExecutionProvider of ")
