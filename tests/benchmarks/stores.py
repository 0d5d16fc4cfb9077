"""The same photos as a folder, in archives, in Parquet and in a bucket: as fast, and the same?

    python -m tests.benchmarks.stores [--photos FOLDER] [--num-images 2000] [--rounds 5]
                                      [--side PIXELS] [--forms NAME ...]
                                      [--model NAME=WEIGHTS] [--num-members 1000000]
                                      [--only photos members] [--out FILE]

photos: jobs with a tiny model, or the one named, over the same photos in each form, the forms one
after the other in each round. `speed` is a form's median of images a second, divided by the
folder's in that round; `cpu` likewise, of images a second of its own CPU time: the bucket's server
takes as much again, which `speed` sees where there are few cores.
The records must be those of the folder; the peak memory is that of the worst round. All forms
must fit into the page cache, or it is the disk that is measured: `--side` makes the photos smaller.
members: listing and resuming one tar and one zip archive of many members of a few bytes, each in a
fresh process: members a second, peak RSS, and seconds to the first new record of a job that lacks
100 of them.

Prints a table and, as the last line, the same as JSON.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from batchclf.system.machine import cpu_name_and_flags, usable_cores
from tests.benchmarks.nights import (
    NUM_LEFT,
    log,
    measure_listing,
    measure_resume,
    require_success,
    start,
)
from tests.conftest import ROOT, USERS_ENVIRONMENT, read_records
from tests.engines.common import summary_of
from tests.tiny import assert_same_records, write_tiny_job

PARTS = ("photos", "members")
NUM_TARS, NUM_PARQUETS = 50, 10


# ---- the forms -----------------------------------------------------------------------------------


def shrink(photos: Sequence[Path], side: int, where: Path) -> list[Path]:
    """The photos as JPEGs the shorter side of which has so many pixels."""
    where.mkdir()
    shrunk = []
    for number, photo in enumerate(photos):
        with Image.open(photo) as image:
            scale = side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            path = where / f"{number:06d}.jpg"
            image.convert("RGB").resize(size).save(path, quality=90)
        shrunk.append(path)
    return shrunk


def write_folder(photos: Sequence[Path], folder: Path, num_images: int) -> list[Path]:
    """As many copies of photos under names of their own, in folders of 100."""
    files = []
    for number, photo in enumerate(itertools.islice(itertools.cycle(photos), num_images)):
        path = folder / f"{number // 100:04d}" / f"{number:06d}{photo.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, path)
        files.append(path)
    return files


def parts_of(files: Sequence[Path], num_parts: int) -> Iterator[Sequence[Path]]:
    """Some files, in as many parts that follow each other."""
    size = -(-len(files) // num_parts)
    return (files[at : at + size] for at in range(0, len(files), size))


def write_tars(files: Sequence[Path], root: Path, where: Path, suffix: str = "tar") -> Any:
    """Tar archives; `suffix`: tar, or tar.gz."""
    mode = "w:gz" if suffix == "tar.gz" else "w"
    for number, part in enumerate(parts_of(files, NUM_TARS)):
        with tarfile.open(where / f"{number:04d}.{suffix}", mode) as archive:  # type: ignore[call-overload]
            for path in part:
                archive.add(path, path.relative_to(root))
    return str(where / f"*.{suffix}")


def write_gz(files: Sequence[Path], root: Path, where: Path) -> Any:
    """Compressed tar archives."""
    return write_tars(files, root, where, "tar.gz")


def write_zip(files: Sequence[Path], root: Path, where: Path) -> Any:
    """One zip archive, stored, as photos do not deflate."""
    with zipfile.ZipFile(where / "all.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(root))
    return str(where / "all.zip")


def write_parquets(files: Sequence[Path], root: Path, where: Path) -> Any:
    """Parquet files as `datasets` writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, part in enumerate(parts_of(files, NUM_PARQUETS)):
        rows = [{"bytes": one.read_bytes(), "path": str(one.relative_to(root))} for one in part]
        pq.write_table(pa.table({"image": rows}), where / f"{number}.parquet", row_group_size=100)
    return {"parquet": str(where)}


FORMS: dict[str, Callable[[Sequence[Path], Path, Path], Any]] = {
    "folder": lambda files, root, where: str(root),
    f"{NUM_TARS} tar": write_tars,
    f"{NUM_TARS} tar.gz": write_gz,
    "1 zip": write_zip,
    f"{NUM_PARQUETS} parquet": write_parquets,
    "bucket": lambda files, root, where: "s3://bucket/",
}


# ---- what is measured ----------------------------------------------------------------------------


