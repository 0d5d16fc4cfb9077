"""Random sizes, windows, filters and contents through _resize.c and through Pillow: no difference.

    python -m tests.images.resize_fuzz [--count 20000 | --seconds 600] [--seed 1] [--sanitize]

Every case goes through all instruction sets of this CPU. `--sanitize` compiles the code anew, with
gcc's AddressSanitizer and UndefinedBehaviorSanitizer, and runs the cases on that. Ends with 1 where
a case differs, which it prints.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
from PIL import Image

from batchclf.images.resize import goes_tall_first
from batchclf.results.records import Interpolation, Pixels
from tests.conftest import ROOT

SOURCES = sorted((ROOT / "batchclf" / "images").glob("_resize*.c"))
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
GUARD = 251
"""What surrounds the place of the result, and has to stay."""
LONGEST = 65_500
"""Of a JPEG's edges."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked for."""

    source_size: tuple[int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    corner: tuple[int, int]
    window: tuple[int, int]
    interpolation: Interpolation
    content: str
    seed: int


CONTENTS = ("noise", "white", "checkerboard", "stripes", "ramp")
"""White, and the extremes that negative lobes make larger, are where sums are largest."""


def drawn(rng: np.random.Generator) -> Case:
    """A random case; one in twenty is a strip as long as a JPEG can be."""

    def edge(most: int) -> int:
        return int(most ** rng.random())

    width, height = edge(400), edge(400)
    if rng.random() < 0.05:
        width, height = (LONGEST, edge(4)) if rng.random() < 0.5 else (edge(4), LONGEST)
    size = edge(400), edge(400)
    box = (0.0, 0.0, float(width), float(height))
    if rng.random() < 0.3:
        (left, right), (top, bottom) = (np.sort(rng.random(2)) * one for one in (width, height))
        box = (left, top, max(right, left + 1e-3 * width), max(bottom, top + 1e-3 * height))
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
    elif rng.random() < 0.2:
        size = (width if width <= 400 else size[0], height if height <= 400 else size[1])
    corner = int(rng.integers(size[0])), int(rng.integers(size[1]))
    window = (
        int(rng.integers(1, size[0] - corner[0] + 1)),
        int(rng.integers(1, size[1] - corner[1] + 1)),
    )
    interpolation = get_args(Interpolation)[rng.integers(4)]
    content = CONTENTS[rng.integers(len(CONTENTS))]
    seed = int(rng.integers(2**32))
    return Case((width, height), box, size, corner, window, interpolation, content, seed)


def content_of(case: Case) -> Pixels:
    """The source, of shape (rows, columns, 3)."""
    width, height = case.source_size
    rng = np.random.default_rng(case.seed)
    if case.content == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if case.content == "white":
        return np.full((height, width, 3), 255, np.uint8)
    rows, columns, colours = np.ogrid[:height, :width, :3]
    period = int(rng.integers(1, 6))
    found = {
        "checkerboard": (rows // period + columns // period + colours) % 2 * 255,
        "stripes": columns // period % 2 * 255 + 0 * rows + 0 * colours,
        "ramp": 3 * rows + 7 * columns + 50 * colours,
    }
    pixels_HWC: Pixels = (found[case.content] % 256).astype(np.uint8)
    return pixels_HWC


def by_pillow(case: Case, source_HWC: Pixels) -> Pixels:
    """The window of a full resize."""
    resampling = Image.Resampling[case.interpolation.upper()]
    resized = Image.fromarray(source_HWC).resize(case.size, resampling, case.box)
    (left, top), (width, height) = case.corner, case.window
    return np.asarray(resized)[top : top + height, left : left + width]


def by_code(resize: ModuleType, case: Case, source_HWC: Pixels, instructions: str) -> Pixels:
    """The same by _resize.c, from rows that lie apart, into a place with others around it."""
    height, width, _ = source_HWC.shape
    apart_HWC = np.empty((height, width + 1, 3), np.uint8)[:, :width]
    apart_HWC[:] = source_HWC
    around_HWC = np.full((case.window[1] + 2, case.window[0] + 2, 3), GUARD, np.uint8)
    resize.resize_into(
        *(around_HWC[1:-1, 1:-1], apart_HWC, case.box, case.size, case.corner),
        *(case.interpolation, goes_tall_first(), instructions),
    )
    inner_HWC = around_HWC[1:-1, 1:-1].copy()
    around_HWC[1:-1, 1:-1] = GUARD
    assert (around_HWC == GUARD).all(), f"{instructions} writes beyond its place: {case}"
    return inner_HWC


def check(resize: ModuleType, case: Case) -> None:
    """Compare all instruction sets with Pillow.

    Raises:
        AssertionError: one differs.
    """
    source_HWC = content_of(case)
    expected_HWC = by_pillow(case, source_HWC)
    for instructions in resize.INSTRUCTIONS:
        found_HWC = by_code(resize, case, source_HWC, instructions)
        assert np.array_equal(found_HWC, expected_HWC), f"{instructions} differs: {case}"


def run(resize: ModuleType, seed: int, count: int, seconds: float) -> int:
    """Check so many cases, or for so long; how many there were."""
    rng = np.random.default_rng(seed)
    ends_at = time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > ends_at:
            return number
        check(resize, drawn(rng))
    return count


def sanitized(folder: Path, cc: str) -> Path:
    """The extension, compiled with what finds errors of memory and undefined behaviour."""
    library = folder / "_resize.so"
    include = sysconfig.get_path("include")
    options = ["-g", "-O1", "-shared", "-fPIC", *SANITIZERS.split(), f"-I{include}"]
    subprocess.run([cc, *options, "-o", str(library), *map(str, SOURCES), "-lm"], check=True)
    return library


def run_sanitized(arguments: list[str], cc: str = "gcc") -> int:
    """This program on the sanitized code, in a process that has its runtime; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        library = sanitized(Path(folder), cc)
        runtime = [
            subprocess.check_output([cc, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        # Python itself leaks, and is not the one that is looked at.
        env = {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-m", __spec__.name, *arguments, "--library", str(library)]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONMALLOC": "malloc", **env}, check=False
        ).returncode


def loaded(library: Path | None) -> ModuleType:
    """The module as it is installed, or as it was compiled here."""
    if library is None:
        from batchclf.images import _resize

        return _resize
    spec = importlib.util.spec_from_file_location("_resize", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run and print how many cases there were."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sanitize:
        sys.exit(run_sanitized([one for one in sys.argv[1:] if one != "--sanitize"]))
    resize = loaded(arguments.library)
    number = run(resize, arguments.seed, arguments.count, arguments.seconds)
    print(f"{number:,} cases, each by {', '.join(resize.INSTRUCTIONS)}: no difference")


if __name__ == "__main__":
    main()
