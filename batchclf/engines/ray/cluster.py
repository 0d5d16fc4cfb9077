"""The cluster: connected to, its nodes, and how many workers they have room for."""

import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any

from batchclf.errors import BatchclfError, EnvironmentFailed, ProviderError, UsageError
from batchclf.spec.job import EngineSpec, JobSpec

CONNECT_S = 5.0
REPEAT_S = 30.0
"""How often an autoscaler is asked for the same again."""
USUAL_CPUS = 4.0
"""Cores of a worker that classifies on them: more of them than that do better as two workers."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A machine of the cluster, as far as Ray is concerned."""

    id: str
    name: str
    total: Mapping[str, float]
    """What it has, whoever uses it."""


@dataclass(frozen=True, slots=True)
class Need:
    """What each worker takes of its node."""

    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray's autoscaler wants it."""
        return {
            name: amount
            for name, amount in {
                "CPU": self.num_cpus,
                "GPU": self.num_gpus,
                **self.resources,
            }.items()
            if amount
        }

    def __str__(self) -> str:
        return ", ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())

    def room_on(self, node: Node) -> int:
        """How many workers a node can have at once."""
        return self.room_in(node.total)

    def room_in(self, resources: Mapping[str, float]) -> int:
        """How many workers some resources are enough for."""
        return min(
            math.floor(resources.get(name, 0.0) / amount + 1e-9)
            for name, amount in self.bundle.items()
        )


class Connection:
    """This process as a driver of a cluster, until it is closed."""

    def __init__(self, engine: EngineSpec) -> None:
        """Connect.

        Raises:
            UsageError: Ray is not installed.
            EnvironmentFailed: there is no cluster at the address, or it is of another version.
        """
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError(
                "engine: ray is not installed: pip install 'batchclf[ray]', or use engine local"
            ) from None
        _require_reachable(engine.address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if engine.address == "local":
            options["include_dashboard"] = False
        if engine.runtime_env:
            options["runtime_env"] = engine.runtime_env
        with ExitStack() as stack:
            # Ray tells stdout of each node that ends, with pages of its state; here it is a line.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            try:
                ray.init(engine.address, namespace="batchclf", **options)
            except (ray.exceptions.RayError, RuntimeError, OSError, ValueError) as error:
                raise EnvironmentFailed(f"engine: {_why_not(engine.address, error)}") from error
            stack.callback(ray.shutdown)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Leave the cluster."""
        self._stack.close()


def _require_reachable(address: str) -> None:
    """Ask for a connection first: Ray itself waits more than a minute where nobody is there.

    Raises:
        EnvironmentFailed: nothing listens there.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), CONNECT_S).close()
    except OSError as error:
        raise EnvironmentFailed(
            f"engine: no Ray cluster answers at {address}: {error.strerror or error}; start one "
            "(`ray start --head`), mend engine.address, or use engine local"
        ) from error


def _why_not(address: str, error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, ConnectionError) and address == "auto":
        return (
            "found no Ray cluster that this machine is of; start one (`ray start --head`), give "
            "engine.address (local: a cluster of this machine alone), or use engine local"
        )
    if "ersion mismatch" in text:
        return (
            f"the cluster at {address} runs another version of Ray or Python than this process; "
            f"run the job in the same environment as the nodes: {text}"
        )
    return f"the Ray cluster at {address} cannot be used: {text}"


def nodes() -> list[Node]:
    """Those that are there now, in the order of their names."""
    import ray

    found = [
        Node(
            one["NodeID"],
            f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']}, {one['NodeID'][:6]})",
            one["Resources"],
        )
        for one in ray.nodes()
        if one["Alive"]
    ]
    return sorted(found, key=lambda node: node.name)


def gpus_of(job: JobSpec) -> float:
    """GPUs that each worker of a job takes.

    Raises:
        UsageError: none, where the provider needs one.
    """
    num_gpus = job.engine.num_gpus
    if num_gpus is None:
        return 1.0 if job.provider.name == "cuda" else 0.0
    if job.provider.name == "cuda" and num_gpus == 0:
        raise UsageError("engine.num_gpus: 0, but provider cuda needs one for each worker")
    return num_gpus