@contextmanager
def bucket_over(folder: Path) -> Iterator[None]:
    """A server of a bucket over a folder, and the environment that leads there."""
    command = [sys.executable, "-m", "tests.benchmarks.bucket_server", str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        USERS_ENVIRONMENT.update(
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
                "AWS_REGION": "us-east-1",
                "AWS_SKIP_SIGNATURE": "true",
            }
        )
        try:
            yield
        finally:
            server.kill()


def measure_photos(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Images a second of each form, as a share of the folder's."""
    photos = sorted(path for path in arguments.photos.rglob("*") if path.is_file())
    root = work / "photos"
    if arguments.side:
        photos = shrink(photos, arguments.side, work / "shrunk")
    forms = {name: write for name, write in FORMS.items() if name in arguments.forms}
    log(f"writing {arguments.num_images:,} photos in {len(forms)} forms")
    keys: dict[str, Any] = {"provider": "cpu"}
    if arguments.model:
        name, _, weights = arguments.model.partition("=")
        keys |= {"model": {"name": name, "weights": str(Path(weights).absolute())}}
    files = write_folder(photos, root, arguments.num_images)
    jobs: dict[str, Path] = {}
    for name, write in forms.items():
        job_folder = work / name.replace(" ", "-")
        where = job_folder / "packed"
        where.mkdir(parents=True)
        job_input = write(files, root, where)
        jobs[name] = write_tiny_job(job_folder, input=job_input, **keys)
    os.sync()  # nothing of that is to be written while jobs run
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with bucket_over(root):
        for job in jobs.values():
            require_success(start(job, "--limit", "8"))  # which exports the model
        for number in range(arguments.rounds):
            for name, job in jobs.items():
                log(f"round {number + 1}: {name}")
                require_success(start(job, "--overwrite"))
                seen[name].append(summary_of(job.parent / "out"))
    expected = read_records(jobs["folder"].parent / "out")
    for job in jobs.values():
        assert_same_records([inner(one) for one in read_records(job.parent / "out")], expected)
    return {name: figures(seen[name], seen["folder"]) for name in jobs}


def inner(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the path inside of its archive."""
    return record | {"path": "/".join(record["path"].split("/")[-2:])}


def figures(own: Sequence[dict[str, Any]], folder: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of one form come to."""
    pairs = list(zip(own, folder, strict=True))
    shares = [one["images_per_s"] / other["images_per_s"] for one, other in pairs]
    cpu = [other["cpu_s"] / one["cpu_s"] for one, other in pairs]
    return {
        "images_per_s": round(statistics.median(one["images_per_s"] for one in own), 1),
        "speed": round(statistics.median(shares), 3),
        "cpu": round(statistics.median(cpu), 3),
        "list_s": round(statistics.median(one["stage_s"]["list"] for one in own), 3),
        "peak_rss_mb": round(max(one["peak_rss_mb"] for one in own), 1),
    }


def write_members(path: Path, num_members: int) -> Path:
    """An archive of many small members, in folders of 1,000."""
    content = b"\xff\xd8\xff"
    names = (f"{number // 1000:04d}/IMG_{number:08d}.jpg" for number in range(num_members))
    log(f"writing {path.name} of {num_members:,} members")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, content)
        return path
    with path.open("wb") as file:  # `tarfile` would keep each
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
        file.write(bytes(1024))
    return path


def measure_members(num_members: int, work: Path, repeats: int) -> dict[str, Any]:
    """Listing and resuming one archive of many members."""
    found = {}
    for suffix in ("tar", "zip"):
        where = work / suffix
        where.mkdir()
        path = write_members(where / f"all.{suffix}", num_members)
        listing = measure_listing(path, num_members, where)
        resume = measure_resume(path, num_members, where, repeats)
        found[suffix] = {**listing, **{f"resume_{name}": value for name, value in resume.items()}}
        path.unlink()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--photos", type=Path, default=ROOT / "samples" / "photos")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="default: as the photos are")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--model", metavar="NAME=WEIGHTS", help="default: a tiny one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-members", type=int, default=1_000_000, help=f"> {NUM_LEFT}")
    parser.add_argument("--repeats", type=int, default=3, help="of each resume")
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    arguments = parser.parse_args()
    if "folder" not in arguments.forms:
        parser.error("--forms: folder is what the others are compared with")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["BATCHCLF_CACHE_DIR"] = str(work / "models")
        if "photos" in arguments.only:
            found["photos"] = measure_photos(arguments, work)
        if "members" in arguments.only:
            found["members"] = measure_members(arguments.num_members, work, arguments.repeats)
    for part, rows in found.items():
        for name, row in rows.items():
            print(f"{part:<10}{name:<14}{row}")
    answer = {
        "benchmark": "stores",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name_and_flags()[0], "usable_cores": usable_cores()},
        **found,
    }
    text = json.dumps(answer)
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
