"""CUDA's libraries where an installed torch has them, and not beside onnxruntime."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu_standin.machine import CUDA_PACKAGES, Machine, environment_without

OPEN = """
from batchclf.errors import ProviderError
from batchclf.runtime.cuda_machine import require_cuda
try:
    require_cuda([0])
except ProviderError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def bare(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The machine without its libraries."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    return replace(machine, python=environment_without(folder, *CUDA_PACKAGES))


def with_torch(bare: Machine, machine: Machine, cuda: str, folder: Path) -> str:
    """What is wrong with a machine whose libraries are those of a torch elsewhere."""
    (site,) = machine.python.parent.parent.glob("lib/python*/site-packages")
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise AssertionError('torch is imported')")
    (folder / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda}\nhip = None\n")
    (folder / "nvidia").symlink_to(site / "nvidia")
    done = bare.python_with("-c", OPEN, env={"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_libraries_of_a_torch_of_the_same_cuda_serve(
    machine: Machine, bare: Machine, tmp_path: Path
) -> None:
    assert with_torch(bare, machine, "'13.2'", tmp_path) == ""


@pytest.mark.parametrize(("cuda", "has"), [("'12.9'", "CUDA 12"), ("None", "no CUDA")])
def test_those_of_another_torch_do_not_and_it_is_named(
    machine: Machine, bare: Machine, cuda: str, has: str, tmp_path: Path
) -> None:
    problem = with_torch(bare, machine, cuda, tmp_path)
    assert re.match(r"provider cuda: libcublasLt\.so\.\d+ cannot be loaded", problem)
    assert f"torch in {tmp_path} has {has}. onnxruntime-gpu" in problem
