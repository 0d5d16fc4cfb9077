"""How many workers one driver of engine ray keeps busy, and what each range and image costs it.

    python -m tests.benchmarks.scaling [--workers 1 4 16 64] [--seconds 40] [--image-ms 2] \\
        [--range-s 5] [--listed 2000000]

The driver is the real one, from the listing to predictions.jsonl, on a cluster of this machine. Its
workers are Ray actors that sleep instead of decoding and inferring, write the records that would
have come out, and commit them. Prints, for each number of workers, the share of the time that they
slept (1 is linear scaling), and the driver's CPU seconds per range and per image. Then, of so many
images that are `listed`, what a driver does with all of them: listing them, going through the
listing, looking at the parts that are there when it goes on, and joining these. All of that as one
JSON object in the last line.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ray

from batchclf import __version__
from batchclf.engines.ray import crew, finding, pace
from batchclf.engines.ray.cluster import Connection
from batchclf.engines.ray.crew import RayCrew
from batchclf.engines.ray.member import TOKEN, Errand
from batchclf.engines.ray.station import Look, Station
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.results.files import RunFiles
from batchclf.results.lines import encode_record
from batchclf.results.listing import Listing, drafted, place
from batchclf.results.parts import Committed, Folders, find_parts
from batchclf.results.records import Prediction, Record
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import RecordWriter
from batchclf.run.crew import Order
from batchclf.run.duty import Attempt, Duty
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.ranges import Gaps
from batchclf.run.request import Run
from batchclf.sessions.open import Opened
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.engines.ray.cluster import QUICK, cluster
from tests.results.common import IDENTITY
from tests.tiny import Log, link_digits, write_tiny_job

ANSWER = tuple(Prediction(f"label_{number}", number, 0.1234) for number in range(5))
NUM_REAL = 100
PART_IMAGES = 20_000
START_S = 600.0
"""Work begins with all workers: those of one small machine take long to be started."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a sleeper plays: plain data."""

    opened: Opened
    image_s: float


class Sleeper:
    """Has the face of a `Member`, and sleeps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = StatsCollector(lambda: 0.0, lambda: 0.0)
        self._looks = count(1)

    def hello(self) -> dict[str, str]:
        return {"batchclf": __version__, "Python": platform.python_version()}

    def open(self, errand: Errand, packed: bytes) -> tuple[Opened, int]:
        self._listing: Listing = errand.listing
        (errand.drafts / f"{TOKEN}.{errand.answer}").touch()
        self._part: Part = ray.get(ray.get_actor("director").part.remote())
        self._stats.start(0.0)
        return self._part.opened, 1

    def do(self, attempt: Attempt) -> tuple[Committed, Look]:
        with self._lock:
            ends_at = time.monotonic() + attempt.range.num_images * self._part.image_s
            with attempt.draft.open("xb") as file:
                file.writelines(
                    encode_record(Record(ref, ANSWER)) for ref in attempt.range.refs(self._listing)
                )
                num_bytes = file.tell()
            time.sleep(max(0.0, ends_at - time.monotonic()))
            attempt.folders.commit(attempt.draft, attempt.range.first)
            self._stats.add_part(attempt.range.num_images, {})
            first, num_images = attempt.range.first, attempt.range.num_images
            return Committed(first, num_bytes, num_images, Counter()), self.look()

    def look(self) -> Look:
        return Look(0, 0, self._stats.snapshot(), (), next(self._looks))

    def stop(self) -> None:
        """Nothing: jobs here come to their end."""


class Director:
    """Tells sleepers what to play."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def part(self) -> Part:
        return self._part


class Counted(RayCrew):
    """The same crew, and what its driver costs while it works."""

    num_ranges = 0
    cpu_s = wall_s = 0.0
    director: Any
    """Ends with its last handle, which this is."""

    def work(self, ranges: Any, folders: Folders) -> Iterator[Committed | None]:
        cpu, wall = time.process_time(), time.monotonic()
        for part in super().work(ranges, folders):
            Counted.num_ranges += part is not None
            yield part
        Counted.cpu_s, Counted.wall_s = time.process_time() - cpu, time.monotonic() - wall


def list_of(folder: Path, num_images: int) -> Path:
    """A list of images, of which the first ones, that are looked up, are there."""
    if not (real := folder / "real").exists():
        link_digits(real, NUM_REAL)
    names = folder / "names.txt"
    with names.open("w") as file:
        file.writelines(f"{path}\n" for path in sorted(real.iterdir()))
        file.writelines(f"/far/{number:012d}.jpg\n" for number in range(NUM_REAL, num_images))
    return names


