"""Images that kill, hang or bloat their decoder, damaged ones, and what bad files cost others."""

import os
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson
from PIL import Image

from batchclf.run.recovery import MANY_GUILTY
from tests.faults.jobs import Job, Start, differences, lines_of, make_job, run_json
from tests.faults.poison import CODES, poisoned_environment, write_poison
from tests.faults.report import Options, Report, emptied
from tests.images.common import encode, picture
from tests.images.mutations import mutated, originals
from tests.links import link_images
from tests.tiny import link_digits

BACKENDS = ("threads", "processes")
MAX_SECONDS = 5.0
"""`loader.max_seconds` of poisoned jobs; a bomb takes some of them until it bursts."""
PER_POISON_S = 20.0
"""Within so long each image that kills or holds up its decoder is dealt with: it is tried again."""
NUM_WORKERS = 2
MAX_RESTARTS = {"threads": MANY_GUILTY + NUM_WORKERS, "processes": 0}
"""Of the job, whatever the number of poison files: decoding in threads moves to processes."""
MAX_PIXELS = 4_000_000
"""`loader.max_pixels` of damaged images."""
MIN_SPEED = 0.95
"""Of a job with 5% bad files, in good images a second, compared with the job without them."""
BYTES_PER_PIXEL = 16
"""What Pillow may hold of an image at once, at 4 bytes: as decoded, as RGB, and twice resized."""


# ---- poison --------------------------------------------------------------------------------------


def poison(
    options: Options,
    num_images: int = 5_000,
    kinds: Sequence[str] = tuple(CODES),
    max_seconds: float = MAX_SECONDS,
) -> Report:
    """`count` poison files among good ones: each costs its own record, with the right code."""
    report = options.report("poison", num_poison=0, num_right_codes=0, num_good=0)
    images = link_digits(options.folder / "images", num_images - options.count)
    job = make_job(options.folder / "job", images, options.environment)
    rng = options.rng()
    for number in range(options.count):
        kind = kinds[number % len(kinds)]
        write_poison(images / f"{rng.randrange(num_images):06d}-poison-{number}-{kind}.jpg", kind)
    options.each(BACKENDS, lambda backend: _poisoned(options, job, backend, max_seconds, report))
    return report


def _poisoned(options: Options, job: Job, backend: str, max_seconds: float, report: Report) -> None:
    output = options.folder / backend
    limits = ("--set", f"loader.max_seconds={max_seconds}", "--set", f"loader.backend={backend}")
    with job.started(output, *limits, environment=poisoned_environment()) as start:
        began = time.monotonic()
        exit_code = start.wait(60 + PER_POISON_S * options.count)
        report.figures[f"wall_s_{backend}"] = round(time.monotonic() - began, 1)
        said = f"{backend}: ended with {exit_code}: {start.stderr[-600:]}"
        num_restarts = start.stderr.count("starting it again")
        report.figures[f"num_restarts_{backend}"] = num_restarts
    report.check(exit_code == 0, said)
    report.check(run_json(output).get("status") == "complete", f"{backend}: not complete")
    report.check(num_restarts <= MAX_RESTARTS[backend], f"{backend}: {num_restarts} restarts")
    lines = lines_of(output)
    poisoned = [orjson.loads(line) for line in lines if b"-poison-" in line]
    report.check(len(poisoned) == options.count, f"{backend}: {len(poisoned)} poison records")
    for record in poisoned:
        kind = record["path"].rpartition("-")[2].removesuffix(".jpg")
        is_right = record.get("error", {}).get("code") == CODES[kind]
        report.add("num_right_codes", is_right)
        report.check(is_right, f"{backend}: {kind}: {record}")
    good = [line for line in lines if b"-poison-" not in line]
    report.add("num_poison", len(poisoned))
    report.add("num_good", len(good))
    report.check_none(differences(good, job.lines), f"{backend}: the good ones")


# ---- damaged images ------------------------------------------------------------------------------


def mutations(options: Options) -> Report:
    """`count` damaged images as a job: it ends, with one record each, and in bounded memory."""
    report = options.report("mutations", num_images=options.count)
    files = originals()
    loader = {"workers": NUM_WORKERS, "max_pixels": MAX_PIXELS, "allow_outside_links": True}
    whole = options.folder / "whole"
    whole.mkdir()
    for number, file in enumerate(files):
        (whole / f"{number:06d}{file.suffix}").symlink_to(file)
    damaged = options.folder / "damaged"
    damaged.mkdir()
    for name, content in mutated(options.seed, options.count, files):
        (damaged / name).write_bytes(content)
    job = make_job(options.folder / "job", whole, options.environment, loader=loader)
    _, usual_mb = _watched(job, options.folder / "usual")
    output = options.folder / "out"
    said, peak_mb = _watched(job, output, "-i", str(damaged))
    report.check(said is None, f"{said}")
    records = [orjson.loads(line) for line in lines_of(output)]
    listed = sorted(path.name for path in damaged.iterdir())
    report.check([one["path"] for one in records] == listed, f"{len(records)} records, or others")
    codes = Counter(one.get("error", {}).get("code", "ok") for one in records)
    report.figures["codes"] = dict(codes.most_common())
    bound_mb = usual_mb + NUM_WORKERS * MAX_PIXELS * BYTES_PER_PIXEL / 1e6
    report.figures |= {"peak_mb": peak_mb, "peak_mb_undamaged": usual_mb, "bound_mb": bound_mb}
    report.check(peak_mb <= bound_mb, f"{peak_mb} MB at the most, where {bound_mb} are allowed")
    return report


