"""A machine with NVIDIA GPUs that is not there: the real onnxruntime-gpu over host memory.

Libraries of C and C++ stand in for the driver, CUDA's runtime, cuBLAS and cuDNN; kernels do
nothing. So sessions open, nodes are placed, engines are chosen, memory is allocated and copied, and
errors are told as on a GPU; answers are zeros, and no time means anything.

What the machine is like is told by the environment:

- STANDIN_GPUS, STANDIN_ARCH (90: compute capability 9.0), STANDIN_MEMORY_MB: the GPUs;
- STANDIN_DRIVER (13000: CUDA 13.0), STANDIN_INIT (an error of cuInit): their driver;
- STANDIN_EXCLUSIVE: a folder; each GPU is for the first process that uses it, until its end;
- STANDIN_COPY_MS: how long a copy of a megabyte or more takes;
- STANDIN_ENGINES: see cudnn.cpp; STANDIN_FAULT, STANDIN_FAULT_ONCE: see runtime.cpp;
- STANDIN_TRACE: a file that is told of each allocation, copy, launch, engine and wait.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = Path(__file__).parent
SITE = Path(sysconfig.get_path("purelib"))
CUDA_PACKAGES = ("nvidia", "cuda", "torch", "triton")
"""How the names begin of all that brings CUDA's libraries into an environment."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the libraries lie, and what finds them."""

    python: Path
    """Of an environment like this one, whose CUDA libraries they are."""
    env: dict[str, str]
    """What else has to be set for a process on the machine."""

    def python_with(
        self, *arguments: str, knobs: Mapping[str, object] = {}, env: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        """A Python process on the machine, to its end; a knob `gpus` is STANDIN_GPUS."""
        told = {f"STANDIN_{name.upper()}": str(value) for name, value in knobs.items()}
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self.env, **told, **env},
            timeout=300,
            check=False,
        )


def built_machine(folder: Path) -> Machine:
    """The machine in a folder, built there if it is not yet; skips where it cannot be."""
    machine = Machine(
        folder / "venv" / "bin" / "python", {"LD_LIBRARY_PATH": str(folder / "driver")}
    )
    if not folder.exists():
        _build(folder)
    return machine


def _build(folder: Path) -> None:
    from onnxruntime.capi import build_and_package_info

    major = str(build_and_package_info.cuda_version).partition(".")[0]
    includes = [SITE / "nvidia" / name / "include" for name in (f"cu{major}", "cudnn")]
    # What may be missing is looked for before anything is left in the folder.
    for header in (includes[0] / "cuda_runtime_api.h", includes[1] / "cudnn.h"):
        if not header.exists():
            pytest.skip(f"needs {header}, which comes with onnxruntime-gpu[cuda,cudnn]")
    for tool, package in (("cc", "gcc"), ("c++", "g++"), ("nm", "binutils")):
        _tool(tool, package)
    environment_without(folder / "venv", *CUDA_PACKAGES)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    cuda, cudnn = site / "nvidia" / f"cu{major}" / "lib", site / "nvidia" / "cudnn" / "lib"
    for place in (cuda, cudnn):
        place.mkdir(parents=True)
    with_headers = [f"-I{one}" for one in (SOURCES, *includes)]
    wanted = _wanted(SITE / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so")
    for library, functions in wanted.items():
        source = [SOURCES / "runtime.cpp"] if library.startswith("libcudart") else []
        _compile(cuda / library, functions, library, *with_headers, *map(str, source))
    declared = set(re.findall(r"\b(cudnn[A-Z]\w+)\(", _all_text(includes[1], "cudnn*.h")))
    runtime = str(cuda / f"libcudart.so.{major}")
    _compile(
        cudnn / "libcudnn.so.9", declared, "", *with_headers, str(SOURCES / "cudnn.cpp"), runtime
    )
    made_driver(folder / "driver")


def made_driver(folder: Path) -> dict[str, str]:
    """Build the driver alone: the environment in which it is found. Skips without a compiler."""
    folder.mkdir()
    library = folder / "libcuda.so.1"
    source, options = str(SOURCES / "driver.c"), ["-w", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([_tool("cc", "gcc"), *options, source], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


def environment_without(folder: Path, *packages: str) -> Path:
    """An environment like this one, of links, but for packages whose names begin so: its python."""
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for entry in SITE.iterdir():
        if not entry.name.startswith(packages):
            (site_packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def _wanted(provider: Path) -> dict[str, set[str]]:
    """The functions that the CUDA provider takes from each library, by its symbols' versions."""
    command = [_tool("nm", "binutils"), "--dynamic", "--undefined-only", str(provider)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted: dict[str, set[str]] = {"libcurand.so.10": set()}
    for function, library in re.findall(r" (\w+)@(libcu\w+\.so\.\d+)$", said, re.MULTILINE):
        wanted.setdefault(library, set()).add(function)
    return wanted


def _compile(library: Path, functions: set[str], version: str, *arguments: str) -> None:
    """A library of what `arguments` name, and of functions that do nothing for the rest.

    A function that makes something gives a handle; a choice of algorithms gives one.
    """
    lines = []
    for name in sorted(functions):
        does = "*(void **)handle = handle; " if "Create" in name else ""
        if name == "cublasLtMatmulAlgoGetHeuristic":
            lines.append(
                "#define P void *\n"
                f"int {name}(P a, P b, P c, P d, P e, P f, P g, int h, P i, int *n) "
                "{ *n = 1; return 0; }"
            )
        else:
            lines.append(f"__attribute__((weak)) int {name}(void *handle) {{ {does}return 0; }}")
    stubs = library.with_suffix(".stubs.c")
    stubs.write_text("\n".join(lines))
    made = stubs.with_suffix(".o")
    subprocess.run([_tool("cc", "gcc"), "-w", "-fPIC", "-c", "-o", made, stubs], check=True)
    exports = library.with_suffix(".map")
    exports.write_text(f"{version} {{ global: *; }};")
    options = ["-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    options.append("-Wl,--no-as-needed")  # what is named is linked with
    if version:
        options.append(f"-Wl,--version-script={exports}")
    compiler = _tool("c++", "g++")
    subprocess.run([compiler, *options, "-o", library, made, *arguments], check=True)


def _all_text(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in folder.glob(pattern))


def _tool(name: str, package: str) -> str:
    return shutil.which(name) or pytest.skip(f"needs {name}: apt install {package}")
