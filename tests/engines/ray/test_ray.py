"""Engine ray on a real cluster of processes: the output is a local run's, whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchclf import __version__
from batchclf.results.files import RunFiles
from batchclf.results.parts import Folders
from batchclf.runtime.providers import PROVIDERS, compiled_in
from tests.conftest import Batchclf, read_records
from tests.engines.common import (
    assert_as_undisturbed,
    fault,
    finished,
    run_json,
    started,
    summary_of,
    write_job,
)
from tests.engines.ray.cluster import QUICK, Cluster, cluster, free_port
from tests.engines.ray.test_station import SLOW, until
from tests.engines.test_supervisor import poison
from tests.tiny import link_digits

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: the extra `ray`"
)
BY_HAND = pytest.mark.skipif(
    not os.environ.get("CI"), reason="10 s each beside the others: set CI=1 to run them, too"
)
NUM_IMAGES = 400
"""At some 5 ms of a core each, of one core a node."""


def write_ray_job(folder: Path, num_images: int = NUM_IMAGES, **keys: Any) -> Path:
    """A job on the cluster, its images slow; the undisturbed records are a local run's."""
    engine = {"name": "ray", "num_cpus": 1, **keys.pop("engine", {})}
    return write_job(folder, num_images, slow=True, engine=engine, **keys)


def lines_of(output: Path) -> bytes:
    return (output / "predictions.jsonl").read_bytes()


def has_parts(output: Path, number: int) -> Callable[[], bool]:
    """Whether so many parts are committed."""
    return lambda: len(list((output / "parts").glob("*.jsonl"))) >= number


def num_lines(paths: Iterable[Path]) -> int:
    """Of files, any of which may be taken away just now."""
    found = 0
    for path in paths:
        with suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def node_lines(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "stats.jsonl").read_bytes().splitlines())
    return [line for line in lines if line["type"] == "node"]


@contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    """Processes that do nothing within, and do not know it."""
    for one in processes:
        one.suspend()
    try:
        yield
    finally:
        for one in processes:
            with suppress(psutil.NoSuchProcess):
                one.resume()


# ---- nothing happens -----------------------------------------------------------------------------


def test_a_job_on_two_nodes_writes_the_bytes_of_a_local_run(
    ray_cluster: Cluster, tmp_path: Path, batchclf: Batchclf
) -> None:
    job = write_ray_job(tmp_path, 600)
    done = batchclf("run", job, "--json")
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    assert lines_of(out) == lines_of(tmp_path / "undisturbed")
    assert "2 workers on 2 nodes, each with 1 CPU" in done.stderr
    assert (done.json["num_images"], done.json["num_new"]) == (600, 600)
    assert done.json["provider"]["active"] == "CPUExecutionProvider"
    assert done.json["stage_s"]["infer"] > 0
    left = {".lock", "listing.nul", "predictions.jsonl", "run.json", "stats.jsonl"}
    assert set(os.listdir(out)) == left
    assert run_json(out)["num_streams"] == 2
    told = node_lines(out)[-2:]
    assert len({line["node"] for line in told}) == 2
    assert sum(line["num_images"] for line in told) >= 600
    again = batchclf("run", job)
    assert (again.exit_code, "already complete" in again.stderr) == (0, True)


