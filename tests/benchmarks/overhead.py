"""What the interpreter costs per image: a whole job with a null model and images of 16 pixels.

    python -m tests.benchmarks.overhead [--num-images 20000] [--kinds parts whole fed]

Decoding and inference cost next to nothing here, so what is left is the overhead that all threads
of a process share through the interpreter lock: reading, prefetching, ranking 1,000 classes,
writing. The CPU time of all threads of the parent process counts, system calls and libjpeg's own
time included: an upper bound. With decoding processes it is what is left for the parent to do.

The last rows of each kind rehearse a machine of 16 cores: every image sleeps for as long as a photo
takes to decode, which holds a worker, but neither a core nor the interpreter lock. Rates are from
the first records on. "fed by": as many processes decode, infer and rank, as for several GPUs; what
is left is the parent's part. Prints a table and, as the last line, the same as JSON.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, cast, get_args
from unittest.mock import patch

import numpy as np
from PIL import Image

import batchclf.run.classify
from batchclf.images.decode import Decoder
from batchclf.images.decode_pool import open_decoding
from batchclf.images.local import MAX_FILE_BYTES
from batchclf.images.prefetch import Decoding, HostMemory, Load, zeroed_pixels
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.results.files import RunFiles
from batchclf.results.lines import encode_record
from batchclf.results.records import (
    ActiveProvider,
    DecodeBackend,
    DecodeMode,
    Part,
    Pixels,
    Scores,
    refs_of,
)
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import RecordWriter
from batchclf.run.append import SyncedSink
from batchclf.run.classify import Work, classify
from batchclf.run.feeder import Share
from batchclf.run.feeders import Feeders
from batchclf.run.plan import Task, make_plan
from batchclf.run.request import Run
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.parts import InParts
from batchclf.runtime.ranking import rank
from batchclf.runtime.streams import to_records
from batchclf.sessions.open import Opened
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb, usable_cores
from tests.links import link_images
from tests.tiny import Log, SlowLoader, write_classifier

EDGE = 16
"""Pixels of an image's sides, and of the crop."""
NUM_CLASSES = 1000
BATCH_SIZE = 64
NUM_FILES = 64
KINDS = ("parts", "whole", "fed")
CORES_16 = [(16, 2.5), (16, 1.0)]
"""Workers, and milliseconds of decoding a photo: 16 cores could do 6,400 and 16,000 images/s."""


