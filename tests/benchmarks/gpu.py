"""Everything there is to learn on a CUDA machine, within a deadline, row by row.

    python -m tests.benchmarks.gpu --out tests/benchmarks/results/gpu.jsonl [--deadline 480]

The steps are those of `gpu_rows.py`, what matters most first. Each runs in a process of its own,
which is killed over a row that takes too long and started again at the next one; each row is in
the file (JSON lines) when it is known. Ends with a short table. GPU.md beside this says how to
bring all of it to a machine without network; `--provider cpu` rehearses it where there is no GPU.

Models have random weights and biases unless --bundle names exported ones.
"""

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("resnet50", "mobilenet_v2")
GRACE_S = 10.0
"""For a row that has begun when its step's time is up."""
TAIL = 1500
"""Characters kept of what a process said before it ended."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the visit."""

    name: str
    seconds: float
    """Its share of a deadline of 480 s; what it leaves, the next ones have."""
    row_s: float
    """Seconds after which a row is given up."""


BUNDLES = Step("bundles", 90, 80)
"""Exporting the models takes the CPU alone, and goes on beside the first step. Nothing goes without
them, so its time is not cut with the deadline."""
STEPS = (
    Step("look", 25, 15),
    Step("correctness", 110, 45),
    Step("copies", 15, 8),
    Step("throughput", 160, 25),
    Step("decode", 30, 12),
    Step("end_to_end", 135, 75),
)
FULL_S = sum(step.seconds for step in STEPS) + 5


def log(text: str) -> None:
    """A line of progress on stderr."""
    print(f"gpu: {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Visit:
    """The options, the file, and what is in it."""

    arguments: argparse.Namespace
    work: Path
    file: IO[str]
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ends_at(self) -> float:
        """When all must be over."""
        return self.started + float(self.arguments.deadline)

    def record(self, step: Step, row: dict[str, Any]) -> None:
        """Put a row into the file now: the machine may be gone in a moment."""
        row = {"step": step.name, "at_s": round(time.monotonic() - self.started, 1), **row}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        log(json.dumps(row)[:300])

    def command(self, step: Step, ends_at: float, done: Sequence[str]) -> list[str]:
        """What measures the rows of a step that are not done."""
        arguments = self.arguments
        return [
            *(sys.executable, "-m", "tests.benchmarks.gpu_rows", step.name),
            *("--provider", arguments.provider, "--work", str(self.work)),
            *("--models", *arguments.models, "--out", str(arguments.out)),
            *("--bundle", *arguments.bundle, "--images", str(arguments.images)),
            *("--batch-sizes", *map(str, arguments.batch_sizes)),
            *("--num-images", str(arguments.num_images)),
            *("--seconds", str(arguments.seconds), "--row-s", str(step.row_s)),
            *("--ends-at", str(ends_at), "--done", *done),
        ]


@dataclass(slots=True)
class Child:
    """A process that measures, and what it said to its standard error."""

    process: subprocess.Popen[bytes]
    said: Path

    def tail(self) -> str:
        """The end of that."""
        return self.said.read_text(errors="replace")[-TAIL:]


@contextmanager
def measuring(visit: Visit, command: Sequence[str]) -> Iterator[Child]:
    """A process that measures; gone, with all that it started, when the block ends."""
    descriptor, name = tempfile.mkstemp(dir=visit.work, prefix="stderr-")
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=descriptor,
        start_new_session=True,
        env={**os.environ, "BATCHCLF_CACHE_DIR": str(visit.work / "cache")},
    ) as process:
        os.close(descriptor)
        try:
            yield Child(process, Path(name))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_step(visit: Visit, step: Step, ends_at: float) -> None:
    """Record the rows of a step, as far as the time goes."""
    done: list[str] = []
    while time.monotonic() < ends_at:
        num_done = len(done)
        with measuring(visit, visit.command(step, ends_at, done)) as child:
            row, problem = follow(visit, step, child, ends_at, done)
        if problem is None:
            return
        visit.record(step, {"name": row, "error": problem})
        if row is not None:
            done.append(row)
        elif len(done) == num_done:  # it does not even begin
            return
    visit.record(step, {"name": None, "error": "no time is left for the rest"})