@BY_HAND
def test_a_driver_outside_of_the_cluster_reaches_it_through_rays_client(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    address = f"ray://{ray_cluster.ip}:{ray_cluster.client_port}"
    job = write_ray_job(tmp_path, 60, engine={"address": address})
    code, said = finished(job)
    assert code == 0, said
    assert "did not arrive" not in said, "what an autoscaler was asked for"
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_failed_images_are_tried_again_on_the_cluster_and_others_stay(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path, 60)
    images = sorted((tmp_path / "images").iterdir())
    kept = {path: path.read_bytes() for path in (images[7], images[8], images[40])}
    for path in kept:
        path.unlink()
        path.write_bytes(b"no image")
    code, said = finished(job)
    assert code == 0, said
    assert summary_of(tmp_path / "out")["num_errors"] == 3
    for path, data in kept.items():
        path.write_bytes(data)
    code, said = finished(job, "--retry-failed")
    assert code == 0, said
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")
    assert run_json(tmp_path / "out")["retries"][0]["codes"] == ["not_an_image"]


def asked(program: str) -> str:
    """What a program says that a process of the cluster runs."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_ray_tells_on_which_nodes_nobody_uses_what_a_worker_takes(ray_cluster: Cluster) -> None:
    program = """
import ray
from batchclf.engines.ray.cluster import Connection, Need, idle_nodes, nodes
from batchclf.spec.job import EngineSpec
connection = Connection(EngineSpec(name="ray"))
there = {node.id for node in nodes() if node.total.get("CPU")}

@ray.remote(num_cpus=1)
class User:
    def node(self):
        return ray.get_runtime_context().get_node_id()

user = User.remote()
used = ray.get(user.node.remote())
found = len(there), idle_nodes(Need(1.0, 0.0)) == there - {used}, idle_nodes(Need(2.0, 0.0))
connection.close()
print(*found)
"""
    assert asked(program) == "2 True set()"


def test_a_crew_that_cannot_be_hired_leaves_no_connection(ray_cluster: Cluster) -> None:
    program = """
from types import SimpleNamespace
import ray
from batchclf.engines.ray import crew, engine
from batchclf.spec.job import EngineSpec

def broken(*args):
    assert ray.is_initialized()
    raise OSError("no more")

crew.Finding = broken
files = SimpleNamespace(parts=None, new_drafts=lambda: None)
removed = []
crew.remove_folder = removed.append
job = SimpleNamespace(engine=EngineSpec(name="ray"))
try:
    engine.hire(SimpleNamespace(job=job, files=files))
except OSError as error:
    print(error, ray.is_initialized(), len(removed))
"""
    assert asked(program) == "no more False 1"


# ---- something happens ---------------------------------------------------------------------------


def test_poison_costs_its_record_and_a_killed_process_costs_none(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path)
    codes = poison(tmp_path, _3="segfault", _250="abort", _310="exit")
    with started(job) as run:
        run.wait_until(has_parts(tmp_path / "out", 1))
        ray_cluster.nodes[1].worker().kill()
        run.wait_to_say("killed by SIGKILL")
        assert run.end() == 0, run.stderr
        said = run.stderr
    assert_as_undisturbed(tmp_path, but=codes)
    assert "recorded as decoder_crash" in said
    about = [line for line in said.splitlines() if "SIGSEGV" in line]
    assert about
    assert all(line.startswith("batchclf: node ") for line in about)


def test_a_node_that_dies_is_done_without_and_one_that_joins_is_used(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path)
    with started(job) as run:
        run.wait_until(has_parts(tmp_path / "out", 2))
        with suspended(ray_cluster.nodes[2].workers()):  # so that there is work until one joins
            ray_cluster.remove(ray_cluster.nodes[1])
            node = ray_cluster.add()
            run.wait_to_say("; done elsewhere: images")
            run.wait_to_say("a worker joins")
            assert len(node.workers()) == 1
        assert run.end() == 0, run.stderr
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")
    assert len({line["node"] for line in node_lines(tmp_path / "out")}) in (2, 3)


@BY_HAND
def test_a_node_whose_workers_fail_at_their_work_is_given_up_and_the_others_go_on(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    program = """
def change(module):
    def write(self, records):
        from batchclf.errors import EnvironmentFailed
        raise EnvironmentFailed("the disk is full")
    module.RecordWriter.write = write
"""
    job, others = write_ray_job(tmp_path), ray_cluster.nodes[1:]
    env = fault(tmp_path, program, "batchclf.results.writer")
    with started(job) as run:
        run.wait_until(has_parts(tmp_path / "out", 1))
        with suspended([worker for node in others for worker in node.workers()]):
            node = ray_cluster.add(env=env)
            try:
                run.wait_to_say("going on without this node")
            finally:
                ray_cluster.remove(node)
        assert run.end() == 0, run.stderr
        said = run.stderr
    assert len(re.findall(r"a worker failed: node .*: the disk is full", said)) == 3
    assert said.count("going on without this node") == 1
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_images_whose_workers_are_lost_too_often_end_the_job_naming_them(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    engine = {"max_retries": 0, "workers": 1}
    with started(write_ray_job(tmp_path, engine=engine)) as run:
        run.wait_until(has_parts(tmp_path / "out", 1))
        (node,) = (node for node in ray_cluster.nodes if node.workers())
        node.actors()[0].kill()
        assert run.end() == 1
        assert "1 worker on 1 node, each with" in run.stderr
        assert "1 workers were lost with them, the last on node" in run.stderr
    code, said = finished(tmp_path / "job.yaml", "--set", "engine=local")
    assert code == 0, said
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_worker_that_is_frozen_with_who_watches_it_holds_nothing_up(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path)
    with started(job) as run:
        run.wait_until(has_parts(tmp_path / "out", 1))
        node = ray_cluster.nodes[1]
        with suspended([*node.workers(), *node.actors()]):
            assert run.end() == 0, run.stderr
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


def test_a_driver_that_is_killed_goes_on_from_the_parts_which_nobody_changes(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job, out = write_ray_job(tmp_path, 800), tmp_path / "out"
    with started(job) as run:
        run.wait_until(has_parts(out, 3))
        for one in run.members():
            one.kill()
        run.process.wait()
    before = {path: path.stat().st_ino for path in (out / "parts").glob("*.jsonl")}
    with started(job) as run:
        run.wait_until(has_parts(out, len(before) + 1))
        assert {path: path.stat().st_ino for path in before} == before
        assert run.end() == 0, run.stderr
        assert "of 800 images" in run.stderr
    assert lines_of(out) == lines_of(tmp_path / "undisturbed")
    summary = summary_of(out)
    assert summary["num_images"] == 800
    assert summary["num_new"] < 800 - 3 * 8


def test_a_signal_commits_what_is_in_flight_and_the_local_engine_goes_on(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job, out = write_ray_job(tmp_path, 800), tmp_path / "out"
    with started(job) as run:
        run.wait_until(has_parts(out, 2))
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM
        said = run.stderr
    assert "stopped by SIGTERM; run the same command to resume" in said
    assert run_json(out)["status"] == "interrupted"
    folders = Folders(RunFiles(out).parts, RunFiles(out).parts)
    assert folders.parts.exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".drafts")]
    code, said = finished(job, "--set", "engine=local")
    assert code == 0, said
    assert "resuming after" in said
    assert lines_of(out) == lines_of(tmp_path / "undisturbed")
    assert len(read_records(out)) == 800


@BY_HAND
def test_what_is_written_in_a_long_batch_when_a_signal_comes_is_kept(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    path = fault(tmp_path, SLOW, "batchclf.runtime.ranking")["PYTHONPATH"]
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join([path, os.environ["PYTHONPATH"]])}}
    job, out = write_ray_job(tmp_path, 400, engine={"runtime_env": env}), tmp_path / "out"
    num_written = 2 * 4 * 4  # of each of two workers four batches, before one that has no end
    with started(job) as run:
        run.wait_until(lambda: num_lines(out.glob(".drafts*/*.jsonl")) >= num_written)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, "it is not waited for"
    assert num_lines((out / "parts").iterdir()) >= num_written
    code, said = finished(job, "--set", "engine=local")
    assert code == 0, said
    assert lines_of(out) == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_node_that_loses_a_mount_below_the_input_records_nothing_of_it(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    (tmp_path / "images").mkdir()
    mounted = link_digits(tmp_path / "images" / "mounted", 2000)
    job = write_ray_job(tmp_path, errors={"max": 0})
    node = ray_cluster.add(through=("unshare", "--mount"))
    try:
        with started(job) as run:
            run.wait_until(has_parts(tmp_path / "out", 4))
            (pid, *_) = [one.pid for one in node.members() if one.name() == "raylet"]
            over = ("mount", "-t", "tmpfs", "none", str(mounted))
            subprocess.run(["nsenter", "-t", str(pid), "-m", *over], check=True)
            run.wait_to_say("is the input still mounted on this node?")
            assert run.end() == 0, run.stderr
            said = run.stderr
    finally:
        ray_cluster.remove(node)
    assert "going on without this node" in said
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_images_that_are_removed_while_the_job_runs_are_recorded_as_missing(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path)
    gone = sorted((tmp_path / "images").iterdir())[300:350]
    with started(job) as run:
        run.wait_until(has_parts(tmp_path / "out", 1))
        for path in gone:
            path.unlink()
        assert run.end() == 0, run.stderr
    assert_as_undisturbed(tmp_path, but={path.name: "vanished" for path in gone})


# ---- nodes that are not there yet, or never ------------------------------------------------------


@BY_HAND
def test_a_cluster_without_nodes_is_waited_for_as_long_as_the_job_says(tmp_path: Path) -> None:
    with cluster(0) as found:
        job = write_ray_job(tmp_path, 40, engine={"address": found.address})
        code, said = finished(job, "--set", "engine.wait_for_nodes=1")
        assert code == 5, said
        assert "each worker takes 1 CPU, and no node of the cluster has as much" in said
        with started(job, env=QUICK) as run:
            run.wait_to_say("an autoscaler, where the cluster has one, is asked for 1 times 1 CPU")
            found.add()
            assert run.end() == 0, run.stderr
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_job_that_all_nodes_left_waits_for_one_for_so_long_and_is_resumed(tmp_path: Path) -> None:
    with cluster(1) as found:
        job = write_ray_job(tmp_path, engine={"address": found.address})
        with started(job, env=QUICK) as run:
            run.wait_until(has_parts(tmp_path / "out", 1))
            found.remove(found.nodes[1])
            run.wait_to_say("no node is left to work on; waiting for one to join, up to 300 s")
            found.add()
            run.wait_to_say("a worker joins")
            run.wait_until(has_parts(tmp_path / "out", 2))
            run.process.send_signal(signal.SIGTERM)
            assert run.end() == 128 + signal.SIGTERM
        with started(job, "--set", "engine.wait_for_nodes=1", env=QUICK) as run:
            run.wait_to_say("resuming after")
            run.wait_to_say("1 worker on 1 node, each with")
            found.remove(found.nodes[1])
            assert run.end() == 5, run.stderr
            assert "none has joined in 1 s (engine.wait_for_nodes)" in run.stderr
        assert run_json(tmp_path / "out")["status"] == "failed"
        found.add()
        code, said = finished(job)
        assert code == 0, said
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_rays_autoscaler_starts_the_nodes_that_a_job_lacks_and_ends_them_after_it(
    tmp_path: Path,
) -> None:
    with cluster(1, most=2) as found:
        head, one = found.nodes
        job = write_ray_job(tmp_path, 1000, engine={"address": found.address, "workers": 3})
        with started(job, env=QUICK) as run:
            run.wait_until(has_parts(tmp_path / "out", 1))
            with suspended(one.workers()):  # so that there is work until they come
                run.wait_until(lambda: run.stderr.count("a worker joins") == 2)
                assert len(head.raylets()) == 3, "its own, and one for each of them"
                assert len(head.workers()) == 2
            assert run.end() == 0, run.stderr
        until(lambda: len(head.raylets()) == 1)
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_busy_cluster_is_waited_for_and_that_is_said(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = write_ray_job(tmp_path / "first"), write_ray_job(tmp_path / "second", 40)
    with started(first) as busy:
        busy.wait_until(has_parts(tmp_path / "first" / "out", 1))
        with started(second) as run:
            workers = [one for node in ray_cluster.nodes for one in node.workers()]
            with suspended(workers):
                run.wait_to_say("the cluster has 0 of 2 CPU free; what others use is waited for")
            assert busy.end() == 0, busy.stderr
            assert run.end() == 0, run.stderr


@BY_HAND
def test_a_job_of_one_worker_takes_the_node_that_another_leaves_idle(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = write_ray_job(tmp_path / "first", engine={"workers": 1})
    second = write_ray_job(tmp_path / "second", 40, engine={"workers": 1})
    with started(first) as busy:
        busy.wait_until(has_parts(tmp_path / "first" / "out", 1))
        with suspended([one for node in ray_cluster.nodes for one in node.workers()]):
            code, said = finished(second)
            assert code == 0, said
        assert busy.end() == 0, busy.stderr


@BY_HAND
@pytest.mark.parametrize("is_first", [False, True])
def test_a_node_that_fails_late_ends_a_job_that_began_with_it_and_else_is_left_out(
    ray_cluster: Cluster, tmp_path: Path, is_first: bool
) -> None:
    program = """
def change(module):
    def fail(*args, **kwargs):
        from batchclf.errors import ProviderError
        time.sleep(12)
        raise ProviderError("its driver is too old")
    module.settle_provider = fail
"""
    env = fault(tmp_path, program, "batchclf.sessions.open")
    hasty = "def change(module):\n    module.SETTLE_S = 1.0\n"
    (tmp_path / "hasty").mkdir()
    hurried = fault(tmp_path / "hasty", hasty, "batchclf.engines.ray.crew")
    job = write_ray_job(tmp_path, 4000)
    others = ray_cluster.nodes[1:]
    nodes = [ray_cluster.add(env=env)] if is_first else []
    try:
        with started(job, env=hurried) as run:
            run.wait_until(has_parts(tmp_path / "out", 1))
            with suspended([worker for node in others for worker in node.workers()]):
                if is_first:
                    assert run.end() == 4, run.stderr
                else:
                    nodes.append(ray_cluster.add(env=env))
                    run.wait_to_say("going on without this node")
            if not is_first:
                assert run.end() == 0, run.stderr
            said = run.stderr
    finally:
        for node in nodes:
            ray_cluster.remove(node)
    assert "its driver is too old" in said
    assert ("going on without this node" in said) is not is_first
    if not is_first:
        assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_node_whose_disk_is_full_ends_the_job_naming_it_or_is_left_out(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    cache = tmp_path / "cache"
    cache.mkdir()
    full = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=4k none {cache}; exec "$@"')
    node = ray_cluster.add(through=(*full, "sh"), env={"BATCHCLF_CACHE_DIR": str(cache)})
    try:
        job = write_ray_job(tmp_path, 60)
        code, said = finished(job)
        assert code == 5, said
        assert re.search(r"node \S+ \(.*\): .*the model cannot be unpacked: No space left", said)
        code, said = finished(job, "--set", "engine.allow_fewer=true")
        assert code == 0, said
        assert "going on without this node: node " in said
    finally:
        ray_cluster.remove(node)
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


@BY_HAND
def test_a_worker_that_ray_ends_as_memory_runs_out_is_told_of_and_its_range_done_again(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    memory = psutil.virtual_memory()
    spare = 2 << 30
    threshold = (memory.total - memory.available + spare) / memory.total
    env = {"RAY_memory_monitor_refresh_ms": "50", "RAY_memory_usage_threshold": f"{threshold:.4f}"}
    node = ray_cluster.add(env=env, num_cpus=2)
    try:
        with started(write_ray_job(tmp_path, 4000)) as run:
            run.wait_until(lambda: len(node.workers()) == 2)
            run.wait_until(has_parts(tmp_path / "out", 8))
            workers = [one for other in ray_cluster.nodes for one in other.workers()]
            with suspended(workers):  # so that there is work until then
                taken = b"\1" * (spare + (1 << 28))
                run.wait_to_say("a worker was ended by Ray, as memory ran out there")
                del taken
            assert run.end() == 0, run.stderr
    finally:
        ray_cluster.remove(node)
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "undisturbed")


# ---- wrong set-ups -------------------------------------------------------------------------------

BROKEN = """
import sys
if any("worker" in one for one in sys.orig_argv):
    import batchclf
    batchclf.__version__ = "0.0.1"
"""


def wrong(tmp_path: Path, **engine: Any) -> tuple[int, str]:
    return finished(write_ray_job(tmp_path, 20, engine=engine))


def test_no_cluster_at_the_address_is_said_before_ray_is_asked(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    for one in (address, f"ray://{address}"):
        code, said = wrong(tmp_path, address=one)
        assert code == 5, said
        assert f"no Ray cluster answers at {one}: Connection refused" in said


def test_what_no_node_has_is_refused_with_what_was_found(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    code, said = wrong(tmp_path, num_gpus=1)
    assert code == 4, said
    assert "each worker needs 1 GPU, and no node of the cluster offers as much" in said
    code, said = wrong(tmp_path, resources={"fast_disk": 1})
    assert code == 2, said
    assert "each worker takes 1 CPU, 1 fast_disk, and no node" in said


@pytest.mark.skipif(
    PROVIDERS["openvino"].execution_provider in compiled_in(), reason="the provider works here"
)
def test_a_provider_that_does_not_work_on_a_node_ends_the_job_naming_it(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    job = write_ray_job(tmp_path, 20)
    code, said = finished(job, "--provider", "openvino")
    assert code == 4, said
    assert re.search(r"^batchclf: node \S+ \(.*\): provider openvino: ", said, re.M)
    assert not (tmp_path / "out" / "run.json").exists()
    code, said = finished(job, "--provider", "openvino", "--set", "engine.allow_fewer=true")
    assert code == 4, said
    assert said.count("going on without this node") == 1, "the other is the last"


def test_another_version_on_a_node_ends_the_job_naming_it(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path / "other"), os.environ["PYTHONPATH"]])
    code, said = wrong(tmp_path, runtime_env={"env_vars": {"PYTHONPATH": path}})
    assert code == 5, said
    told = f"runs batchclf 0.0.1, and the driver {__version__}: install the same on all nodes"
    assert told in said
    assert "node " in said


@BY_HAND
def test_a_node_that_does_not_reach_the_output_ends_the_job_or_is_left_out(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    mounted = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden}; exec "$@"', "sh")
    node = ray_cluster.add(through=mounted)
    try:
        job = write_ray_job(tmp_path, 60, output=str(hidden / "out"))
        code, said = finished(job)
        assert code == 5, said
        assert "is not the folder that the driver writes to" in said
        code, said = finished(job, "--set", "engine.allow_fewer=true", "--set", "engine.workers=3")
        assert code == 0, said
        assert "going on without this node: node " in said
        assert "2 workers on 2 nodes" in said
        assert lines_of(hidden / "out") == lines_of(tmp_path / "undisturbed")
    finally:
        ray_cluster.remove(node)
