"""Images per second of whole jobs, beside what one would run instead, in one run.

    python -m tests.benchmarks.throughput --images PHOTOS [--peers FOLDER] [--num-images 1000] \\
        [--batch-size 64] [--model mobilenet_v2=FILE.pth] [--model resnet50=none] \\
        [--python cpu=PYTHON --python openvino=PYTHON] [--repeats 3] [--out FILE.json]

Every contestant is a process of its own over the same folder of JPEGs and the same weights, timed
from outside, start-up included; the contestants take turns, so that a slow moment of the machine
meets them all. Ours are all precisions of the providers that open in the environments named by
--python. Peers are scripts in a folder: `NAME.py IMAGES MODEL.onnx OUT [ARGUMENTS]`.

A job's limit is cores / (CPU seconds per image of decoding alone + of inference alone), both
measured with all cores busy, between the same rounds as the job; its efficiency is the rate of the
job, start-up apart, over that. Peak memory is the proportional set size of all of a contestant's
processes. Prints a table (medians) and, as the last line, the same as JSON.
"""

import argparse
import ctypes
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from batchclf.images.load import loader_of
from batchclf.images.source import Source, source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import open_eager, resolve_model
from batchclf.results.records import ImageRef
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.providers import PROVIDERS
from batchclf.spec.file import load_job
from batchclf.system.machine import cpu_name_and_flags, usable_cores
from tests.conftest import USERS_ENVIRONMENT
from tests.links import link_images

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 0.5
PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans among our descendants become our children, so that their time is counted."""
Top1 = Mapping[str, int]
"""Class index by file name."""
COLUMNS = (
    *("model", "contestant", "images_per_s", "speed", "cpu_ms_per_image", "peak_mb"),
    *("top1_agreement", "limit_images_per_s", "efficiency"),
)
WIDTHS = {"model": 14, "contestant": 28, "images_per_s": 12, "speed": 7, "peak_mb": 8}


def log(text: str) -> None:
    """A line of progress on stderr."""
    print(f"throughput: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to classify the folder: a command, and how to read the classes it found."""

    name: str
    command: Sequence[str]
    read: Callable[[Path], Top1] | None
    """From its output to the classes; None: it has other weights than ours."""
    out: Path
    limit: Sequence[str] = ()
    """The command that prints the limit of a job of ours."""
    is_fp32: bool = True


@dataclass(slots=True)
class Figures:
    """What was measured of one contestant, one entry per round."""

    images_per_s: list[float] = field(default_factory=list)
    cpu_ms_per_image: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    efficiencies: list[float] = field(default_factory=list)
    limit_parts: dict[str, float] = field(default_factory=dict)


# ---- timing a tree of processes ------------------------------------------------------------------