def follow(
    visit: Visit, step: Step, child: Child, ends_at: float, done: list[str]
) -> tuple[str | None, str | None]:
    """Record what a process says; returns the row that it was at, and what went wrong, if so."""
    assert child.process.stdout is not None
    current: str | None = None
    row_ends_at = time.monotonic() + step.row_s
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.process.stdout, selectors.EVENT_READ)
        while True:
            left = min(row_ends_at, ends_at + GRACE_S, visit.ends_at) - time.monotonic()
            if left <= 0 or not selector.select(left):
                return current, f"killed, since it took too long: {child.tail()}"
            if not (read := os.read(child.process.stdout.fileno(), 65536)):
                break
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                said = json.loads(line)
                row_ends_at = time.monotonic() + step.row_s
                current = said.get("begin", current)
                if "row" in said:
                    visit.record(step, said["row"])
                    done.append(said["row"]["name"])
                    current = None
    code = child.process.wait()
    return current, None if code == 0 else f"ended with {code}: {child.tail()}"


def visit_all(visit: Visit) -> None:
    """All steps; exporting goes on beside the first one."""
    scale = visit.arguments.deadline / FULL_S
    ends_at = visit.started
    with exporting(visit, ends_at + BUNDLES.seconds):
        ends_at += STEPS[0].seconds * scale
        run_step(visit, STEPS[0], ends_at)
    for step in STEPS[1:]:
        ends_at += step.seconds * scale
        if step.name not in visit.arguments.skip:
            run_step(visit, step, ends_at)


@contextmanager
def exporting(visit: Visit, ends_at: float) -> Iterator[None]:
    """Export the models that no bundle was given of, beside what is done meanwhile."""
    with measuring(visit, visit.command(BUNDLES, ends_at, ())) as child:
        yield
        row, problem = follow(visit, BUNDLES, child, ends_at, [])
    if problem is not None:
        visit.record(BUNDLES, {"name": row, "error": problem})


# ---- the table -----------------------------------------------------------------------------------

FIGURES = (
    *("agree", "top1", "largest", "rounding", "bitwise", "ran_on", "exit_code"),
    *("gb_per_s", "stall_ms", "images_per_s", "efficiency", "num_failed", "seconds"),
    *("host_images_per_s", "host_cpu_us", "device_cpu_us"),
)
"""What the table shows of a row, if it has it."""


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line per row: step, name and figures, or what went wrong."""
    for row in rows:
        if "error" in row:
            problem = " ".join(str(row["error"]).split())
            text = problem if len(problem) < 160 else f"{problem[:60]} ... {problem[-95:]}"
        else:
            text = "  ".join(f"{key} {row[key]}" for key in FIGURES if key in row)
        yield f"{row['step']:<12}{row['name'] or '-'!s:<66}{text}"


def main() -> None:
    """Visit, and show what came of it, also when it is interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to append rows to")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds for all of it")
    parser.add_argument("--provider", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bundle", nargs="*", default=[], help="exported models, by folder name")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--images", type=Path, default=ROOT / "samples" / "photos")
    parser.add_argument("--num-images", type=int, default=400_000, help="of a whole run, at most")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each throughput")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.bundle = [str(Path(folder).resolve()) for folder in arguments.bundle]
    with (
        tempfile.TemporaryDirectory(prefix="gpu-visit-") as folder,
        arguments.out.open("a") as file,
    ):
        visit = Visit(arguments, Path(folder), file)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            visit_all(visit)
        finally:
            print("\n".join(table(visit.rows)))
            print(f"{len(visit.rows)} rows in {time.monotonic() - visit.started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
