"""The rules of the house: which room imports what, and what is not imported before it is needed."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchclf.images.archives import MODULES as MODULES_OF_KINDS
from tests.conftest import ROOT
from tests.tiny import run_here, write_tiny_job

PACKAGE = ROOT / "batchclf"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    ("errors",),
    ("system",),
    ("spec",),
    ("images", "models", "runtime", "results"),
    ("sessions",),
    ("run",),
    ("scoring",),
    ("engines", "commands", "tuning"),
    ("cli",),
    ("__main__",),
)
"""The rooms of the package, from the ground up: each imports only what lies on floors below it."""
ROOMS = [room for floor in FLOORS for room in floor]
SHARED = ("batchclf", "batchclf.results.records")
"""What every room may import: the version, and the words that pass between rooms."""
OUTSIDE = {
    "torch": (
        *("models/export.py", "models/checkpoints.py", "models/matching.py", "models/states.py"),
        "models/zoo/",
    ),
    "torchvision": ("models/zoo/torchvision.py", "models/zoo/hf_processor.py"),
    "timm": ("models/zoo/timm.py",),
    "transformers": ("models/zoo/hf.py", "models/zoo/hf_processor.py"),
    "huggingface_hub": ("models/zoo/",),
    "onnx": (
        *("models/onnx_file.py", "models/onnx_input.py", "models/onnx_load.py"),
        *("models/onnx_ends.py", "models/onnx_scores.py", "models/graph.py"),
        *("models/equalize.py", "models/first_layer.py", "models/calibration.py"),
        "models/sensitivity.py",
        *("models/quantize.py", "models/half.py"),
    ),
    "onnxruntime": ("runtime/", "models/calibration.py", "models/quantize.py", "models/half.py"),
    "openvino": ("runtime/native_openvino.py",),
    "PIL": ("images/",),
    "simplejpeg": ("images/jpeg.py",),
    "pillow_heif": ("images/foreign.py",),
    "pillow_jxl": ("images/foreign.py",),
    "rawpy": ("images/foreign.py",),
    "urllib3": ("images/web.py",),
    "matplotlib": ("tuning/plot.py", "commands/report/charts.py"),
    "jinja2": ("commands/report/page.py",),
    "prometheus_client": ("cli/metrics.py",),
    "pynvml": ("cli/metrics.py",),
    "yaml": ("spec/file.py",),
    "ruamel": ("spec/edit.py",),
    "click": ("cli/",),
    "tqdm": ("cli/progress.py", "engines/display.py"),
    "pydantic": ("spec/", "models/bundle.py", "results/identity.py", "results/run_record.py"),
    "obstore": ("system/bucket.py", "images/buckets.py"),
    "pyarrow": ("images/archives/parquet_file.py", "commands/convert/parquet.py"),
    "psutil": (),
    "ray": ("engines/ray/",),
}
"""Each outside part, and where it may be imported."""


def imports_of(module: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, those inside functions as well: (line, dotted name)."""
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                submodule = ROOT.joinpath(*name.split("."), f"{alias.name}.py")
                folder = ROOT.joinpath(*name.split("."), alias.name, "__init__.py")
                is_module = submodule.exists() or folder.exists()
                yield node.lineno, f"{name}.{alias.name}" if is_module else name


def where(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_is_in_a_room_and_every_room_is_there() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_on_floors_below(room: str) -> None:
    (floor,) = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    below = {one for rooms in FLOORS[:floor] for one in rooms}
    astray = [
        f"{where(module)}:{line} imports {name}"
        for module in MODULES
        if room_of(module) == room
        for line, name in imports_of(module)
        if name.split(".")[0] == "batchclf" and name not in SHARED
        if name.split(".")[1] not in {room, *below}
    ]
    assert astray == []


def test_the_map_in_the_guide_is_what_the_rooms_say_of_themselves() -> None:
    guide = (ROOT / "docs" / "contributing.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)/` \| (.+) \|$", guide, re.M))
    said = {
        folder.parent.name: (ast.get_docstring(ast.parse(folder.read_bytes())) or "").split("\n")[0]
        for folder in PACKAGE.glob("*/__init__.py")
    }
    assert told == said


def test_no_signature_loses_its_types_in_an_ellipsis() -> None:
    """`Callable[..., X]` accepts whatever is called wrongly; a TypeVar's bound is no signature."""
    astray = [
        f"{where(module)}:{number} {line.strip()}"
        for module in MODULES
        for number, line in enumerate(module.read_text().splitlines(), start=1)
        if "Callable[..." in line and "TypeVar" not in line
    ]
    assert astray == []


@pytest.mark.parametrize("part", OUTSIDE)
def test_an_outside_part_is_imported_in_its_own_room_only(part: str) -> None:
    astray = [
        f"{where(module)}:{line} imports {name}"
        for module in MODULES
        if not where(module).startswith(OUTSIDE[part])
        for line, name in imports_of(module)
        if name.split(".")[0] == part
    ]
    assert astray == []


def test_the_room_of_each_outside_part_really_imports_it() -> None:
    seen = {name.split(".")[0] for module in MODULES for _, name in imports_of(module)}
    assert {part for part, rooms in OUTSIDE.items() if rooms} <= seen


@pytest.mark.parametrize("module", MODULES, ids=where)
def test_every_module_and_every_public_name_has_a_docstring(module: Path) -> None:
    tree = ast.parse(module.read_bytes())
    bare = []
    if ast.get_docstring(tree) is None and module.stat().st_size:
        bare.append(where(module))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            bare.append(f"{where(module)}:{node.lineno} {node.name}")
    assert bare == []


# ---- what a process imports ----------------------------------------------------------------------


def imported_by(*arguments: str) -> set[str]:
    """The top-level packages in a process that ran `batchclf` with these arguments."""
    program = (
        "import json, sys\n"
        "from batchclf.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:], prog_name='batchclf')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print()\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    return set(json.loads(_ran("-c", program, *arguments).stdout.splitlines()[-1]))


def imported_by_all(*arguments: str) -> set[str]:
    """All modules, and packages, of that process and of those that it started."""
    said = _ran("-m", "batchclf", *arguments, PYTHONPROFILEIMPORTTIME="1").stderr
    return set(re.findall(r"^import time:.*\| +(\S+)$", said, re.M))


def _ran(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("run", "--help"), ("tune", "--help")]
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    heavy = {"numpy", "pydantic", "PIL", "torch", "torchvision", "onnx", "onnxruntime", "yaml"}
    assert imported_by(*arguments) & heavy == set()


def test_a_run_from_a_cached_bundle_imports_no_torch_and_no_onnx(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    run_here(job)
    found = imported_by_all("run", str(job), "--overwrite", "--limit", "3")
    assert {"numpy", "PIL", "onnxruntime"} <= found
    assert found & {"torch", "torchvision", "timm", "transformers", "huggingface_hub"} == set()
    assert found & {"onnx", "onnxscript", "safetensors", "ray"} == set()
    assert found & {"pillow_heif", "pillow_jxl", "rawpy"} == set()
    assert found & {"obstore", "urllib3", "jinja2", "matplotlib", "prometheus_client"} == set()
    assert "filelock" not in found
    readers = {f"batchclf.images.archives.{name}" for name in (*MODULES_OF_KINDS.values(), "index")}
    assert found & readers == set()


def test_the_process_that_watches_a_run_stays_small(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    found = imported_by("run", str(job), "--limit", "3")
    assert found & {"PIL", "onnxruntime", "simplejpeg", "torch", "onnx"} == set()
