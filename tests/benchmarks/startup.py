"""How long until batchclf answers: `--help`, and the first record of a job with a cached model.

    python tests/benchmarks/startup.py JOB.yaml [--repeats 10]

Each figure is a whole process, timed from outside, after one warm-up that also fills the model
cache and writes the bytecode of all modules, which an installed package has. The first record is
there when predictions.jsonl is not empty; `startup_s` is what the summary says. Prints a table
(median, least and most seconds) and, as the last line, the same as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

POLL_S = 0.002
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
"""Of the processes: with that variable each would compile our modules, for some 0.1 s."""


def help_seconds(command: str) -> float:
    """Wall seconds of `batchclf --help`."""
    started = time.perf_counter()
    subprocess.run([command, "--help"], stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def run_seconds(command: str, job: Path) -> tuple[float, float]:
    """Wall seconds from starting the command to the first bytes of predictions.jsonl, and the
    `startup_s` of its summary."""
    with tempfile.TemporaryDirectory() as output:
        predictions = Path(output) / "predictions.jsonl"
        started = time.perf_counter()
        process = subprocess.Popen(
            [command, "run", str(job), "-o", output],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        while not (predictions.exists() and predictions.stat().st_size):
            if process.poll() is not None:
                sys.exit(f"{job}: the run ended with exit code {process.returncode}, no record")
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started
        process.wait()
        summary = json.loads((Path(output) / "stats.jsonl").read_bytes().splitlines()[-1])
    return seconds, summary["startup_s"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path, help="a job whose first record is timed")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    command = str(Path(sysconfig.get_path("scripts")) / "batchclf")
    run_seconds(command, arguments.job)
    runs = [run_seconds(command, arguments.job) for _ in range(arguments.repeats)]
    first_record_s, startup_s = zip(*runs, strict=True)
    figures = {
        "help_s": [help_seconds(command) for _ in range(arguments.repeats)],
        "first_record_s": first_record_s,
        "startup_s": startup_s,
    }
    print(f"{'figure':<16} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in figures.items():
        print(f"{name:<16} {statistics.median(values):8.3f} {min(values):8.3f} {max(values):8.3f}")
    medians = {name: round(statistics.median(values), 4) for name, values in figures.items()}
    print(json.dumps({"benchmark": "startup", "job": arguments.job.name, **medians}))


if __name__ == "__main__":
    main()