def time_tree(command: Sequence[str], log_file: Path) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds and peak MB of a command with all its descendants; its stdout.

    Raises:
        SystemExit: it failed.
    """
    peak_mb = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            peak_mb[0] = max(peak_mb[0], _tree_mb())

    before = _children_cpu_s()
    watcher = threading.Thread(target=watch)
    started = time.perf_counter()
    with log_file.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=USERS_ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors
        )
        watcher.start()
        stdout = process.communicate()[0].decode()
        wall_s = time.perf_counter() - started
        ended.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}: {log_file.read_text()}")
    _reap_orphans()
    return wall_s, _children_cpu_s() - before, peak_mb[0], stdout


def _tree_mb() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / 2**20


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _reap_orphans() -> None:
    """Wait for what the command left running, so that its CPU time is known, or end it."""
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)
    with suppress(ChildProcessError):  # those that became our children while they were waited for
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# ---- our own jobs --------------------------------------------------------------------------------


def our_jobs(
    arguments: argparse.Namespace, model: str, weights: str, work: Path, left_out: dict[str, str]
) -> list[Contestant]:
    """A job for each provider that opens in an environment of ours, at each of its precisions.

    `left_out` is told why one does not run here.
    """
    found = []
    for name, python in arguments.python:
        for precision in PROVIDERS[name].precisions:
            title = f"batchclf {name} {precision}"
            job = work / f"{model}-{name}-{precision}.yaml"
            out = work / f"{model}-{name}-{precision}"
            job.write_text(
                json.dumps(
                    {
                        "input": str(work / "images"),
                        "output": str(out),
                        "model": {"name": model, "weights": weights},
                        "provider": name,
                        "precision": precision,
                        "batch_size": arguments.batch_size,
                        "min_agreement": 0.0,  # random weights tell classes apart by a hair
                    }
                )
            )
            run = [python, "-m", "batchclf", "run", str(job), "--overwrite", "--json"]
            limit = [python, "-m", "tests.benchmarks.limit", str(job)]
            tried = subprocess.run(  # fills the model cache as well
                run, cwd=ROOT, env=USERS_ENVIRONMENT, capture_output=True, text=True, check=False
            )
            if tried.returncode:
                left_out[title] = tried.stderr.strip().splitlines()[-1]
                log(f"{title}: left out: {left_out[title]}")
                continue
            found.append(Contestant(title, run, _our_top1, out, limit, precision == "fp32"))
    return found


def _our_top1(out: Path) -> Top1:
    lines = (out / "predictions.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    return {one["path"]: one["predictions"][0]["index"] for one in records}


# ---- peers ---------------------------------------------------------------------------------------


def peers(arguments: argparse.Namespace, model: str, weights: str, work: Path) -> list[Contestant]:
    """The scripts of the peers' folder, some with several settings."""
    if arguments.peers is None:
        return []
    onnx_file = work / f"{model}.onnx"
    export_plain(model, weights, onnx_file)
    found: list[Contestant] = []
    for title, script, extra, read in (
        ("tutorial loop", "seed_loop", [], _top1_of_lines),
        ("DataLoader + ONNX Runtime", "dataloader_ort", [], _top1_of_lines),
        ("OpenVINO async f32, batch 1", "openvino_async", ["f32", "1"], _top1_of_lines),
        ("OpenVINO async f32, batch 8", "openvino_async", ["f32", "8"], _top1_of_lines),
        ("OpenVINO async bf16", "openvino_async", ["bf16", "1"], _top1_of_lines),
        ("Ray Data", "ray_data_ort", [], _top1_of_ray),
        ("Hugging Face pipeline", "hf_pipeline", [], None),
        ("timm's inference.py", "timm_inference", [model], None),
    ):
        path = arguments.peers / f"{script}.py"
        out = work / f"{model}-peer-{len(found)}"
        if not path.exists() or (script == "hf_pipeline" and model != "resnet50"):
            continue
        given = [str(work / "images"), *([] if read is None else [str(onnx_file)]), str(out)]
        command = [arguments.peer_python, str(path), *given, *extra]
        found.append(Contestant(title, command, read, out, is_fp32="bf16" not in extra))
    return found


def export_plain(model: str, weights: str, path: Path) -> None:
    """The model as its own exporter writes it: float pixels NCHW to logits, dynamic batch."""
    import torch
    import torchvision

    module = getattr(torchvision.models, model)(weights=None)
    module.load_state_dict(torch.load(weights, weights_only=True))
    pixels_NCHW = torch.zeros(2, 3, 224, 224)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        module.eval(),
        (pixels_NCHW,),
        path,
        dynamic_shapes=dynamic,
        external_data=False,
        verbose=False,
    )


def _top1_of_lines(out: Path) -> Top1:
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    return {Path(one["path"]).name: one["top5"][0][0] for one in records}


def _top1_of_ray(out: Path) -> Top1:
    lines = [line for path in out.glob("*.json") for line in path.read_bytes().splitlines()]
    records = [json.loads(line) for line in lines]
    return {Path(one["path"]).name: one["index"][0] for one in records}


# ---- what is right, and the rounds ---------------------------------------------------------------


def weights_file(model: str, weights: str, work: Path) -> str:
    """The weights as a file that every contestant can read; `none`: random ones."""
    if weights != "none":
        return str(Path(weights).resolve())
    import torch
    import torchvision

    torch.manual_seed(0)
    path = work / f"{model}.pth"
    torch.save(getattr(torchvision.models, model)(weights=None).state_dict(), path)
    return str(path)


def pytorch_top1(job_file: Path) -> Top1:
    """The classes that PyTorch finds in the images of a job, by name; links are inferred once."""
    job = load_job(job_file)
    model = resolve_model(job.model, batch_size=1, open_reference=open_reference, log=log)
    run = open_eager(job.model, usable_cores(), print)
    if isinstance(run, str):
        sys.exit(run)
    source = source_of(job)
    load = loader_of(job, source, model.preprocess)
    slot_NHWC = np.zeros((1, *model.preprocess.crop, 3), np.uint8)
    by_file: dict[int, int] = {}
    found: dict[str, int] = {}
    assert isinstance(source, Source)
    for index, (path, _) in enumerate(open_store(source).entries()):
        inode = os.stat(os.path.join(source.root, path)).st_ino
        if inode not in by_file:
            load(ImageRef(index, path), slot_NHWC[0])
            by_file[inode] = int(run(slot_NHWC).argmax())
        found[os.fsdecode(path)] = by_file[inode]
    return found


