"""Proof of where a session runs, and what ONNX Runtime says when it does not."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from batchclf.errors import ModelError, ProviderError, UsageError
from batchclf.runtime import sessions
from batchclf.runtime.classifier import (
    BoundClassifier,
    OnnxClassifier,
    open_classifier,
    warm_up,
)
from batchclf.runtime.providers import PROVIDERS, compiled_in
from batchclf.runtime.sessions import (
    Target,
    _captured_stderr,
    _require_nodes,
    _session_options,
    open_session,
)
from tests.tiny import CPU, write_classifier

CUDA = Target(PROVIDERS["cuda"])
ON_CUDA, ON_CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "tiny.onnx")


def images(num_images: int) -> np.ndarray:
    return np.random.default_rng(num_images).random((num_images, 3, 8, 8), np.float32)


def test_a_session_tells_where_every_node_is(model: Path) -> None:
    _, active = open_session(model, CPU)
    assert (active.requested, active.active, active.device) == ("cpu", ON_CPU, "CPU")
    assert list(active.nodes) == [ON_CPU]
    assert active.nodes[ON_CPU] >= 2
    assert active.cpu_nodes == ()
    assert active.fallback is None


def test_shape_nodes_may_stay_on_the_cpu() -> None:
    left = ("Shape node_Shape_0", "Gather node_Gather_1", "Unsqueeze")
    assert _require_nodes({ON_CUDA: 50, ON_CPU: 3}, left, CUDA) == []


@pytest.mark.parametrize("operator", ["Conv", "Add", "Mul", "Concat", "Cast", "Resize", "Softmax"])
def test_a_computing_node_on_the_cpu_is_refused_by_its_name(operator: str) -> None:
    left = ("Shape node_Shape_0", f"{operator} one", f"{operator}")
    with pytest.raises(ProviderError, match=rf"2 of 53 nodes .* \({operator} one, {operator}\)"):
        _require_nodes({ON_CUDA: 50, ON_CPU: 3}, left, CUDA)


def test_a_computing_node_on_the_cpu_is_let_through_where_the_user_allows_it() -> None:
    allowing = Target(PROVIDERS["cuda"], may_leave_nodes=True)
    assert _require_nodes({ON_CUDA: 50, ON_CPU: 1}, ("Conv conv1",), allowing) == ["Conv conv1"]


@pytest.mark.parametrize("may_leave_nodes", [False, True])
def test_a_provider_that_took_nothing_is_refused_whatever_is_allowed(may_leave_nodes: bool) -> None:
    target = Target(PROVIDERS["openvino"], may_leave_nodes=may_leave_nodes)
    with pytest.raises(ProviderError, match="took none of the 60 nodes"):
        _require_nodes({ON_CPU: 60}, ("Conv conv1",) * 60, target)


def test_an_npu_may_not_hand_a_model_on_to_a_cpu() -> None:
    for device_type, entry in (("NPU", "1"), ("AUTO:NPU,CPU", "1"), ("CPU", ""), ("GPU", "")):
        settings = _session_options(Target(PROVIDERS["openvino"], device_type=device_type), 8)
        key = "session.disable_cpu_ep_fallback"
        try:
            found = settings.get_session_config_entry(key)
        except RuntimeError:  # not set
            found = ""
        assert found == entry, device_type


# ---- a session that opens elsewhere --------------------------------------------------------------

OTHER = next(
    name for name in ("cuda", "openvino") if PROVIDERS[name].execution_provider not in compiled_in()
)
"""A provider that this ONNX Runtime was not built with: every flavour lacks one."""


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    """That provider, its options those of the user: no part of it is asked what it needs."""
    monkeypatch.setattr(sessions, "_provider_options", lambda target, cache: {})
    return Target(PROVIDERS[OTHER])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_onnx_runtime_opened_elsewhere_is_refused(
    model: Path, target: Target
) -> None:
    asked = PROVIDERS[OTHER].execution_provider
    with pytest.raises(ProviderError, match=f"asked for {asked}, but .* opened .* on {ON_CPU}"):
        open_session(model, target)


def test_onnx_runtime_does_not_try_the_cpu_where_a_provider_fails(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its Python wrapper does by itself, unless told otherwise."""
    opened: list[object] = []

    def create(self: Any, providers: object, *others: object) -> None:
        opened.append(providers)
        self._fallback_providers = [ON_CPU]
        raise RuntimeError("no such device")

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", create)
    with pytest.raises((ModelError, ProviderError), match="no such device"):
        open_session(model, CPU)
    assert len(opened) == 1


def test_the_cpu_takes_no_options(model: Path) -> None:
    with pytest.raises(UsageError, match="found banana; provider cpu has none"):
        open_session(model, Target(PROVIDERS["cpu"], options={"banana": "1"}))


def test_a_file_that_is_no_model_is_the_models_fault_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="does not accept it"):
        open_session(tmp_path / "no.onnx", CPU)


def test_a_first_batch_that_does_not_run_is_refused(model: Path) -> None:
    with pytest.raises(ProviderError, match="a first batch of 2 does not run on CPU"):
        warm_up(open_classifier(model, CPU), np.zeros((2, 5, 8, 8), np.float32))


def test_what_native_code_writes_to_stderr_is_collected_and_stderr_is_restored(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _captured_stderr() as said:
        os.write(2, b"\x1b[1;31mfrom C++\x1b[m\n")
    os.write(2, b"after\n")
    assert said() == "from C++\n"
    assert capfd.readouterr().err == "after\n"


def test_stderr_is_restored_when_opening_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), _captured_stderr():
        raise KeyError("x")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_bound_classifier_gives_the_answers_of_an_unbound_one(model: Path) -> None:
    """The way of CUDA, with the CPU's memory in the place of the device's."""
    plain = open_classifier(model, CPU)
    bound = open_classifier(model, CPU, bind=True)
    assert type(plain) is OnnxClassifier
    assert type(bound) is BoundClassifier
    batches = [images(4) + number for number in range(5)]
    found = [bound(batch) for batch in batches]
    for batch, scores_NK in zip(batches, found, strict=True):
        np.testing.assert_array_equal(scores_NK, plain(batch))


def test_a_session_for_batches_of_one_size_takes_no_other(model: Path) -> None:
    assert open_classifier(model, CPU).takes_any_batch
    assert not open_classifier(model, CPU, bind=True).takes_any_batch


def test_a_bound_classifier_leaves_its_callers_pixels_alone(model: Path) -> None:
    bound = open_classifier(model, CPU, bind=True)
    first, second = images(4), images(4) + 1
    kept = first.copy()
    bound(first)
    bound(second)
    np.testing.assert_array_equal(first, kept)
