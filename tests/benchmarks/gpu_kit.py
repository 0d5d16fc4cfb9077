"""Brings this project and onnxruntime-gpu to a GPU host without network, in small uploads.

    python -m tests.benchmarks.gpu_kit pack OUT [--arch 90] [--python 3.12] [--part-mib 50]

At a desk with network: downloads the wheels, zeroes the machine code for other GPUs than the
host's in ONNX Runtime's CUDA library (five sixths of it), and packs them with this checkout into
OUT/kit.00, OUT/kit.01, ... and a copy of this script, which needs nothing but Python. `--arch` is
the host's compute capability without its point (90: H100, H200); `all` zeroes nothing.

    python3 gpu_kit.py unpack FOLDER TARGET

On the host, with the parts in FOLDER: unpacks them to TARGET, and writes TARGET/env.sh, to be
sourced. What torch brought is used from where it is. GPU.md beside this tells the whole recipe.
"""

import argparse
import io
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEELS = (
    *("onnxruntime-gpu", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("orjson", "platformdirs", "simplejpeg", "pillow", "filelock", "pyyaml", "safetensors"),
    *("onnxscript", "onnx-ir", "packaging"),
)
"""What a run and an export need beside torch, torchvision, onnx, numpy, click and tqdm."""
CUDA_LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
UNUSED = ("onnxruntime/capi/libonnxruntime_providers_tensorrt.so",)
MANYLINUX = ("2_34", "2_28", "2_27", "2_24", "2_17")


# ---- at the desk ---------------------------------------------------------------------------------


def pack(out: Path, arch: int | None, python: str, part_mib: int) -> None:
    """Write the parts."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("kit.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        download(top / "wheels", python)
        for wheel in sorted((top / "wheels").iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(top / "site")
        for name in UNUSED:
            (top / "site" / name).unlink()
        if arch is not None:
            keep_arch(top / "site" / CUDA_LIBRARY, arch)
        copy_checkout(top / "repo")
        with (
            Parts(out, part_mib << 20) as parts,
            tarfile.open(fileobj=parts, mode="w|xz") as archive,
        ):
            archive.add(top / "site", "site")
            archive.add(top / "repo", "repo")
    shutil.copy(__file__, out)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def download(folder: Path, python: str) -> None:
    """The wheels for a Linux host on x86-64."""
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in MANYLINUX]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)),
            *("--only-binary=:all:", f"--python-version={python}", "--implementation=cp"),
            *(*platforms, "--platform=manylinux2014_x86_64", *WHEELS),
        ],
        check=True,
    )


def keep_arch(library: Path, arch: int) -> None:
    """Zero the machine code of a library for all GPUs but those of a compute capability."""
    from batchclf.runtime.machine_code import MACHINE_CODE, Code, pieces  # a host has none of it

    data = bytearray(library.read_bytes())
    found = list(pieces(data))
    archs = sorted({one.architecture for one in found if one.kind == MACHINE_CODE})
    # Code for an earlier GPU of the same generation runs as well.
    fitting = [one for one in archs if Code(frozenset({one}), frozenset()).runs_on(arch)]
    if not fitting:
        raise SystemExit(f"--arch {arch}: the wheel has machine code for {archs} only")
    num_zeroed = 0
    for one in found:
        if (one.kind, one.architecture) != (MACHINE_CODE, fitting[-1]):
            data[one.start : one.stop] = bytes(one.stop - one.start)
            num_zeroed += one.stop - one.start
    library.write_bytes(data)
    print(f"machine code for {fitting[-1]} kept, {num_zeroed / 2**20:.0f} MiB of {archs} zeroed")


def copy_checkout(target: Path) -> None:
    """What git tracks, and the compiled extension, which runs on any Python 3.11 or later."""
    root = Path(__file__).resolve().parents[2]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    built = [str(path.relative_to(root)) for path in (root / "batchclf").rglob("*.abi3.so")]
    for name in (*names, *built):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target / name)


class Parts(io.RawIOBase):
    """A file that goes on in another one when a part is full."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Append to the parts."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        num_bytes = len(left)
        while left:
            number, offset = divmod(self._written, self._size)
            some = left[: self._size - offset]
            with (self._folder / f"kit.{number:02d}").open("ab" if offset else "wb") as file:
                file.write(some)
            self._written += len(some)
            left = left[len(some) :]
        return num_bytes


# ---- on the host ---------------------------------------------------------------------------------


def unpack(folder: Path, target: Path) -> None:
    """Unpack the parts, and say how to use what is in them."""
    parts = sorted(folder.glob("kit.[0-9][0-9]"))
    with Joined(parts) as joined, tarfile.open(fileobj=joined, mode="r|xz") as archive:
        archive.extractall(target, filter="data")
    libraries = [
        str(found)
        for packages in site.getsitepackages()
        for found in sorted(Path(packages).glob("nvidia/*/lib"))
    ]
    lines = [
        f"export PYTHONPATH={target / 'site'}",
        f"export LD_LIBRARY_PATH={':'.join(libraries)}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}",
        f"cd {target / 'repo'}",
    ]
    (target / "env.sh").write_text("\n".join(lines) + "\n")
    print(f"unpacked {len(parts)} parts; now: source {target / 'env.sh'}")


class Joined(io.RawIOBase):
    """The parts one after the other."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in parts]

    def read(self, size: int = -1) -> bytes:
        """Some bytes, fewer at the end of a part."""
        for file in self._files:
            if data := file.read(size):
                return data
        return b""

    def close(self) -> None:
        """Close all of them."""
        for file in self._files:
            file.close()
        super().close()


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="at the desk")
    packing.add_argument("out", type=Path)
    packing.add_argument(
        "--arch", default="90", help="compute capability without its point, or all"
    )
    packing.add_argument("--python", default="3.12", help="the host's")
    packing.add_argument("--part-mib", type=int, default=50)
    unpacking = commands.add_parser("unpack", help="on the host")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "unpack":
        unpack(arguments.folder, arguments.target.resolve())
        return
    arch = None if arguments.arch == "all" else int(arguments.arch)
    pack(arguments.out, arch, arguments.python, arguments.part_mib)


if __name__ == "__main__":
    main()
