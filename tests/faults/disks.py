"""Small disks: the output on a tmpfs with too few bytes or inodes, which is then enlarged."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.jobs import Job, lines_of, make_job, run_json, whole_prefix
from tests.faults.report import Options, Report
from tests.tiny import link_digits

KIB = 1024
SIZES = [64 * KIB << doubled for doubled in range(8)]
"""64 KiB to 8 MiB."""
INODES = range(2, 14)
"""One is the folder itself."""
LARGE = "size=256m,nr_inodes=1000"


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.geteuid() == 0


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """A file system mounted on a new folder, until the end of the block."""
    folder.mkdir()
    subprocess.run(["mount", *arguments, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def small_disk(options: Options, num_images: int = 20_000, sizes: Sequence[int] = ()) -> Report:
    """Disks of each size in turn, then of random ones; then disks with few inodes."""
    report = options.report("small-disk", num_disks=0, num_full=0)
    images = link_digits(options.folder / "images", num_images)
    job = make_job(options.folder / "job", images, options.environment, top_k=10)
    report.figures["output_mb"] = round(sum(map(len, job.lines)) / 1e6, 1)
    rng = options.rng()
    limits = [f"size={size}" for size in sizes or SIZES]
    limits += [f"size=64m,nr_inodes={number}" for number in INODES]
    while len(limits) < options.count:
        limits.append(f"size={int(64 * KIB * 2 ** rng.uniform(0, 7))}")
    options.each(
        limits[: options.count], lambda limit: _on_a_small_disk(options, job, limit, report)
    )
    return report


def _on_a_small_disk(options: Options, job: Job, limit: str, report: Report) -> None:
    folder = options.folder / f"disk-{report.number()}"
    with mounted(folder, "-t", "tmpfs", "-o", limit, "tmpfs"):
        output = folder / "out"
        exit_code, stderr = job.run(output)
        report.add("num_disks")
        said = f"{limit}: ended with {exit_code}: {stderr[-400:]}"
        if exit_code == 0:
            report.check_none(job.complaints(output), f"{limit}, and exit code 0")
            return
        report.add("num_full")
        lines = [line for line in stderr.splitlines() if "No space left on device" in line]
        report.check(exit_code == 5 and len(lines) == 1, said)
        report.check(all(str(output) in line for line in lines), f"no path; {said}")
        report.check("Traceback" not in stderr, said)
        report.check(run_json(output).get("status") != "complete", f"looks complete; {said}")
        whole = whole_prefix(lines_of(output), job.lines)
        report.check(whole is not None, f"other records; {said}")
        subprocess.run(["mount", "-o", f"remount,{LARGE}", folder], check=True)
        report.check_none(job.resumed(output), f"enlarged after {limit}")
