"""Which providers may run: installed, compiled in, and the only flavour of its package."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest

from batchclf.errors import ProviderError, UsageError
from batchclf.results.records import Precision
from batchclf.runtime.providers import (
    FLAVOURS,
    PROVIDERS,
    flavour_problem,
    installed_flavours,
    require_precision,
    require_provider,
)
from batchclf.spec.job import ProviderSpec

Install = Callable[..., None]


@dataclass
class _Installed:
    folder: str
    version: str = "1.99.0"

    def locate_file(self, path: str) -> Path:
        return Path(self.folder) / path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes it look as if just these distributions were installed: `install("onnxruntime")`.

    `install("onnxruntime", onnxruntime_gpu="/b")` installs one of them in a folder of its own.
    """

    def make(*distributions: str, **elsewhere: str) -> None:
        found = {name: _Installed("/a") for name in distributions}
        found |= {name.replace("_", "-"): _Installed(at) for name, at in elsewhere.items()}

        def distribution(name: str) -> _Installed:
            if name in found:
                return found[name]
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    return make


def test_every_provider_of_the_job_file_is_known_by_its_name() -> None:
    names = ProviderSpec.model_json_schema()["properties"]["name"]["enum"]
    assert sorted(PROVIDERS) == sorted(names)
    for name, provider in PROVIDERS.items():
        assert provider.name == name
        assert provider.distribution in FLAVOURS
        assert provider.execution_provider in onnxruntime.get_all_providers()


def test_the_environment_of_these_tests_holds_one_flavour_and_runs_on_the_cpu() -> None:
    assert flavour_problem() is None
    assert len(installed_flavours()) == 1
    assert require_provider("cpu").execution_provider == "CPUExecutionProvider"


def test_no_flavour_at_all_is_refused_with_the_command_to_install_one(install: Install) -> None:
    install()
    assert installed_flavours() == {}
    with pytest.raises(ProviderError, match=r"not installed.*pip install 'batchclf\[cpu\]'"):
        require_provider("cpu")


@pytest.mark.parametrize("other", FLAVOURS[1:])
@pytest.mark.parametrize("name", sorted(PROVIDERS))
def test_two_flavours_side_by_side_are_refused_for_every_provider(
    install: Install, name: str, other: str
) -> None:
    install("onnxruntime", other)
    with pytest.raises(ProviderError) as refused:
        require_provider(name)
    message = str(refused.value)
    assert f"onnxruntime 1.99.0 and {other} 1.99.0 are installed side by side in /a" in message
    assert f"pip uninstall -y onnxruntime {other}" in message


def test_two_flavours_in_different_folders_are_told_from_each_other_and_one_is_to_go(
    install: Install,
) -> None:
    install("onnxruntime", onnxruntime_gpu="/b")
    with pytest.raises(ProviderError) as refused:
        require_provider("cuda")
    message = str(refused.value)
    assert "onnxruntime 1.99.0 in /a and onnxruntime-gpu 1.99.0 in /b are both found" in message
    assert "for provider cpu pip uninstall -y onnxruntime-gpu" in message
    assert "for provider cuda pip uninstall -y onnxruntime;" in message
    assert "mv /a/onnxruntime /a/onnxruntime-1.99.0.dist-info ASIDE/" in message
    assert "mv /b/onnxruntime /b/onnxruntime_gpu-1.99.0.dist-info ASIDE/" in message


def test_another_environment_gets_the_package_from_where_this_one_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    installed = tmp_path / "batchclf-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: batchclf\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderError, match=r"pip install 'batchclf\[gpu\]'$"):
        require_provider("cuda")
    origin = {"dir_info": {"editable": True}, "url": "file:///home/me/clone"}
    (installed / "direct_url.json").write_text(json.dumps(origin))
    with pytest.raises(ProviderError, match=r"'batchclf\[gpu\] @ file:///home/me/clone'$"):
        require_provider("cuda")
    origin = {"vcs_info": {"vcs": "git", "commit_id": "0"}, "url": "https://host/batchclf.git"}
    (installed / "direct_url.json").write_text(json.dumps(origin))
    with pytest.raises(ProviderError, match=r"\[gpu\] @ git\+https://host/batchclf.git@0'$"):
        require_provider("cuda")


@pytest.mark.parametrize(("name", "extra"), [("cuda", "gpu"), ("openvino", "openvino")])
def test_a_provider_that_is_not_compiled_in_is_refused_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError) as refused:
        require_provider(name)
    assert PROVIDERS[name].execution_provider in str(refused.value)
    assert "it has CPUExecutionProvider" in str(refused.value)
    assert f"batchclf[{extra}]" in str(refused.value)
    assert refused.value.exit_code == 4


def test_a_provider_that_is_compiled_in_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    assert require_provider("cuda").execution_provider == "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("name", "precision", "alternative"),
    [
        ("cpu", "bf16", "provider cpu runs fp32 or int8, and bf16 runs on provider openvino"),
        ("cpu", "fp16", "fp16 runs on provider cuda or openvino"),
        ("cuda", "bf16", "provider cuda runs fp32 or fp16, and bf16 runs on provider openvino"),
        ("cuda", "int8", "int8 runs on provider cpu or openvino"),
    ],
)
def test_a_precision_that_cannot_run_is_refused_naming_what_can(
    name: str, precision: Precision, alternative: str
) -> None:
    with pytest.raises(UsageError, match=alternative) as refused:
        require_precision(name, precision)
    assert str(refused.value).startswith(f"precision: found {precision}")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", sorted(PROVIDERS))
def test_fp32_runs_on_every_provider(name: str) -> None:
    require_precision(name, "fp32")
