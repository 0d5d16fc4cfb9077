"""The limit of a job on a CPU: cores / (CPU seconds per image of decoding + of inference).

    python -m tests.benchmarks.limit JOB.yaml [--seconds 3]

Each step is measured alone with every usable core at work, as `batchclf tune` does, since cores
that share caches and memory slow each other down. Prints one line of JSON.
"""

import argparse
import json
from pathlib import Path

from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import resolve_model
from batchclf.results.records import refs_of
from batchclf.run.output import local_output
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.timing import measure_throughput
from batchclf.sessions.open import Wanted, open_devices
from batchclf.sessions.sample import sample_input
from batchclf.spec.file import load_job
from batchclf.spec.job import auto
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import usable_cores
from batchclf.tuning.measure import Bench, measure_decoding
from tests.tiny import Log


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the two")
    arguments = parser.parse_args()
    job, log = load_job(arguments.job), Log().log
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    source = source_of(job)
    refs = list(refs_of(open_store(source).entries()))
    bench = Bench(job, source, model, refs, len(refs), local_output(job), StopRequest(), print)
    workers = auto(job.loader.workers, usable_cores())
    decoding = measure_decoding(bench, job.loader.decode, workers, arguments.seconds)
    sample = sample_input(job, model)
    opened = open_devices(Wanted(job, model, job.batch_size, sample, log), None)
    inference = measure_throughput(
        opened.classifiers,
        sample_input(job, model, size=job.batch_size).pixels,
        budget_s=arguments.seconds,
    )
    cpu_ms = decoding.cpu_ms_per_image + inference.cpu_ms_per_image
    figures = {
        "decode_cpu_ms": round(decoding.cpu_ms_per_image, 3),
        "infer_cpu_ms": round(inference.cpu_ms_per_image, 3),
        "limit_images_per_s": round(1000 * usable_cores() / cpu_ms, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
