"""What a long night costs: listing, memory over many images, resuming a job that is mostly done.

    python -m tests.benchmarks.nights [--only listing memory resume] [--cache FOLDER] [--out FILE]

listing: a fresh process lists and freezes one flat folder, folders of 1,000 files, and a text
list. Its peak RSS is that of the whole process.
memory: `batchclf run` over hard links of a few small photos with a tiny model. After the warm-up,
its RSS, file descriptors and threads are sampled; growth is the slope of a line through all
samples of RSS, and the median of the last tenth less that of the first.
resume: how long `batchclf run` takes from its start to its first new record where all but 100
records are there, and to its end where none is missing.

The files are hard links and take a minute to make; --cache keeps them for the next time. Prints a
table and, as the last line, the same as JSON.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import resolve_model
from batchclf.results.files import RunFiles
from batchclf.results.lines import encode
from batchclf.results.listing import drafted, place
from batchclf.results.records import Prediction, Record
from batchclf.results.run_record import Durable, write_run
from batchclf.results.writer import RecordWriter
from batchclf.run.identity import fingerprint_of, identity_of
from batchclf.runtime.classifier import open_reference
from batchclf.spec.file import load_job
from batchclf.system.machine import boot_id, cpu_name_and_flags, usable_cores
from tests.benchmarks.startup import POLL_S
from tests.conftest import ROOT, USERS_ENVIRONMENT, command
from tests.results.common import a_record
from tests.tiny import DIGITS, write_tiny_job

PARTS = ("listing", "memory", "resume")
NUM_LEFT = 100
"""Images without a record where a job is resumed."""
MAX_LINKS = 50_000
"""Names per file: ext4 allows 65,000."""
SOME_LABELS = ("tench", "great white shark", "electric ray", "indigo bunting", "European gallinule")
LIST = """
import sys, time
from pathlib import Path
from batchclf.run import job  # all that a job has in memory when it lists
from batchclf.images.source import open_source
from batchclf.images.store import open_store
from batchclf.results.files import RunFiles
from batchclf.results.listing import drafted, place
from tests.results.common import IDENTITY
started = time.perf_counter()
files = RunFiles(Path(sys.argv[2]))
with drafted(files, IDENTITY, open_store(open_source(Path(sys.argv[1]))).entries()) as draft:
    place(files, draft)
print(time.perf_counter() - started)
facts = Path("/proc/self/status").read_text()
print(facts.split("VmHWM:")[1].split()[0])
"""


def log(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---- the files -----------------------------------------------------------------------------------


def make_files(folder: Path, num_files: int, per_folder: int) -> Path:
    """Hard links of the sample digits, `per_folder` to a folder, unless they are there already."""
    ready = folder.with_name(f"{folder.name}.ready")
    if ready.exists() and ready.read_text() == str(num_files):
        return folder
    log(f"making {num_files:,} files in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    photos = sorted(DIGITS.rglob("*.jpg"))
    numbers = list(range(num_files))
    random.Random(0).shuffle(numbers)  # made in another order than listed
    original = folder
    for number, name in enumerate(numbers):
        path = folder / f"{name // per_folder:04d}" / f"IMG_{name:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % MAX_LINKS == 0:
            shutil.copyfile(photos[number // MAX_LINKS % len(photos)], path)
            original = path
        else:
            os.link(original, path)
    ready.write_text(str(num_files))
    return folder


def write_list(path: Path, num_files: int) -> Path:
    """A list of names of 100 bytes."""
    with path.open("w") as file:
        file.writelines(f"{number:096d}.jpg\n" for number in range(num_files))
    return path


# ---- a process from outside ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What /proc says of a process at one moment; memory in MB (10^6 bytes)."""

    rss_mb: float
    peak_rss_mb: float
    num_threads: int
    num_descriptors: int
    """Without those of the images that are being read at the moment."""