def need_of(job: JobSpec, there: Sequence[Node]) -> Need:
    """What each worker of a job takes, by the job or by what the nodes have.

    Raises:
        ProviderError: GPUs are needed, and no node has one.
        UsageError: no node has what the job asks for.
    """
    engine, num_gpus = job.engine, gpus_of(job)
    fitting = [one for one in there if one.total.get("GPU", 0.0) >= num_gpus]
    if not fitting:
        raise ProviderError(
            f"provider {job.provider.name}: each worker needs {num_gpus:g} GPU, and no node of the "
            f"cluster offers as much (found: {_told(there)}); start nodes with `ray start "
            "--num-gpus`, or use provider cpu"
        )
    num_cpus = engine.num_cpus
    if num_cpus is None:
        shares = filter(None, map(_share(num_gpus), fitting))
        num_cpus = min(shares, default=1.0)
    need = Need(num_cpus, num_gpus, engine.resources)
    if not any(need.room_on(one) for one in there):
        raise UsageError(
            f"engine: each worker takes {need}, and no node of the cluster has as much "
            f"(found: {_told(there)}); ask for less with engine.num_cpus or engine.resources"
        )
    return need


def least_need(job: JobSpec) -> Need:
    """What a node must have at least; the more it has, the more a worker may take.

    Raises:
        UsageError: as `gpus_of`.
    """
    return Need(job.engine.num_cpus or 1.0, gpus_of(job), job.engine.resources)


class Demand:
    """What an autoscaler is asked for, where a cluster has one: it remembers the last word.

    Anybody's: the end of another job takes back what this one asked for, so it is asked for again.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._asked: tuple[Need, int] | None = None
        self._asked_at = 0.0
        self._speaker: Any = None
        """Who asks, where this is no process of the cluster."""
        self._sent: Any = None
        """What was asked for last through it, unless that is known to have arrived."""

    def ask(self, need: Need, num_workers: int) -> None:
        """Ask for nodes with room for so many workers in all."""
        if self._asked == (need, num_workers) and time.monotonic() - self._asked_at < REPEAT_S:
            return
        self._asked, self._asked_at = (need, num_workers), time.monotonic()
        self._request([need.bundle] * num_workers)

    def repeat(self) -> None:
        """Ask again for what was asked for, if that is some time ago."""
        if self._asked is not None:
            self.ask(*self._asked)

    def take_back(self) -> None:
        """Ask for no more: else the nodes would stay for ever."""
        if self._asked is not None:
            self._asked = None
            self._request([])

    def close(self, patience_s: float) -> None:
        """Ask for no more, and see to it that this arrives."""
        self.take_back()
        self._settle(patience_s)

    def _request(self, bundles: list[dict[str, float]]) -> None:
        import ray
        from ray.util.client import ray as client

        # A lost cluster is told otherwise.
        with suppress(ray.exceptions.RayError, RuntimeError, OSError):
            if not client.is_connected():
                _Speaker().request(bundles)
                return
            if self._speaker is None:
                actor = ray.remote(_Speaker)
                kept = {"max_restarts": -1, "max_task_retries": -1}  # whatever node it is on
                self._speaker = actor.options(num_cpus=0, **kept).remote()
            self._sent = self._speaker.request.remote(bundles)

    def _settle(self, patience_s: float) -> None:
        import ray

        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        try:
            ray.get(sent, timeout=patience_s)
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:
            self._log(
                "engine: what an autoscaler was to be asked for did not arrive within "
                f"{patience_s:g} s: {error}; nodes may not come, or not go"
            )


class _Speaker:
    """In a process of the cluster, as only such a one may ask an autoscaler.

    One that stays, as an actor: what it is told arrives in that order, and while a job's workers
    are started, so is it. A task for each word would wait for a new process each time.
    """

    def request(self, bundles: list[dict[str, float]]) -> None:
        """Ask for nodes with room for all of these, and no more."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)


def idle_nodes(need: Need) -> set[str] | None:
    """The ids of nodes on which what a worker takes is used by nobody; None: that is not told.

    It is not told through Ray's client.
    """
    # In public, Ray tells only the sum of all nodes, or asks a dashboard, which may not be there.
    from ray._private.state import available_resources_per_node
    from ray.util.client import ray as client

    if client.is_connected():
        return None
    found = available_resources_per_node()
    return {node_id for node_id, free in found.items() if need.room_in(free)}


def free_of(need: Need) -> str:
    """What the cluster has of what a worker takes, and how much of it nobody uses, for people."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    return ", ".join(
        f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in need.bundle
    )


def _share(num_gpus: float) -> Callable[[Node], float]:
    def share(node: Node) -> float:
        cpus = node.total.get("CPU", 0.0)
        if num_gpus:
            return max(1.0, math.floor(cpus * num_gpus / node.total["GPU"]))
        return min(USUAL_CPUS, math.floor(cpus))

    return share


def _told(there: Sequence[Node]) -> str:
    return "; ".join(
        f"{one.name}: "
        + ", ".join(
            f"{amount:g} {name}"
            for name, amount in one.total.items()
            if not name.startswith("node:") and "memory" not in name
        )
        for one in there
    )


def named(error: BatchclfError, node: Node) -> BatchclfError:
    """An error of a worker's, with its node."""
    error.args = (f"node {node.name}: {error}",)
    return error