class NullModel:
    """The same scores for every batch, at once."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._scores_NK: Scores = rng.normal(size=(BATCH_SIZE, NUM_CLASSES)).astype(np.float32)

    def __call__(self, pixels_NHWC: Pixels, num_rows: int | None = None) -> Scores:
        return self._scores_NK[:num_rows]


def prepare(folder: Path, num_images: int, decode: DecodeMode) -> tuple[JobSpec, ResolvedModel]:
    """A job over `num_images` names of small JPEG files, with a model of 1,000 classes."""
    originals = folder / "originals"
    images = folder / "images"
    if not images.exists():
        originals.mkdir()
        rng = np.random.default_rng(0)
        for number in range(NUM_FILES):
            pixels_HWC = rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8)
            Image.fromarray(pixels_HWC).save(originals / f"{number}.jpg", quality=90)
        link_images(originals, images, num_images)
        write_classifier(folder / "null.onnx", num_classes=NUM_CLASSES, edge=EDGE)
    job = JobSpec.model_validate(
        {
            "input": images,
            "output": folder / f"out-{decode}",
            "model": {
                "onnx": folder / "null.onnx",
                "preprocess": {
                    "resize": EDGE,
                    "crop": EDGE,
                    "mean": [0.0] * 3,
                    "std": [1.0] * 3,
                },
            },
            "batch_size": BATCH_SIZE,
            "loader": {"decode": decode},
        }
    )
    model = resolve_model(
        job.model, batch_size=BATCH_SIZE, open_reference=open_reference, log=Log().log
    )
    return job, model


def whole(
    folder: Path,
    num_images: int,
    decode: DecodeMode,
    workers: int,
    outside_ms: float = 0.0,
    backend: DecodeBackend = "threads",
) -> dict[str, Any]:
    """CPU microseconds per image of the pipeline, from names to records on disk.

    `outside_ms`: each image sleeps as long, which stands for a real image's decoding: it holds a
    worker but not the interpreter lock. So few cores show how fast many would be fed.
    """
    job, model = prepare(folder, num_images, decode)
    loader = job.loader.model_copy(update={"workers": workers, "backend": backend})
    job = job.model_copy(update={"loader": loader})
    source = source_of(job)
    files = RunFiles(Path(tempfile.mkdtemp(dir=folder)))
    null, part = cast(InParts, NullModel()), Part(BATCH_SIZE, "whole")
    provider = ActiveProvider("cpu", "cpu", "CPU")
    opened = Opened([null], part, provider, model.bundle, HostMemory(), None)
    stats = StatsCollector(cpu_seconds, peak_rss_mb)
    watch = _Stopwatch()
    refs = refs_of(open_store(source).entries())
    with RecordWriter(files.predictions, 0) as writer, _slower_decoding(outside_ms / 1000):
        run = Run(job, RunOptions(), watch, StopRequest())
        plan = make_plan(run, Task(job, source, model, num_images))
        work = Work(plan, opened, stats, watch, run.stop)
        classify(work, refs, SyncedSink(files, writer, stats))
    return {
        "part": f"whole, {workers} {backend}" + (f" of {outside_ms} ms" * bool(outside_ms)),
        "decode": decode,
        **watch.figures(),
    }


class _Stopwatch(Log):
    """Measures from the first records on: whatever starts has started by then."""

    def __init__(self) -> None:
        super().__init__()
        self._times: list[tuple[int, float, float]] = []

    def update(self, num_images: int, num_errors: int) -> None:
        if num_images:
            self._times.append((num_images, time.perf_counter(), cpu_seconds()))

    def figures(self) -> dict[str, float]:
        (first, started, cpu), (last, ended, last_cpu) = self._times[0], self._times[-1]
        return {
            "cpu_us": round(1e6 * (last_cpu - cpu) / (last - first), 1),
            "images_per_s": round((last - first) / (ended - started)),
        }


@contextmanager
def _slower_decoding(outside_s: float) -> Iterator[None]:
    def slower(load: Load, *arguments: Any) -> AbstractContextManager[Decoding]:
        return open_decoding(SlowLoader(load, outside_s) if outside_s else load, *arguments)

    with patch.object(batchclf.run.classify, "open_decoding", slower):
        yield


def fed(folder: Path, num_images: int, decode: DecodeMode, num_feeders: int) -> dict[str, Any]:
    """CPU microseconds per image of the parent of some feeding processes, each with its model.

    That of this machine's CPU in the place of GPUs, small as it is; each decodes in one process.
    """
    job, model = prepare(folder, num_images, decode)
    loader = job.loader.model_copy(update={"workers": 1, "backend": "processes"})
    runtime = job.runtime.model_copy(update={"streams": 1, "threads": 1, "part": BATCH_SIZE})
    job = job.model_copy(update={"loader": loader, "runtime": runtime})
    source = source_of(job)
    files = RunFiles(Path(tempfile.mkdtemp(dir=folder)))
    stats, watch = StatsCollector(cpu_seconds, peak_rss_mb), _Stopwatch()
    run = Run(job, RunOptions(), watch, StopRequest())
    plan = make_plan(run, Task(job, source, model, num_images))
    with (
        RecordWriter(files.predictions, 0) as writer,
        closing(Feeders([Share(plan, (), None)] * num_feeders, watch)) as feeders,
    ):
        work = Work(plan, feeders.opened, stats, watch, run.stop, feeders)
        classify(work, refs_of(open_store(source).entries()), SyncedSink(files, writer, stats))
    return {"part": f"fed by {num_feeders}", "decode": decode, **watch.figures()}


def parts(folder: Path, num_images: int, decode: DecodeMode) -> Iterator[dict[str, Any]]:
    """CPU microseconds per image of each step alone, on one thread."""
    job, model = prepare(folder, num_images, decode)
    store = open_store(source_of(job))
    refs = list(refs_of(store.entries()))
    data = (folder / "originals" / "0.jpg").read_bytes()
    decoder = Decoder(model.preprocess, mode=decode)
    slot_HWC = np.zeros((EDGE, EDGE, 3), np.uint8)
    null = NullModel()
    scores_NK = null(zeroed_pixels((BATCH_SIZE, 1)))
    labels = [f"class number {number}" for number in range(NUM_CLASSES)]

    def ranked() -> object:
        return rank(scores_NK, labels, 5, activation="softmax")

    loaded = [decoder(data, b"0.jpg", slot_HWC)] * BATCH_SIZE
    records = to_records(
        refs[:BATCH_SIZE], loaded, rank(scores_NK, labels, 5, activation="softmax")
    )
    for name, call, per_call in (
        ("read", lambda: store.read(refs[0], MAX_FILE_BYTES), 1),
        ("decode", lambda: decoder(data, b"0.jpg", slot_HWC), 1),
        ("rank", ranked, BATCH_SIZE),
        ("encode", lambda: b"".join(map(encode_record, records)), BATCH_SIZE),
    ):
        yield {
            "part": name,
            "decode": decode,
            "cpu_us": round(_cpu_us(call, max(1, num_images // per_call)) / per_call, 1),
        }


def _cpu_us(call: Callable[[], object], repeats: int) -> float:
    call()
    started = time.process_time()
    for _ in range(repeats):
        call()
    return 1e6 * (time.process_time() - started) / repeats


def rows_of(
    kind: str, folder: Path, decode: DecodeMode, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one of KINDS."""
    num_images = arguments.num_images
    if kind == "parts":
        yield from parts(folder, num_images, decode)
    elif kind == "whole":
        given = [(count, 0.0) for count in arguments.workers] + CORES_16
        for backend, (count, outside_ms) in itertools.product(get_args(DecodeBackend), given):
            yield whole(folder, num_images, decode, count, outside_ms, backend)
    else:
        for count in arguments.feeders:
            yield fed(folder, num_images, decode, count)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, usable_cores(), 16])
    parser.add_argument("--feeders", type=int, nargs="+", default=[1, 4], help="processes")
    parser.add_argument("--decodes", nargs="+", default=["exact", "fast"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of rows")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for decode, kind in itertools.product(arguments.decodes, arguments.kinds):
            rows += rows_of(kind, Path(folder), decode, arguments)
    for row in [{key: key for key in ("part", "decode", "cpu_us", "images_per_s")}, *rows]:
        print(
            f"{row['part']:>36}{row['decode']:>8}{row['cpu_us']!s:>10}"
            f"{row.get('images_per_s', '')!s:>14}"
        )
    print(json.dumps({"cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