def _watched(job: Job, output: Path, *arguments: str) -> tuple[str | None, float]:
    """Run a job: what went wrong, and the peak of its processes' memory taken together in MB."""
    ended = threading.Event()
    peak = [0.0]
    with job.started(output, *arguments) as start:
        watcher = threading.Thread(target=_watch, args=(start, ended, peak))
        watcher.start()
        exit_code = start.wait(3600)
        ended.set()
        watcher.join()
        said = None if exit_code == 0 else f"ended with {exit_code}: {start.stderr[-600:]}"
    return said, round(peak[0], 1)


def _watch(start: Start, ended: threading.Event, peak: list[float]) -> None:
    while not ended.wait(0.1):
        peak[0] = max(peak[0], start.memory_mb())


# ---- what bad files cost -------------------------------------------------------------------------


def write_bad_files(folder: Path, good: Path, count: int) -> Counter[str]:
    """Bad files of all the cheap kinds in turn, among the others; how many of which code."""
    jpeg = next(path.read_bytes() for path in sorted(good.iterdir()) if path.suffix == ".jpg")
    codes: Counter[str] = Counter()
    names = sorted(path.name for path in good.iterdir())
    for number in range(count):
        code, write = BAD[number % len(BAD)]
        after = names[number * len(names) // count].partition(".")[0]
        write(folder / f"{after}-bad-{number:04d}.jpg", jpeg)
        codes[code] += 1
    return codes


def _content(make: Callable[[bytes], bytes]) -> Callable[[Path, bytes], object]:
    return lambda path, jpeg: path.write_bytes(make(jpeg))


def _png(**options: Any) -> bytes:
    return encode(picture(64, 48), "PNG", **options)


def _flipped_png() -> bytes:
    """A PNG whose compressed pixels do not match their checksum."""
    content = bytearray(_png())
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def _huge_png() -> bytes:
    """A PNG that claims 30,000 x 30,000 pixels, with a right checksum."""
    content = _png()
    start = content.index(b"IHDR")
    edge = (30_000).to_bytes(4, "big")
    header = b"IHDR" + edge + edge + content[start + 12 : start + 17]
    return content[:start] + header + crc32(header).to_bytes(4, "big") + content[start + 21 :]


def _floats() -> bytes:
    return encode(Image.new("F", (8, 8), 0.5), "TIFF")


BAD: tuple[tuple[str, Callable[[Path, bytes], object]], ...] = (
    ("empty_file", _content(lambda jpeg: b"")),
    ("not_an_image", _content(lambda jpeg: b"<html><title>404 Not Found</title></html>")),
    ("not_an_image", _content(lambda jpeg: b"version https://git-lfs.github.com/spec/v1\n")),
    ("truncated", _content(lambda jpeg: jpeg[: len(jpeg) // 2])),
    ("truncated", _content(lambda jpeg: _png()[:-200])),
    ("corrupt", _content(lambda jpeg: _flipped_png())),
    ("too_large", _content(lambda jpeg: _huge_png())),
    ("unsupported_format", _content(lambda jpeg: b"%!PS-Adobe-3.0 EPSF-3.0\n")),
    ("unsupported_format", _content(lambda jpeg: b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    ("unsupported_mode", _content(lambda jpeg: _floats())),
    ("not_regular_file", lambda path, jpeg: os.mkfifo(path)),
    ("vanished", lambda path, jpeg: path.symlink_to("nowhere.jpg")),
    ("symlink_loop", lambda path, jpeg: path.symlink_to(path.name)),
    ("outside_root", lambda path, jpeg: path.symlink_to("/proc/version")),
)
"""Kinds of research of what users meet: the code of each, and what writes it."""


def bad_share(options: Options, source: Path, num_good: int = 2_000) -> Report:
    """5% bad files among good ones, in turns with the good ones alone, `count` times."""
    report = options.report("bad-share", num_good=num_good, num_bad=num_good // 20)
    good = link_images(source, options.folder / "good", num_good)
    mixed = link_images(source, options.folder / "mixed", num_good)
    codes = write_bad_files(mixed, good, num_good // 20)
    job = make_job(options.folder / "job", good, options.environment, preprocess={"resize": 256})
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(options.count):
        output = emptied(options.folder / "out")
        runs = [partial(_timed, job, emptied(options.folder / "clean"), report)]
        runs.append(partial(_timed, job, output, report, "-i", str(mixed)))
        if number % 2:  # whichever comes first finds a colder machine
            both, clean = runs[1](), runs[0]()
        else:
            clean, both = runs[0](), runs[1]()
        for name, one, other in zip(ratios, clean, both, strict=True):
            ratios[name].append(one / other)
        _check_mixed(job, output, codes, report)
    for name, values in ratios.items():
        report.figures[f"speed_{name}"] = round(statistics.median(values), 3)
        report.figures[f"speeds_{name}"] = [round(value, 3) for value in values]
    report.check(
        report.figures["speed_wall"] >= MIN_SPEED or not report.is_timed,
        f"the speed is {report.figures['speed_wall']} of that without bad files",
    )
    return report


def _check_mixed(job: Job, output: Path, codes: Counter[str], report: Report) -> None:
    lines = lines_of(output)
    kept = [line for line in lines if b"-bad-" not in line]
    report.check_none(differences(kept, job.lines), "the good ones among bad ones")
    records = [orjson.loads(line) for line in lines if b"-bad-" in line]
    found = Counter(one.get("error", {}).get("code", "ok") for one in records)
    report.check(found == codes, f"expected {dict(codes)}, found {dict(found)}")


def _timed(job: Job, output: Path, report: Report, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds of a whole run, start-up included."""
    began, used = time.monotonic(), _cpu_of_children()
    exit_code, stderr = job.run(output, *arguments)
    report.check(exit_code == 0, f"ended with {exit_code}: {stderr[-400:]}")
    return time.monotonic() - began, _cpu_of_children() - used


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
