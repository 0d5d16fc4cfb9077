"""A job on a Ray cluster of 4 nodes, each in a network namespace, of which no node lives for long.

    python -m tests.faults.ray_nodes --seed 1 --seconds 300 [--images PHOTOS]

Every 20 s a node is killed and started again; meanwhile the link of one is cut and restored, a
worker is frozen, and the driver is killed and started again. Of 20,000 images 5 end or hold up the
process that decodes them; the images are a folder's, linked again and again, or else the sample
digits. What the job writes must be the bytes of a local run. Needs root.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT, command
from tests.engines.ray.cluster import QUICK, Cluster, Node
from tests.faults.poison import poisoned_environment, write_poison
from tests.faults.report import Report
from tests.links import link_images
from tests.tiny import DIGITS, tiny_model, write_tiny_job

NUM_NODES = 4
NUM_IMAGES = 20_000
KILL_S = 20.0
CUT_S = 40.0
"""Longer than a worker that does not answer is waited for."""
FROZEN_S = 30.0
HEAD_IP = "10.77.0.1"
POISON = {2_000: "segfault", 6_000: "abort", 9_999: "exit", 13_000: "segfault", 17_500: "hang"}
JOB_S = 1800.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def network() -> Iterator[list[str]]:
    """A bridge, and a namespace for each node; their names."""
    mark = f"{os.getpid() % 100_000}"
    bridge, names = f"bc{mark}", [f"bclf-{mark}-{number}" for number in range(NUM_NODES)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{HEAD_IP}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            own = f"bc{mark}-{number}"
            ip("link", "add", own, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", own, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{ip_of(number)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def ip_of(number: int) -> str:
    return f"10.77.0.{number + 2}"


@dataclass(slots=True)
class Field:
    """The cluster, the job, and what is done to them."""

    cluster: Cluster
    names: list[str]
    job: Path
    env: Mapping[str, str]
    rng: random.Random
    report: Report
    nodes: dict[int, Node] = field(default_factory=dict)
    is_cut: set[int] = field(default_factory=set)
    driver: "subprocess.Popen[bytes] | None" = None
    frozen: psutil.Process | None = None

    def keep_up(self) -> None:
        """Start again what has ended: a node, the driver."""
        for number in range(NUM_NODES):
            node = self.nodes.get(number)
            if (node is None or node.process.poll() is not None) and number not in self.is_cut:
                self.start_node(number)

    def start_node(self, number: int) -> None:
        if (old := self.nodes.get(number)) is not None:
            self.cluster.remove(old)
        through = ("ip", "netns", "exec", self.names[number])
        self.nodes[number] = self.cluster.add(through=through, ip=ip_of(number))

    def start_driver(self) -> None:
        with (self.job.parent / "said").open("ab") as said:
            self.driver = subprocess.Popen(
                command("run", self.job),
                stdin=subprocess.DEVNULL,
                stderr=said,
                cwd=ROOT,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def kill_node(self) -> None:
        self.nodes[self.rng.randrange(NUM_NODES)].kill()
        self.report.add("num_nodes_killed")

    def cut_link(self) -> None:
        number = self.rng.randrange(NUM_NODES)
        self.is_cut.add(number)
        ip("-n", self.names[number], "link", "set", "eth0", "down")
        self.report.add("num_links_cut")

    def mend_links(self) -> None:
        for number in self.is_cut:
            ip("-n", self.names[number], "link", "set", "eth0", "up")
        self.is_cut.clear()

    def freeze_worker(self) -> None:
        workers = [one for node in self.nodes.values() for one in node.workers()]
        if workers:
            self.frozen = self.rng.choice(workers)
            self.frozen.suspend()
            self.report.add("num_frozen")

    def thaw(self) -> None:
        if self.frozen is not None:
            with suppress(psutil.NoSuchProcess):
                self.frozen.resume()
            self.frozen = None

    def end_driver(self) -> None:
        if self.driver is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def restart_driver(self) -> None:
        self.end_driver()
        self.report.add("num_drivers_killed")
        self.start_driver()


def disturb(field: Field, seconds: float) -> int | None:
    """Disturb the job until it ends, or the time is over; its exit code, if it has ended."""
    try:
        return _disturb(field, seconds)
    finally:
        field.mend_links()
        field.thaw()


def _disturb(field: Field, seconds: float) -> int | None:
    began = time.monotonic()
    kills = (KILL_S * number for number in itertools.count(1))
    plan = sorted(
        [
            *((at, "kill") for at in itertools.takewhile(lambda at: at < seconds, kills)),
            *((at * seconds / 300, what) for at, what in OTHERS),
        ]
    )
    for at, what in plan:
        while time.monotonic() - began < at:
            assert field.driver is not None
            if (code := field.driver.poll()) is not None:
                return code
            field.keep_up()
            time.sleep(0.5)
        match what:
            case "kill":
                field.kill_node()
            case "cut":
                field.cut_link()
            case "mend":
                field.mend_links()
            case "freeze":
                field.freeze_worker()
            case "thaw":
                field.thaw()
            case "driver":
                field.restart_driver()
    return None


OTHERS = (
    *((35.0, "cut"), (35.0 + CUT_S, "mend"), (50.0, "driver")),
    *((90.0, "freeze"), (90.0 + FROZEN_S, "thaw"), (150.0, "driver")),
    *((165.0, "cut"), (165.0 + CUT_S, "mend"), (230.0, "freeze"), (230.0 + FROZEN_S, "thaw")),
)
"""What else is done, and when, of 300 s."""


def check(folder: Path, originals: Path, seed: int, seconds: float) -> Report:
    """Jobs one after the other until the time is over, each compared with the local run."""
    report = Report(f"ray-nodes, seed {seed}")
    images = link_images(originals, folder / "images", NUM_IMAGES)
    names = sorted(images.iterdir())
    for number, kind in POISON.items():
        names[number].unlink()
        write_poison(names[number], kind)
    cache = {"BATCHCLF_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env = {**QUICK, **poisoned_environment(), **cache}
    keys: dict[str, Any] = {
        "input": str(images),
        "model": tiny_model(folder, resize=600, crop=600),
        "loader": {"max_seconds": 5.0},
    }
    local = write_tiny_job(folder, name="local.yaml", output=str(folder / "local"), **keys)
    subprocess.run(command("run", local), check=True, cwd=ROOT, env={**os.environ, **env})
    expected = (folder / "local" / "predictions.jsonl").read_bytes()
    engine = {"name": "ray", "num_cpus": 1, "max_retries": 100}
    job = write_tiny_job(folder, name="ray.yaml", engine=engine, **keys)
    with network() as spaces, Cluster(folder / "ray", env=env, ip=HEAD_IP) as cluster:
        env = {**env, "RAY_ADDRESS": cluster.address}
        field = Field(cluster, spaces, job, env, random.Random(seed), report)
        field.keep_up()
        ends_at = time.monotonic() + seconds
        try:
            while time.monotonic() < ends_at:
                run_one_job(field, ends_at, expected)
        finally:
            field.end_driver()
    return report


def run_one_job(field: Field, ends_at: float, expected: bytes) -> None:
    """A job, disturbed until then, and compared with the local run."""
    folder, report = field.job.parent, field.report
    shutil.rmtree(folder / "out", ignore_errors=True)
    began = time.monotonic()
    field.start_driver()
    code = disturb(field, ends_at - time.monotonic())
    code = finished(field) if code is None else code
    report.add("num_jobs")
    report.largest("longest_job_s", time.monotonic() - began)
    said = (folder / "said").read_text()[-2000:]
    report.check(code == 0, f"ended with {code}: {said}")
    predictions = folder / "out" / "predictions.jsonl"
    found = predictions.read_bytes() if predictions.exists() else b""
    report.check(found == expected, f"other records: {differences(found, expected)}")


def finished(field: Field) -> int:
    """The exit code of a job that is left alone."""
    assert field.driver is not None
    ends_at = time.monotonic() + JOB_S
    while (code := field.driver.poll()) is None and time.monotonic() < ends_at:
        field.keep_up()
        time.sleep(0.5)
    if code is None:
        field.end_driver()
        return -1
    return code


def differences(found: bytes, expected: bytes) -> str:
    """How many lines are lost, doubled or others, and the first."""
    ours, theirs = found.splitlines(), expected.splitlines()
    others = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
    return f"{len(ours):,} of {len(theirs):,} lines, {len(others):,} others: {others[:1]}"


def main() -> None:
    """One seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.ray_nodes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--images", type=Path, default=DIGITS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        (Path(folder) / "ray").mkdir()
        report = check(Path(folder), asked.images, asked.seed, asked.seconds)
        report.print()
    sys.exit(report.exit_code)


if __name__ == "__main__":
    main()
