"""A visit to a GPU as tests/benchmarks/GPU.md tells it, on the stand-in, each step timed.

    python -m tests.gpu_standin.rehearsal WORK --host PYTHON --out ROWS.jsonl [--deadline 480]

The desk is this environment, with onnxruntime-gpu[cuda,cudnn]. The host is PYTHON of an environment
like that of a GPU host: torch for the same CUDA, torchvision, onnx, NumPy, click, tqdm, and the
CPU's onnxruntime, which is put aside. Uploads are copies within this machine: their sizes are told.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.engines.common import fault
from tests.gpu_standin.machine import Machine, built_machine
from tests.gpu_standin.test_jobs import ANY_ANSWER

ARCH, PYTHON = "90", "3.12"
VISIT = """. {visit}/env.sh
export LD_LIBRARY_PATH={libraries}:"$LD_LIBRARY_PATH" PYTHONPATH={fault}:"$PYTHONPATH"
exec "$@"
"""
"""In a shell on the host. The stand-in's libraries go before torch's, and any answer is taken for
right, as its answers are zeros."""


def rehearse(work: Path, host: Path, out: Path, deadline: float) -> None:
    """All steps; their rows, and then the visit's, are appended to `out`."""
    machine = built_machine(work / "machine")
    kit, uploaded, visit = work / "kit", work / "uploaded", work / "visit"
    with timed(out, "packing") as row:
        called(sys.executable, "-m", "tests.benchmarks.gpu_kit", "pack", kit, "--arch", ARCH,
               "--python", PYTHON)  # fmt: skip
        row["mib"] = [round(one.stat().st_size / 2**20, 2) for one in sorted(kit.iterdir())]
    shutil.copytree(kit, uploaded)
    with timed(out, "putting the host's onnxruntime aside"):
        called(host, "-m", "pip", "uninstall", "-q", "-y", "onnxruntime")
    with timed(out, "unpacking"):
        called(host, uploaded / "gpu_kit.py", "unpack", uploaded, visit)
    with timed(out, "the visit") as row:
        fault(work, ANY_ANSWER, "batchclf.*")
        found = ":".join(map(str, libraries(machine)))
        shell = VISIT.format(visit=visit, libraries=found, fault=work / "fault")
        command = (host, "-m", "tests.benchmarks.gpu", "--out", out, "--deadline", deadline)
        bare = {"PATH": os.environ["PATH"], "HOME": str(work)}
        called("bash", "-c", shell, "bash", *command, env=bare)
        row["kib_home"] = round(out.stat().st_size / 1024, 1)


def libraries(machine: Machine) -> list[Path]:
    """The folders of the stand-in's."""
    (site,) = machine.python.parent.parent.glob("lib/python*/site-packages")
    return [Path(machine.env["LD_LIBRARY_PATH"]), *sorted(site.glob("nvidia/*/lib"))]


@contextmanager
def timed(out: Path, name: str) -> Iterator[dict[str, Any]]:
    """Append a row with the seconds that the block takes, and what it puts into the row."""
    row: dict[str, Any] = {"step": "kit", "name": name}
    started = time.monotonic()
    yield row
    row["seconds"] = round(time.monotonic() - started, 1)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def called(*command: object, env: Mapping[str, str] | None = None) -> None:
    """A command, to its end.

    Raises:
        CalledProcessError: it fails.
    """
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=env)


def main() -> None:
    """Rehearse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a new folder")
    parser.add_argument("--host", type=Path, required=True, help="the host's Python")
    parser.add_argument("--out", type=Path, required=True, help="the file to append rows to")
    parser.add_argument("--deadline", type=float, default=480.0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    work, out = arguments.work.resolve(), arguments.out.resolve()
    rehearse(work, arguments.host.absolute(), out, arguments.deadline)


if __name__ == "__main__":
    main()