def look(process: "subprocess.Popen[Any]") -> Look | None:
    """The process as it is now; None: it has ended."""
    folder = Path(f"/proc/{process.pid}")
    try:
        lines = (folder / "status").read_text().splitlines()
        descriptors = [path for path in (folder / "fd").iterdir() if not leads_to_image(path)]
    except OSError:
        return None
    facts = dict(line.split(":", 1) for line in lines)
    if "VmRSS" not in facts:  # a zombie
        return None
    rss_mb, peak_rss_mb = (int(facts[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))
    return Look(rss_mb, peak_rss_mb, int(facts["Threads"]), len(descriptors))


def leads_to_image(descriptor: Path) -> bool:
    """Whether an entry of /proc/PID/fd is an image, or has just been closed."""
    try:
        return os.readlink(descriptor).endswith(".jpg")
    except FileNotFoundError:
        return True


def start(job: Path, *options: str) -> "subprocess.Popen[bytes]":
    """A `batchclf run`, its messages to this process's stderr."""
    return subprocess.Popen(
        command("run", job, *options), env=USERS_ENVIRONMENT, stdout=subprocess.DEVNULL
    )


def require_success(process: "subprocess.Popen[Any]") -> None:
    """End here if the process failed."""
    if process.wait() != 0:
        sys.exit(f"{process.args!r}: ended with exit code {process.returncode}")


def size_of(path: Path) -> int:
    """Bytes of a file; 0: not there."""
    return path.stat().st_size if path.exists() else 0


# ---- what is measured ----------------------------------------------------------------------------


def measure_listing(source: Path, num_files: int, work: Path) -> dict[str, Any]:
    """Files a second and peak RSS of one listing in a process of its own."""
    with tempfile.TemporaryDirectory(dir=work) as output:
        done = subprocess.run(
            [sys.executable, "-c", LIST, source, output],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    seconds, peak_kb = done.stdout.split()
    return {
        "files_per_s": round(num_files / float(seconds)),
        "peak_rss_mb": round(int(peak_kb) * 1024 / 1e6, 1),
    }


def measure_memory(images: Path, num_images: int, work: Path, sample_s: float) -> dict[str, Any]:
    """Growth of one run's memory, and its descriptors and threads, after a tenth of the images."""
    job = write_tiny_job(work, input=str(images), output=str(work / "memory"), provider="cpu")
    predictions = work / "memory" / "predictions.jsonl"
    seen: list[tuple[int, Look]] = []
    started = time.perf_counter()
    process = start(job, "--limit", str(num_images))
    while (found := look(process)) is not None:
        seen.append((size_of(predictions), found))
        time.sleep(sample_s)
    require_success(process)
    wall_s = time.perf_counter() - started
    total = size_of(predictions)
    # Not the end, where threads go.
    kept = [(size / total, one) for size, one in seen if 0.1 < size / total < 0.99]
    if len(kept) < 2:
        sys.exit(f"--num-images: {num_images} are over before there are samples; ask for more")
    rss_mb = [one.rss_mb for _, one in kept]
    slope = float(np.polyfit([share for share, _ in kept], rss_mb, 1)[0])
    tenth = max(1, len(kept) // 10)
    done = [share for share, _ in kept]
    between = statistics.median(done[-tenth:]) - statistics.median(done[:tenth])
    growth = statistics.median(rss_mb[-tenth:]) - statistics.median(rss_mb[:tenth])
    return {
        "num_images": num_images,
        "images_per_s": round(num_images / wall_s),
        "num_samples": len(kept),
        "rss_mb": [round(min(rss_mb), 2), round(max(rss_mb), 2)],
        "slope_mb_per_100000": round(slope / num_images * 1e5, 3),
        "growth_mb_per_100000": round(growth / (between * num_images) * 1e5, 3),
        "num_descriptors": sorted({one.num_descriptors for _, one in kept}),
        "num_threads": sorted({one.num_threads for _, one in kept}),
    }


def measure_resume(images: Path, num_files: int, work: Path, repeats: int) -> dict[str, Any]:
    """Seconds to the first new record of a job with all but NUM_LEFT records, and of a full one."""
    job = write_tiny_job(work, input=str(images), output=str(work / "resume"), provider="cpu")
    files = RunFiles(work / "resume")
    write_records(job, files, num_files - NUM_LEFT)
    num_bytes = size_of(files.predictions)
    first: list[tuple[float, float]] = []
    for _ in range(repeats):
        first.append(until(start(job), lambda: size_of(files.predictions) > num_bytes))
        os.truncate(files.predictions, num_bytes)
    require_success(start(job))
    full = [until(start(job), lambda: False) for _ in range(repeats)]
    return {
        "num_records": num_files - NUM_LEFT,
        "records_mb": round(num_bytes / 1e6, 1),
        "first_record_s": [round(seconds, 2) for seconds, _ in first],
        "complete_s": [round(seconds, 2) for seconds, _ in full],
        "peak_rss_mb": [round(max(peak for _, peak in found), 1) for found in (first, full)],
    }


def until(process: "subprocess.Popen[bytes]", is_there: Callable[[], bool]) -> tuple[float, float]:
    """Seconds until something is there, or the process ends well; and its peak RSS in MB."""
    started = time.perf_counter()
    peak_rss_mb = 0.0
    try:
        while not is_there() and (found := look(process)) is not None:
            peak_rss_mb = found.peak_rss_mb
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started
        if not is_there():
            require_success(process)
    finally:
        process.kill()
        process.wait()
    return seconds, peak_rss_mb


def write_records(job_file: Path, files: RunFiles, num_done: int) -> None:
    """What a job leaves behind that is stopped after `num_done` images, by its own functions."""
    log(f"writing {num_done:,} records")
    job = load_job(job_file)
    files.folder.mkdir()
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    store = open_store(source_of(job))
    identity = identity_of(job, model, None)
    with drafted(files, identity, store.entries()) as draft:
        listing = place(files, draft)
    outcome = tuple(
        Prediction(label, 100 * index, 0.654321 / (1 + index))
        for index, label in enumerate(SOME_LABELS)
    )
    with RecordWriter(files.predictions, 0) as writer:
        refs = listing.refs(0, num_done)
        while some := list(itertools.islice(refs, 1000)):
            writer.write(encode([Record(ref, outcome) for ref in some]))
    num_images = listing.num_images
    changes = {
        "status": "interrupted",
        "fingerprint": fingerprint_of(identity, listing, num_images),
        "num_images": num_images,
        # Else the records would not be trusted, and all of them be made again.
        "durable": Durable(size_of(files.predictions), num_done, boot_id()),
    }
    write_run(files, a_record(**changes))


def measure(arguments: argparse.Namespace, cache: Path, work: Path) -> dict[str, Any]:
    """All that is asked for."""
    num_files = arguments.num_files
    found: dict[str, Any] = {}
    flat = make_files(cache / "flat", num_files, num_files)
    tree = make_files(cache / "tree", num_files, 1000)
    if "listing" in arguments.only:
        sources = {
            "one folder": flat,
            "folders of 1,000": tree,
            "text list": write_list(work / "list.txt", num_files),
        }
        found["listing"] = {
            name: {"num_files": num_files, **measure_listing(source, num_files, work)}
            for name, source in sources.items()
        }
    if "memory" in arguments.only:
        found["memory"] = measure_memory(tree, arguments.num_images, work, arguments.sample_s)
    if "resume" in arguments.only:
        found["resume"] = measure_resume(flat, num_files, work, arguments.repeats)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--num-files", type=int, default=1_000_000 + NUM_LEFT, help="to list")
    parser.add_argument("--num-images", type=int, default=200_000, help="to classify, for memory")
    parser.add_argument("--sample-s", type=float, default=0.5, help="between looks at its memory")
    parser.add_argument("--repeats", type=int, default=3, help="of each resume")
    parser.add_argument("--cache", type=Path, help="where the listed files are kept")
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["BATCHCLF_CACHE_DIR"] = str(work / "models")
        found = measure(arguments, arguments.cache or work, work)
    for part, rows in found.items():
        for name, value in rows.items():
            print(f"{part:<10}{name:<22}{value}")
    answer = {
        "benchmark": "nights",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name_and_flags()[0], "usable_cores": usable_cores()},
        **found,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(answer, indent=2) + "\n")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
