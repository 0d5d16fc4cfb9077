"""How fast each precision is on this machine, as a ratio to fp32 of the same run.

    python -m tests.benchmarks.precisions --images PHOTOS [--provider openvino] \\
        [--weights mobilenet_v2=FILE.pth] [--rounds 5]

For every model, each precision of the provider that this machine has: sessions as a job opens
them, all streams at work on the same batch. The precisions take turns, so a slow moment of the
machine meets them all. Prints a table (medians; CPU milliseconds are those of all threads) and, as
the last line, the same as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchclf.errors import BatchclfError
from batchclf.models.resolve import resolve_model
from batchclf.results.records import Pixels
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.providers import PROVIDERS, installed_flavours
from batchclf.sessions.open import Opened, Wanted, open_devices
from batchclf.sessions.sample import sample_input
from batchclf.spec.job import JobSpec
from batchclf.system.machine import cpu_name_and_flags, cpu_seconds, usable_cores

COLUMNS = ("model", "provider", "precision", "images_per_s", "cpu_ms_per_image", "speed", "cpu")


def log(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def open_all(
    arguments: argparse.Namespace, name: str, weights: str
) -> tuple[dict[str, Opened], Pixels]:
    """The model's sessions at every precision there is here, and a batch of its images."""
    opened: dict[str, Opened] = {}
    pixels_NHWC: Pixels | None = None
    for precision in PROVIDERS[arguments.provider].precisions:
        job = JobSpec.model_validate(
            {
                "input": arguments.images,
                "output": Path(tempfile.gettempdir()) / "unused",
                "model": {"name": name, "weights": weights},
                "provider": arguments.provider,
                "precision": precision,
                "batch_size": arguments.batch_size,
                "min_agreement": 0.0,
            }
        )
        model = resolve_model(
            job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
        )
        try:
            sample = sample_input(job, model)
            opened[precision] = open_devices(Wanted(job, model, job.batch_size, sample, log), None)
        except BatchclfError as error:
            log(f"{name} {precision}: left out: {error}")
            continue
        if pixels_NHWC is None:
            pixels_NHWC = sample_input(job, model, size=job.batch_size).pixels
    assert pixels_NHWC is not None
    return opened, pixels_NHWC[: arguments.batch_size]


def measure(opened: Opened, batch_NHWC: Pixels, calls: int) -> tuple[float, float]:
    """Images/s, and CPU milliseconds per image, of all streams with `calls` batches each."""

    def work(number: int) -> None:
        for _ in range(calls):
            opened.classifiers[number](batch_NHWC)

    threads = [
        threading.Thread(target=work, args=(number,)) for number in range(len(opened.classifiers))
    ]
    started, cpu = time.perf_counter(), cpu_seconds()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    num_images = calls * len(threads) * len(batch_NHWC)
    wall_s = time.perf_counter() - started
    return num_images / wall_s, 1000 * (cpu_seconds() - cpu) / num_images


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="photos to calibrate int8 with")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), default="cpu")
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--weights", nargs="*", default=[], help="MODEL=FILE; else random")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="batches per stream and round")
    arguments = parser.parse_args()
    weights = dict(text.split("=", 1) for text in arguments.weights)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        opened, batch_NHWC = open_all(arguments, name, weights.get(name, "none"))
        figures = defaultdict(list)
        for _ in range(arguments.rounds):
            for precision, one in opened.items():
                figures[precision].append(measure(one, batch_NHWC, arguments.calls))
        for precision, found in figures.items():
            # Each round against its own fp32, then the median of them.
            rounds = list(zip(found, figures["fp32"], strict=True))
            speed = statistics.median(mine[0] / full[0] for mine, full in rounds)
            cpu = statistics.median(full[1] / mine[1] for mine, full in rounds)
            check = opened[precision].precision_check
            rows.append(
                {
                    "model": name,
                    "provider": arguments.provider,
                    "precision": precision,
                    "images_per_s": round(statistics.median(one[0] for one in found), 1),
                    "cpu_ms_per_image": round(statistics.median(one[1] for one in found), 2),
                    "speed": round(speed, 2),
                    "cpu": round(cpu, 2),
                    "top1_agreement": None if check is None else check.top1_agreement,
                }
            )
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("".join(f"{row[key]!s:>18}" for key in COLUMNS))
    machine = {"cpu": cpu_name_and_flags()[0], "usable_cores": usable_cores()}
    date = datetime.now(UTC).date().isoformat()
    print(
        json.dumps(
            {"date": date, "machine": machine, "versions": installed_flavours(), "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
