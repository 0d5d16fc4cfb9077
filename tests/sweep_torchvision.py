"""Export every torchvision classification model, and say which give PyTorch's answers.

    python tests/sweep_torchvision.py --results sweep.jsonl --output batchclf/models/TORCHVISION.md

Each model is built with random weights and exported in a process of its own, so that its memory is
returned; the largest need 16 GB. Results are appended to --results, and a sweep that was stopped
goes on from there. All 80 models take about an hour on one core. The table holds, per model, the
largest difference between ONNX Runtime's logits and PyTorch's over three images, relative to the
largest logit, and the tightest of `LADDER` within which all logits lie.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 1800
BATCH_SIZE = 4
LADDER = ((1e-5, 1e-5), (1e-4, 1e-5), (1e-3, 1e-4))
"""(rtol, atol) from tight to loose; atol is for logits of order 1 and grows with the largest."""
LAST = ("regnet_y_128gf", "vit_h_14")
"""Larger than 2 GB: their weights lie in a second file."""


def measure(name: str) -> dict[str, Any]:
    """Export one model in this process and compare it with PyTorch."""
    import numpy as np
    import torch

    from batchclf.errors import ModelError
    from batchclf.models.checks import sample_pixels, tiled
    from batchclf.models.export import build_torchvision, export_torchvision
    from batchclf.runtime.classifier import open_reference

    result: dict[str, Any] = {"name": name}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model = build_torchvision(
                name, weights="none", weights_path=None, num_classes=None, overrides=None
            )
            export_torchvision(model, folder, batch_size=BATCH_SIZE, open_reference=open_reference)
        except ModelError as error:
            return result | {"error": str(error).splitlines()[0]}
        result["export_s"] = round(time.perf_counter() - started, 1)
        result["mb"] = round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1)
        pixels_NHWC = sample_pixels(*model.preprocess.crop)
        mean_C = torch.tensor(model.preprocess.mean).view(3, 1, 1)
        std_C = torch.tensor(model.preprocess.std).view(3, 1, 1)
        images_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            expected_NK = model.module((images_NCHW - mean_C) / std_C).numpy()
        found_NK = open_reference(folder / "model.onnx")(tiled(pixels_NHWC, 3))
        difference_NK = np.abs(found_NK - tiled(expected_NK, 3))
        largest = float(np.abs(expected_NK).max())
        scale = max(1.0, largest)
        result["relative"] = float(difference_NK.max()) / largest
        for rtol, atol in LADDER:
            if np.allclose(found_NK, tiled(expected_NK, 3), rtol=rtol, atol=atol * scale):
                return result | {"rtol": rtol, "atol": atol}
    return result


def sweep(names: list[str], results: Path) -> None:
    """Measure each model that `results` does not hold yet, and append what comes out."""
    seen = {json.loads(line)["name"] for line in results.open()} if results.exists() else set()
    for name in names:
        if name in seen:
            continue
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", name],
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT_S,
                check=False,
            )
            lines = done.stdout.splitlines()
            line = (
                lines[-1]
                if done.returncode == 0 and lines
                else json.dumps({"name": name, "error": f"exit code {done.returncode}"})
            )
        except subprocess.TimeoutExpired:
            line = json.dumps({"name": name, "error": f"not done after {TIME_LIMIT_S} s"})
        print(line, flush=True)
        with results.open("a") as file:
            file.write(f"{line}\n")


def table(results: Path) -> str:
    """The markdown page."""
    rows = sorted((json.loads(line) for line in results.open()), key=lambda row: str(row["name"]))
    num_good = sum("rtol" in row for row in rows)
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
    lines = [
        "# torchvision classification models, exported",
        "",
        f"{num_good} of {len(rows)} models export with a dynamic batch and give PyTorch's logits "
        f"at batch sizes 1, 2, 3 and {BATCH_SIZE} (random weights, CPU).",
        "",
        f"Measured on {datetime.now(UTC):%Y-%m-%d} with "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + ". Made by `python tests/sweep_torchvision.py`, which says what the columns are. "
        "A model that does not match is refused at export, so no job runs with wrong numbers.",
        "",
        "| model | matches within | largest difference / largest logit | MB | export s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | refused: {row['error']} | | | |")
            continue
        within = f"rtol {row['rtol']:.0e}, atol {row['atol']:.0e}" if "rtol" in row else "none"
        figures = f"{row['relative']:.1e} | {row['mb']} | {row['export_s']}"
        lines.append(f"| {row['name']} | {within} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--output", type=Path, help="write the table here")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    from torchvision import models

    names = arguments.only or sorted(
        models.list_models(module=models), key=lambda name: (name in LAST, name)
    )
    sweep(names, arguments.results)
    if arguments.output:
        arguments.output.write_text(table(arguments.results))


if __name__ == "__main__":
    main()
