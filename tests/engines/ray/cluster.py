"""A real Ray cluster on this machine: a head without cores, and nodes, each some processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.engines.common import WORKER

WAIT_S = 180.0
"""Beyond which a node hangs; many are started at once here, on few cores."""
HEAD = "f" * 51 + "00000"
"""The head's name, as Ray's provider of nodes on this machine wants it."""
SCALING: Mapping[str, str] = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
}
QUICK: Mapping[str, str] = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
}
"""A dead node is found dead in seconds, and nothing runs that no test looks at."""


def own_ip() -> str:
    """The address that Ray would take for this machine's: of its way out, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, suppress(OSError):
        one.connect(("192.0.2.1", 9))  # sends nothing
        found: str = one.getsockname()[0]
        return found
    return "127.0.0.1"


COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
"""Keys that its autoscaler wants, though such nodes need none of them."""


@dataclass(slots=True)
class Node:
    """A node: `ray start` and all that it started."""

    process: subprocess.Popen[bytes]

    def members(self) -> list[psutil.Process]:
        """Its processes that are there now."""
        with suppress(psutil.NoSuchProcess):
            this = psutil.Process(self.process.pid)
            return [this, *this.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        """Those that do a job's work."""
        found = []
        for one in self.members():
            with suppress(psutil.NoSuchProcess):
                if any(WORKER in part for part in one.cmdline()):
                    found.append(one)
        return found

    def raylets(self) -> list[psutil.Process]:
        """Its own, and those of nodes that its autoscaler started."""
        found = []
        for one in self.members():
            with suppress(psutil.NoSuchProcess):
                if one.name() == "raylet" and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def worker(self) -> psutil.Process:
        """The one that it has, or is about to have."""
        ends_at = time.monotonic() + WAIT_S
        while not (found := self.workers()):
            assert time.monotonic() < ends_at, "no worker comes"
            time.sleep(0.02)
        return found[0]

    def actors(self) -> list[psutil.Process]:
        """The processes that watch them."""
        return [parent for one in self.workers() if (parent := one.parent()) is not None]

    def kill(self) -> None:
        """As a machine that loses power: all at once, without a word."""
        for _ in range(3):
            for one in self.members():
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait()


@dataclass(slots=True)
class Cluster:
    """A head and its nodes; use as a context manager."""

    temporary: Path
    env: Mapping[str, str] = field(default_factory=dict)
    through: Sequence[str] = ()
    """What the head is started through, such as `ip netns exec`."""
    most: int = 0
    """Nodes of one core that Ray's autoscaler starts when they are asked for."""
    ip: str = field(default_factory=own_ip)
    port: int = 0
    client_port: int = 0
    """Of Ray's client, for drivers outside."""
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.port}"

    def __enter__(self) -> "Cluster":
        self.port, self.client_port = free_port(), free_port()
        port, folder = f"--port={self.port}", f"--temp-dir={self.temporary}"
        client = f"--ray-client-server-port={self.client_port}"
        head = ("--head", port, client, folder, "--include-dashboard=false")
        scaling = self._scaling() if self.most else ()
        self.add(
            *head,
            *scaling,
            num_cpus=0,
            env=SCALING if scaling else None,
            through=self.through,
            ip=self.ip,
        )
        return self

    def _scaling(self) -> tuple[str, ...]:
        """Options of a head with Ray's own autoscaler, whose provider of nodes is this machine."""
        one = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        path = self.temporary / "autoscaler.json"
        path.write_text(
            json.dumps(
                {
                    **{key: {} for key in ("auth", "docker", "file_mounts")},
                    **{key: [] for key in COMMANDS},
                    "cluster_name": "test",
                    "upscaling_speed": 1.0,
                    "file_mounts_sync_continuously": False,
                    "max_workers": self.most,
                    "idle_timeout_minutes": 0.05,
                    "provider": {
                        "type": "fake_multinode",
                        "gcs_address": self.address,
                        "head_node_id": HEAD,
                        "launch_multiple": True,
                        "use_node_id_as_ip": True,
                    },
                    "head_node_type": "ray.head.default",
                    "available_node_types": {
                        "ray.head.default": head,
                        "one": {**one, "min_workers": 0, "max_workers": self.most},
                    },
                }
            )
        )
        return (f"--autoscaling-config={path}",)

    def __exit__(self, *problem: object) -> None:
        for node in reversed(self.nodes):
            node.kill()

    def add(
        self,
        *options: str,
        num_cpus: int = 1,
        env: Mapping[str, str] | None = None,
        through: Sequence[str] = (),
        ip: str | None = None,
    ) -> Node:
        """Start a node, and wait until the cluster knows it."""
        where = options if "--head" in options else (f"--address={self.address}", *options)
        command = [
            *(*through, sys.executable, "-c", "from ray.scripts.scripts import main; main()"),
            *("start", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
            *("--object-store-memory=80000000", f"--node-ip-address={ip or self.ip}", *where),
        ]
        log = self.temporary / f"node-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **QUICK, **self.env, **(env or {})},
                start_new_session=True,
            )
        node = Node(process)
        self.nodes.append(node)
        try:
            _await_start(process, log)
        except BaseException:  # of a head, nobody else would end it
            self.remove(node)
            raise
        return node

    def remove(self, node: Node) -> None:
        """Kill a node."""
        node.kill()
        self.nodes.remove(node)


def _await_start(process: subprocess.Popen[bytes], log: Path) -> None:
    ends_at = time.monotonic() + WAIT_S
    while "runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends_at, log.read_text()
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def cluster(num_nodes: int, **keys: Any) -> Iterator[Cluster]:
    """A head and so many nodes of one core each."""
    # Its sockets' paths must be short.
    with (
        tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,
        Cluster(Path(folder), **keys) as found,
    ):
        for _ in range(num_nodes):
            found.add()
        yield found
