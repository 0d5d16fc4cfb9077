"""The limit of a job on a CPU: cores / (CPU seconds per image of decoding + of inference).

    python -m tests.benchmarks.limit JOB.yaml [--seconds 3]

Each step is measured alone with every usable core at work, as in the job, since cores that share
caches and memory slow each other down. Prints one line of JSON.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from batchclf.devices import Opened, open_devices
from batchclf.images.prefetch import Load, Prefetcher, threads
from batchclf.images.source import open_source
from batchclf.jobfile import load_job
from batchclf.machine import cpu_seconds, usable_cores
from batchclf.models.resolve import resolve_model
from batchclf.plan import make_loader
from batchclf.results.records import ImageRef, Pixels
from batchclf.runtime.classifier import Classifier, open_reference
from batchclf.sample import sample_input


def silent(text: str) -> None:
    """What a job would log."""


def decode_cpu_ms(
    load: Load, refs: Sequence[ImageRef], batch_shape: tuple[int, int, int, int], seconds: float
) -> float:
    """CPU milliseconds per image of reading and decoding, a worker per usable core."""
    end = time.perf_counter() + seconds
    timed = itertools.takewhile(lambda ref: time.perf_counter() < end, itertools.cycle(refs))
    decoding = threads(load, usable_cores())
    with Prefetcher(timed, decoding, batch_shape=batch_shape, num_slots=4) as batches:
        started, num_images = cpu_seconds(), 0
        while (batch := batches.next_batch()) is not None:
            num_images += len(batch.refs)
            batches.release(batch)
    return 1000 * (cpu_seconds() - started) / num_images


def infer_cpu_ms(opened: Opened, batch_NHWC: Pixels, seconds: float) -> float:
    """CPU milliseconds per image of inference, all streams at work on the same batch."""
    end = time.perf_counter() + seconds

    def work(classify: Classifier) -> int:
        num_batches = 0
        while time.perf_counter() < end:
            classify(batch_NHWC)
            num_batches += 1
        return num_batches

    with ThreadPoolExecutor(len(opened.classifiers)) as streams:
        started = cpu_seconds()
        num_batches = sum(streams.map(work, opened.classifiers))
        return 1000 * (cpu_seconds() - started) / (num_batches * len(batch_NHWC))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the two")
    arguments = parser.parse_args()
    job = load_job(arguments.job)
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=silent
    )
    opened = open_devices(
        job, model, job.batch_size, partial(sample_input, job, model), None, silent
    )
    source = open_source(job.input)
    refs = [ImageRef(index, path) for index, path in enumerate(source.paths())]
    batch_NHWC = sample_input(job, model, size=job.batch_size)
    decode_ms = decode_cpu_ms(
        make_loader(job, source, model), refs, batch_NHWC.shape, arguments.seconds
    )
    infer_ms = infer_cpu_ms(opened, batch_NHWC, arguments.seconds)
    limit = 1000 * usable_cores() / (decode_ms + infer_ms)
    print(
        json.dumps(
            {
                "decode_cpu_ms": round(decode_ms, 3),
                "infer_cpu_ms": round(infer_ms, 3),
                "limit_images_per_s": round(limit, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
