"""How good is what `batchclf tune` picks? Its settings beside the best of an exhaustive sweep.

    python tests/benchmarks/tune.py JOB.yaml [--budget 60] [--batch-sizes 1,8,32,128]
        [--rounds 3] [--seconds 1]

Runs the command, then every combination of batch size, streams x threads and decode workers that
it could have picked, with the same trial, in `--rounds` rounds over all of them, so that what else
the machine does slows all alike. Prints the ten best and the one picked (median and most images/s
of the rounds) and, as the last line, a JSON object; `share_of_best` compares the medians.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import resolve_model
from batchclf.runtime.classifier import open_reference
from batchclf.sessions.sample import sample_input, spread
from batchclf.spec.file import load_job
from batchclf.spec.job import RuntimeSpec
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import usable_cores
from batchclf.tuning.measure import Bench, run_trial
from batchclf.tuning.records import Prediction, Session, Settings
from batchclf.tuning.search import PARTS, stream_counts, worker_counts
from batchclf.tuning.sessions import Sessions
from batchclf.tuning.tune import SAMPLE_SIZE


def tuned(job: Path, budget: str, batch_sizes: str, output: Path) -> dict[str, Any]:
    """What the command picks, with the seconds of its whole process as `process_s`."""
    started = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchclf", "tune", str(job), "--json"),
            *("--budget", budget, "--batch-sizes", batch_sizes, "-o", str(output)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process_s": round(time.perf_counter() - started, 1)}


def as_settings(facts: dict[str, Any]) -> Settings:
    """Settings from a line of the command's answer."""
    session = Session(**{key: facts[key] for key in Session.__slots__})
    return Settings(session, facts["decode"], facts["workers"])


def sweep(
    job_file: Path, batch_sizes: list[int], own: Settings, rounds: int, seconds: float
) -> dict[Settings, list[float]]:
    """Images per second of every combination, in each round."""
    job = load_job(job_file)
    silent = StopRequest()
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=print
    )
    source = source_of(job)
    refs, num_listed, _ = spread(open_store(source).entries(), SAMPLE_SIZE, lambda: False)
    rates: dict[Settings, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(job, source, model, refs, len(refs), Path(folder), silent, print)
        sample = sample_input(job, model)
        sessions = Sessions(bench, sample, None)
        automatic = sessions.target(RuntimeSpec()).streams
        counts = stream_counts(
            automatic, own.session.streams, usable_cores(), on_cpu=sessions.on_cpu
        )
        targets = [sessions.target(RuntimeSpec(streams=count)) for count in counts]
        layouts = {(one.streams, one.threads) for one in targets}
        layouts |= {(own.session.streams, own.session.threads)}
        sizes = sorted({size for size in batch_sizes if size <= num_listed})
        parts = sorted({*PARTS, own.session.part})
        both = [
            (size, part)
            for size, part in itertools.product(sizes, parts)
            if (part <= size if sessions.on_cpu else part == parts[0])
        ]
        for _, (size, part), layout in itertools.product(range(rounds), both, sorted(layouts)):
            at_once = part if sessions.on_cpu else size
            session = Session(job.precision, size, *layout, part=at_once)
            for workers in worker_counts(own.workers, usable_cores()):
                settings = Settings(session, job.loader.decode, workers)
                trial = run_trial(
                    bench, sessions.open(session), Prediction(settings, 1, 1, 1), seconds, 60
                )
                rates.setdefault(settings, []).append(trial.images_per_s)
    return rates


def main() -> None:
    """Tune, sweep, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path, help="the job to tune")
    parser.add_argument("--budget", default="60")
    parser.add_argument("--batch-sizes", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one trial of the sweep")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        found = tuned(arguments.job, arguments.budget, arguments.batch_sizes, Path(output))
    picked, own = as_settings(found["best"]), as_settings(found["current"])
    sizes = [int(one) for one in arguments.batch_sizes.split(",")]
    sizes += [picked.session.batch_size, own.session.batch_size]
    rates = sweep(arguments.job, sizes, own, arguments.rounds, arguments.seconds)
    medians = {settings: statistics.median(values) for settings, values in rates.items()}
    ranking = sorted(medians, key=lambda one: -medians[one])
    print(f"{'batch':>5} {'part':>5} {'streams':>8} {'workers':>8} {'median':>9} {'most':>9}")
    for settings in dict.fromkeys((*ranking[:10], picked, own)):
        session = settings.session
        marks = [name for name, one in (("picked", picked), ("own", own)) if one == settings]
        print(
            f"{session.batch_size:5} {session.part:5} {session.streams:4} x {session.threads} "
            f"{settings.workers:8} {medians[settings]:9.1f} {max(rates[settings]):9.1f} "
            f"{', '.join(marks)}"
        )
    answer = {
        "benchmark": "tune",
        "job": arguments.job.name,
        "num_combinations": len(medians),
        "process_s": found["process_s"],
        "picked_images_per_s": round(medians[picked], 1),
        "best_images_per_s": round(medians[ranking[0]], 1),
        "own_images_per_s": round(medians[own], 1),
        "share_of_best": round(medians[picked] / medians[ranking[0]], 4),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
