"""What engine ray costs on one node, beside the local engine and what one would run instead.

    python -m tests.benchmarks.ray_engine --images PHOTOS [--num-images 4000] [--repeats 3] \\
        [--model tiny | mobilenet_v2=FILE.pth] [--peers FOLDER]

Contestants take turns over the same folder. Ours are the same job with engine local and with
engine ray on a cluster of this machine; their rates are those of their summaries, start-up apart.
Peers are scripts, `NAME.py IMAGES MODEL.onnx OUT [BATCH]`, timed from outside. Prints medians, the
share of the local engine's rate, and the same as one JSON object in the last line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from batchclf.models.resolve import resolve_model
from batchclf.runtime.classifier import open_reference
from batchclf.spec.file import load_job
from tests.conftest import USERS_ENVIRONMENT, command
from tests.engines.ray.cluster import QUICK
from tests.links import link_images
from tests.tiny import tiny_model, write_tiny_job

ENGINES: dict[str, Any] = {
    "local": {"name": "local"},
    "ray": {"name": "ray", "address": "local"},
}


def model_of(asked: str, folder: Path) -> dict[str, Any]:
    """The `model` of a job file."""
    if asked == "tiny":
        return tiny_model(folder, resize=256, crop=224)
    name, _, weights = asked.partition("=")
    return {"name": name, "weights": weights or "none"}


def ran(job: Path, out: Path) -> dict[str, Any]:
    """Run a job; its summary, and the seconds that it took from outside."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        command("run", job, "--json"),
        capture_output=True,
        text=True,
        env={**USERS_ENVIRONMENT, **QUICK, "BATCHCLF_CACHE_DIR": str(job.parent / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**summary, "from_outside_s": time.perf_counter() - began}


def peer(script: Path, images: Path, model: Path, out: Path, batch_size: int) -> float:
    """Run a peer; the seconds that it took."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, script, images, model, out, str(batch_size)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**USERS_ENVIRONMENT, **QUICK},
    )
    return time.perf_counter() - began


def main() -> None:
    """Take turns, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ray_engine")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--peers", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    rates: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images = link_images(asked.images, folder / "images", asked.num_images)
        model = model_of(asked.model, folder)
        keys: dict[str, Any] = {
            "input": str(images),
            "model": model,
            "batch_size": asked.batch_size,
        }
        jobs = {
            name: write_tiny_job(
                folder, name=f"{name}.yaml", output=str(folder / name), engine=engine, **keys
            )
            for name, engine in ENGINES.items()
        }
        ran(jobs["local"], folder / "local")  # what is kept from now on, is made
        for _ in range(asked.repeats):
            for engine, job in jobs.items():
                found = ran(job, folder / engine)
                rates[engine].append(found["images_per_s"])
                rates[f"{engine}, from outside"].append(asked.num_images / found["from_outside_s"])
            for script in asked.peers:
                onnx = onnx_of(jobs["local"])
                seconds = peer(script, images, onnx, folder / "peer", asked.batch_size)
                rates[f"{script.stem}, from outside"].append(asked.num_images / seconds)
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"{name:32} {rate:10,.1f} images/s  {rate / medians['local']:6.3f} of local")
    print(json.dumps({**vars(asked), "images_per_s": medians, "all": rates}, default=str))


def onnx_of(job: Path) -> Path:
    """The model file that a job runs, for peers that take such pixels."""
    os.environ["BATCHCLF_CACHE_DIR"] = str(job.parent / "cache")
    spec = load_job(job)
    if spec.model.onnx is not None:
        return spec.model.onnx
    found = resolve_model(
        spec.model, batch_size=spec.batch_size, open_reference=open_reference, log=print
    )
    return found.bundle.model_path


if __name__ == "__main__":
    main()
