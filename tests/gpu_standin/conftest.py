"""The stand-in, built once for all tests that run on it."""

import os

import pytest
from filelock import FileLock

from batchclf.runtime.providers import installed_flavours
from tests.gpu_standin.machine import Machine, built_machine


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with NVIDIA GPUs that is not there; skips with the reason where it cannot be."""
    if "onnxruntime-gpu" not in installed_flavours():
        pytest.skip(f"needs onnxruntime-gpu, found {', '.join(installed_flavours())}: nox -s gpu")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # they share it
    with FileLock(base / "machine.lock"):
        return built_machine(base / "machine")
