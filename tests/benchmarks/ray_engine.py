"""What engine ray costs on one node, beside the local engine and what one would run instead.

    python -m tests.benchmarks.ray_engine --images PHOTOS [--num-images 4000] [--repeats 3] \\
        [--model tiny | mobilenet_v2=FILE.pth] [--peers NAME.py ...] [--one-bad-in 100]

Contestants take turns over the same folder. Ours are the same job with engine local and with
engine ray on a cluster of this machine; their rates are those of their summaries, start-up apart.
Peers are scripts, `NAME.py IMAGES MODEL.onnx OUT [BATCH]`, timed from outside. With --one-bad-in
each so many-th image is cut short. Prints medians, the share of the local engine's rate and the
rows written, and the same as one JSON object in the last line.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import parquet

from batchclf.system.machine import cpu_name_and_flags, usable_cores
from tests.benchmarks.throughput import export_plain
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


def peer(script: Path, images: Path, model: Path, out: Path, batch_size: int) -> tuple[float, str]:
    """Run a peer; the seconds that it took, and what it wrote."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, images, model, out, str(batch_size)],
        check=False,
        stdout=subprocess.DEVNULL,
        env={**USERS_ENVIRONMENT, **QUICK},
    )
    seconds = time.perf_counter() - began
    how = f", then exit code {done.returncode}" if done.returncode else ""
    return seconds, f"{num_rows(out):,} rows{how}"


def num_rows(out: Path) -> int:
    """Records in what a contestant wrote, of whatever format."""
    lines = sum(path.read_bytes().count(b"\n") for path in out.rglob("*.json*"))
    return lines + sum(int(parquet.read_metadata(one).num_rows) for one in out.rglob("*.parquet"))


def cut_short(images: Path, one_in: int) -> None:
    """Each so many-th image becomes its own first half."""
    for path in sorted(images.iterdir())[one_in - 1 :: one_in]:
        content = path.read_bytes()
        path.unlink()  # it is a link: the original stays
        path.write_bytes(content[: len(content) // 2])


def main() -> None:
    """Take turns, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ray_engine")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--peers", type=Path, nargs="*", default=[])
    parser.add_argument("--one-bad-in", type=int)
    asked = parser.parse_args()
    rates: defaultdict[str, list[float]] = defaultdict(list)
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images = link_images(asked.images, folder / "images", asked.num_images)
        if asked.one_bad_in:
            cut_short(images, asked.one_bad_in)
        model = model_of(asked.model, folder)
        onnx = plain_model(asked.model, model, folder)
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
                rows[f"{engine}, from outside"] = f"{found['num_images']:,} rows"
            for script in asked.peers:
                seconds, wrote = peer(script, images, onnx, folder / "peer", asked.batch_size)
                rates[f"{script.stem}, from outside"].append(asked.num_images / seconds)
                rows[f"{script.stem}, from outside"] = wrote
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    for name, rate in medians.items():
        share = rate / medians["local"]
        print(f"{name:32} {rate:10,.1f} images/s  {share:6.3f} of local  {rows.get(name, '')}")
    machine = {"cpu": cpu_name_and_flags()[0], "usable_cores": usable_cores()}
    figures = {"images_per_s": medians, "rows": rows, "all": rates}
    when = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine}
    print(json.dumps({**when, **vars(asked), **figures}, default=str))


def plain_model(asked: str, model: dict[str, Any], folder: Path) -> Path:
    """The model as peers take it: float pixels NCHW to logits."""
    if asked == "tiny":
        return Path(model["onnx"])
    export_plain(model["name"], model["weights"], folder / "plain.onnx")
    return folder / "plain.onnx"


if __name__ == "__main__":
    main()
