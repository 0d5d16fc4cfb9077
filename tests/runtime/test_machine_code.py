"""Which GPUs a library has code for."""

from pathlib import Path

import onnxruntime
import pytest

from batchclf.runtime.machine_code import MACHINE_CODE, PTX, Code, code_in, pieces
from tests.runtime.fat_library import fat_library
from tests.runtime.test_cuda import for_cuda

CODE = Code(frozenset({75, 80, 86, 90, 120}), frozenset())


@pytest.mark.parametrize("architecture", [75, 80, 86, 87, 89, 90, 120, 121])
def test_machine_code_runs_on_its_own_major_version_from_its_minor_on(architecture: int) -> None:
    assert CODE.runs_on(architecture)


@pytest.mark.parametrize("architecture", [61, 70, 72, 100, 103, 110, 130])
def test_machine_code_runs_on_no_other(architecture: int) -> None:
    assert not CODE.runs_on(architecture)


def test_ptx_runs_on_every_later_gpu() -> None:
    code = Code(frozenset({80}), frozenset({90}))
    assert code.runs_on(100)
    assert not code.runs_on(75)


def test_code_is_found_in_every_container_of_its_section_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    first = [(MACHINE_CODE, 80, b"A" * 30), (MACHINE_CODE, 90, b"B" * 7)]
    path.write_bytes(fat_library(first, [(PTX, 90, b"C")]))
    assert code_in(path) == Code(frozenset({80, 90}), frozenset({90}))
    data = path.read_bytes()
    assert [
        (one.kind, one.architecture, data[one.start : one.stop]) for one in pieces(bytearray(data))
    ] == [*first, (PTX, 90, b"C")]


@for_cuda
def test_the_cuda_provider_has_code_for_todays_gpus_and_not_for_every_one() -> None:
    code = code_in(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so")
    assert code is not None
    assert {75, 80, 90} <= code.machine
    assert not code.runs_on(61)


@pytest.mark.parametrize("content", [b"no library", b"\x7fELF" + bytes(70), b"\x7fELF"])
def test_what_is_no_library_of_cudas_has_no_code(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    assert code_in(path) is None