def measured(folder: Path, num_workers: int, asked: argparse.Namespace) -> dict[str, float]:
    """One job on so many workers."""
    image_s = asked.image_ms / 1000
    num_images = int(num_workers * asked.seconds / image_s)
    names = list_of(folder, num_images)
    shutil.rmtree(folder / "out", ignore_errors=True)
    engine = {"name": "ray", "num_cpus": 1, "workers": num_workers}
    job = load_job(write_tiny_job(folder, input=str(names), engine=engine))
    Counted.num_ranges = 0

    def hire(order: Order) -> RayCrew:
        duty = Duty(order.job, order.model, order.listing, num_images, order.first)
        station = Station(duty)
        opened, _ = station.opened()
        station.stop()
        held = ExitStack()
        held.callback(Connection(order.job.engine).close)
        hired = Counted(order, held)
        director = ray.remote(Director).options(name="director", num_cpus=0)
        hired.director = director.remote(Part(opened, image_s))
        hired.gather()
        return hired

    with hold_output(job, RunOptions().shard):
        began = time.monotonic()
        run_job(Run(job, RunOptions(), Log(), StopRequest(), hire=hire))
        whole_s = time.monotonic() - began
    return {
        "num_workers": num_workers,
        "num_images": num_images,
        "num_ranges": Counted.num_ranges,
        "wall_s": round(Counted.wall_s, 2),
        "whole_s": round(whole_s, 2),
        "efficiency": round(num_images * image_s / num_workers / Counted.wall_s, 4),
        "driver_cpu_share": round(Counted.cpu_s / Counted.wall_s, 4),
        "cpu_ms_per_range": round(1000 * Counted.cpu_s / Counted.num_ranges, 3),
        "cpu_us_per_image": round(1e6 * Counted.cpu_s / num_images, 3),
    }


def of_each_image(folder: Path, num_images: int) -> dict[str, float]:
    """Microseconds of an image that a driver spends on each of the things that it does with all."""
    names = list_of(folder, num_images)
    out = folder / "paper"
    out.mkdir()
    files, found = RunFiles(out), {}

    def timed(what: str, began: float) -> None:
        found[what] = round(1e6 * (time.perf_counter() - began) / num_images, 3)

    job = load_job(write_tiny_job(folder, input=str(names), output=str(out)))
    began = time.perf_counter()
    with drafted(files, IDENTITY, open_store(source_of(job)).entries()) as draft:
        listing = place(files, draft)
    timed("list", began)
    began = time.perf_counter()
    listing.mark(num_images)
    timed("go_through", began)
    folders, ranges = Folders(files.parts, files.parts), Gaps(listing, [(0, num_images)], 0)
    folders.make_parts()
    while (one := ranges.take(PART_IMAGES)) is not None:
        with folders.path(one.first).open("wb") as file:
            file.writelines(encode_record(Record(ref, ANSWER)) for ref in one.refs(listing))
    began = time.perf_counter()
    parts = list(find_parts(files, listing, 0))
    timed("go_on", began)
    began = time.perf_counter()
    with RecordWriter(files.predictions) as writer:
        for part in parts:
            writer.copy(folders.path(part.first), part.num_bytes)
    timed("join", began)
    found["listing_bytes"] = round(files.listing.stat().st_size / num_images, 1)
    found["record_bytes"] = round(files.predictions.stat().st_size / num_images, 1)
    return found


def main() -> None:
    """Each number of workers once, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--image-ms", type=float, default=2.0)
    parser.add_argument("--range-s", type=float, default=5.0)
    parser.add_argument("--listed", type=int, default=2_000_000)
    asked = parser.parse_args()
    setattr(finding, "Member", Sleeper)  # noqa: B010 - it is not exported
    pace.RANGE_S = asked.range_s
    crew.SETTLE_S = START_S
    rows: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, cluster(0) as nodes:
        os.environ.update(QUICK, RAY_ADDRESS=nodes.address)
        nodes.add(num_cpus=max(asked.workers))
        for num_workers in asked.workers:
            rows.append(measured(Path(folder), num_workers, asked))
            print(
                "{num_workers:3} workers {efficiency:6.3f} of linear, {num_ranges:5} ranges; the "
                "driver: {driver_cpu_share:6.1%} of a core, {cpu_ms_per_range:6.2f} ms a range, "
                "{cpu_us_per_image:5.2f} us an image".format(**rows[-1]),
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        each = of_each_image(Path(folder), asked.listed)
    print("us an image: " + ", ".join(f"{what} {value}" for what, value in each.items()))
    print(json.dumps({**vars(asked), "rows": rows, "of_each_image": each}))


if __name__ == "__main__":
    main()
