"""The wheel holds the C extension for all Pythons; where no compiler is, it is built without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

NEEDED = ("batchclf", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE")
EXTENSION = "batchclf/images/_resize.abi3.so"


def built(folder: Path, **env: str) -> Path:
    """The wheel of what is needed of this repository, as pip builds it from a clone."""
    source = folder / "source"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", **env},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.glob("*.whl")
    return wheel


def resampler_of(wheel: Path, folder: Path) -> str:
    """What says to resize where the wheel is unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    program = "from batchclf.images.resampler import resampler_name; print(resampler_name())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles _resize.c")
def test_one_wheel_holds_the_extension_for_all_pythons_from_3_11(tmp_path: Path) -> None:
    wheel = built(tmp_path)
    assert "-cp311-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert EXTENSION in names
    assert {
        "batchclf/py.typed",
        "batchclf/runtime/probe.onnx",
        "batchclf/spec/job.schema.json",
        "batchclf/commands/report/templates/report.html.j2",
        "batchclf/commands/report/templates/report.css",
        "batchclf/commands/report/templates/report.js",
    } <= set(names)
    assert not [name for name in names if name.endswith((".c", ".o"))]
    assert resampler_of(wheel, tmp_path / "installed").startswith("native (")


@pytest.mark.parametrize("env", [{"CC": "/bin/false"}, {"PATH": ""}], ids=["fails", "is not there"])
def test_where_the_compiler_fails_or_is_not_there_pillow_resizes(
    env: dict[str, str], tmp_path: Path
) -> None:
    wheel = built(tmp_path, **env)
    assert EXTENSION not in zipfile.ZipFile(wheel).namelist()
    assert resampler_of(wheel, tmp_path / "installed").startswith("pillow ")