def measure(one: Contestant, num_images: int, figures: Figures, work: Path) -> None:
    """One round of one contestant; an output left by an earlier round is removed first."""
    if one.limit:
        _, _, _, stdout = time_tree(one.limit, work / "log.txt")
        figures.limit_parts = json.loads(stdout.splitlines()[-1])
        figures.limits.append(figures.limit_parts["limit_images_per_s"])
    elif one.out.is_dir():
        shutil.rmtree(one.out)
    wall_s, cpu_s, peak_mb, stdout = time_tree(one.command, work / "log.txt")
    figures.images_per_s.append(num_images / wall_s)
    figures.cpu_ms_per_image.append(1000 * cpu_s / num_images)
    figures.peak_mb.append(peak_mb)
    if one.limit:
        summary = json.loads(stdout.splitlines()[-1])
        figures.efficiencies.append(summary["images_per_s"] / figures.limits[-1])


def rounds(
    contestants: Sequence[Contestant], arguments: argparse.Namespace, work: Path
) -> dict[str, Figures]:
    """All contestants in turn, as often as asked for."""
    found: dict[str, Figures] = defaultdict(Figures)
    for number in range(arguments.repeats):
        for one in contestants:
            measure(one, arguments.num_images, found[one.name], work)
            rate = found[one.name].images_per_s[-1]
            log(f"round {number + 1}: {one.name}: {rate:.1f} images/s")
    return found


def agreement(one: Contestant, expected: Top1) -> float | None:
    """Share of the images in which the contestant found PyTorch's class."""
    if one.read is None:
        return None
    found = one.read(one.out)
    if found.keys() != expected.keys():
        sys.exit(f"{one.name}: {len(found)} of {len(expected)} images have a result")
    return round(sum(found[name] == index for name, index in expected.items()) / len(expected), 4)


def rows_of(
    model: str, contestants: Sequence[Contestant], figures: Mapping[str, Figures], expected: Top1
) -> Iterator[dict[str, Any]]:
    """A table row per contestant; `speed` is against the fastest fp32 peer, if there is one."""
    rates = {one.name: statistics.median(figures[one.name].images_per_s) for one in contestants}
    peers_fp32 = [rates[one.name] for one in contestants if not one.limit and one.is_fp32]
    for one in contestants:
        found = figures[one.name]
        row: dict[str, Any] = {
            "model": model,
            "contestant": one.name,
            "images_per_s": round(rates[one.name], 2),
            "speed": round(rates[one.name] / max(peers_fp32), 3) if peers_fp32 else None,
            "cpu_ms_per_image": round(statistics.median(found.cpu_ms_per_image), 2),
            "peak_mb": round(max(found.peak_mb)),
            "top1_agreement": agreement(one, expected),
            "all_images_per_s": [round(rate, 2) for rate in found.images_per_s],
        }
        if found.limits:
            row["limit_images_per_s"] = round(statistics.median(found.limits), 2)
            row["efficiency"] = round(statistics.median(found.efficiencies), 3)
            row["limit_parts"] = found.limit_parts
        yield row


def compare(
    arguments: argparse.Namespace, work: Path, left_out: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows of all models."""
    link_images(arguments.images, work / "images", arguments.num_images)
    for model, given in arguments.model:
        weights = weights_file(model, given, work)
        ours = our_jobs(arguments, model, weights, work, left_out)
        contestants = [*ours, *peers(arguments, model, weights, work)]
        if arguments.only:
            contestants = [one for one in contestants if re.search(arguments.only, one.name)]
        figures = rounds(contestants, arguments, work)
        expected = pytorch_top1(next(work.glob(f"{model}-*.yaml")))
        yield from rows_of(model, contestants, figures, expected)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--num-images", type=int, default=1000, help="the folder's, linked again")
    parser.add_argument("--batch-size", type=int, default=64, help="of our jobs")
    parser.add_argument("--model", type=_pair, action="append", help="NAME=FILE.pth or NAME=none")
    parser.add_argument("--python", type=_pair, action="append", help="PROVIDER=INTERPRETER")
    parser.add_argument("--peers", type=Path, help="folder of scripts to compare with")
    parser.add_argument("--peer-python", default=sys.executable, help="their interpreter")
    parser.add_argument("--only", help="a regular expression: only contestants with such a name")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    arguments.model = arguments.model or [("mobilenet_v2", "none"), ("resnet50", "none")]
    arguments.python = arguments.python or [("cpu", sys.executable)]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as folder:
        left_out: dict[str, str] = {}
        rows = list(compare(arguments, Path(folder), left_out))
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row.get(key, '')!s:>{WIDTHS.get(key, 18)}}" for key in COLUMNS))
    result = json.dumps(
        {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"cpu": cpu_name_and_flags()[0], "usable_cores": usable_cores()},
            "num_images": arguments.num_images,
            "repeats": arguments.repeats,
            "left_out": left_out,
            "rows": rows,
        }
    )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(json.loads(result), indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
