"""Workers found: started where nodes have room, and proven there before they are given anything."""

import io
import math
import platform
import secrets
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from os.path import exists
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchclf import __version__
from batchclf.engines.ray.cluster import (
    Demand,
    Need,
    Node,
    free_of,
    idle_nodes,
    least_need,
    need_of,
    nodes,
)
from batchclf.engines.ray.dealing import NUM_AHEAD
from batchclf.engines.ray.member import ARRIVE_S, TOKEN, Errand, Member
from batchclf.engines.ray.pace import Pace
from batchclf.engines.ray.roster import Hand, Roster
from batchclf.errors import EnvironmentFailed, ProviderError, UsageError
from batchclf.models.bundle import copy_bundle
from batchclf.results.files import output_failed
from batchclf.results.parts import Folders
from batchclf.run.crew import Order
from batchclf.sessions.open import Opened

GROW_S = 3.0
"""How often the cluster is looked at for nodes that came or went."""
SAY_S = 30.0
"""How often it is said what is waited for."""
START_S = 10.0
"""Workers that take longer than that to be started are waited for, and that is said."""
CLOSE_S, HASTY_S = 10.0, 1.0
"""How long what is said to an autoscaler may take to arrive, at the end and after a signal."""
NODES_S = 300.0
"""How long a cluster without any node to work on is waited for: an autoscaler may start some, and
nodes that were lost may come back."""
TICK_S = 0.2
WORTH_S = 300.0
"""More nodes are asked for where those that are there have work for longer than that."""


class Finding:
    """Finds workers for a job, from the first one on and as long as the job goes on."""

    def __init__(self, order: Order, roster: Roster, folders: Folders) -> None:
        self._order = order
        self._engine = order.job.engine
        self._roster = roster
        self._folders = folders
        self._token = secrets.token_hex(16)
        self._demand = Demand(order.log)
        self.bad: set[str] = set()
        """Nodes where the job does not run."""
        self.crowded: Counter[str] = Counter()
        """How many workers fewer a node is to have than it has room for."""
        self.found: list[tuple[str, Opened, int]] = []
        """What those opened that the job begins with."""
        self.has_begun = False
        self._left_at: dict[str, float] = {}
        """When a worker was last given up for being waited for, by its node."""
        self._hello_s = START_S
        """How long a worker is waited for where another node has room."""
        self._grown_at = 0.0
        self._asked_at = 0.0
        self._said_at = -math.inf
        self._left_alone_at: float | None = None
        """Since when there has been neither a worker nor room for one."""

    # ---- at the start ----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Wait for a node that is large enough, and make ready what each worker is told.

        Raises:
            ProviderError, UsageError: no node has what a worker takes.
            EnvironmentFailed: the output cannot be written.
        """
        self.need = self._found_need()
        self._leave_token()
        self._errand, self._packed = self._made_errand()
        self._demand.ask(self.need, self._least_workers)

    def _found_need(self) -> Need:
        least, job = least_need(self._order.job), self._order.job
        began = time.monotonic()
        while True:
            there = nodes()
            try:
                return need_of(job, there)
            except (ProviderError, UsageError) as lacking:
                patience_s = self._patience_s(there)
                if not patience_s:
                    raise
                if time.monotonic() - began >= patience_s:
                    raise EnvironmentFailed(
                        f"{lacking}. Waited for nodes for {patience_s:g} s "
                        "(engine.wait_for_nodes); run the same command when there are some"
                    ) from lacking
                self._demand.ask(least, self._least_workers)
                self._say(
                    f"{lacking}. Waiting for nodes, up to {patience_s:g} s (engine.wait_for_nodes)"
                    ": an autoscaler, where the cluster has one, is asked for "
                    f"{self._least_workers:,} times {least}"
                )
            self._pause()

    @property
    def _least_workers(self) -> int:
        return 1 if self._engine.workers == "auto" else self._engine.workers

    def _patience_s(self, there: list[Node]) -> float:
        if self._engine.wait_for_nodes is not None:
            return self._engine.wait_for_nodes
        has_workers = any(one.total.get("CPU") or one.total.get("GPU") for one in there)
        return 0.0 if has_workers else NODES_S

    def _pause(self) -> None:
        self._order.stop.raise_if_requested()
        self._order.beat()
        time.sleep(TICK_S)

    def _say_what_is_awaited(self) -> None:
        since = time.monotonic() - START_S
        waiting = [hand for hand in self._roster.hands if hand.started_at < since]
        asked = [hand for hand in waiting if hand.is_asked("hello")]
        if not asked:
            return
        names = sorted({hand.node.name for hand in asked})
        self._say(
            f"waiting for {len(asked):,} workers to be started on {len(names):,} nodes, such as "
            f"{names[0]}: each takes {self.need}, and the cluster has {free_of(self.need)} free; "
            "what others use is waited for"
        )

    def await_nodes(self) -> None:
        """While workers are waited for: say so, and for how long where no node is left for any.

        Raises:
            EnvironmentFailed: none has joined in that time.
        """
        if self._roster.hands or self.rooms():
            self._left_alone_at = None
            self._say_what_is_awaited()
            return
        asked = self._engine.wait_for_nodes
        patience_s = NODES_S if asked is None else asked
        if self._left_alone_at is None:
            self._left_alone_at, self._said_at = time.monotonic(), -math.inf
        if time.monotonic() - self._left_alone_at >= patience_s:
            raise EnvironmentFailed(
                f"engine: no node is left to work on, and none has joined in {patience_s:g} s "
                "(engine.wait_for_nodes); see the lines above and `ray status`. What is done "
                "stays: run the same command when there is one"
            )
        self._say(
            f"no node is left to work on; waiting for one to join, up to {patience_s:g} s "
            "(engine.wait_for_nodes)"
        )

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said_at >= SAY_S:
            self._said_at = now
            self._order.log(text)

    def _leave_token(self) -> None:
        self._folders.make()
        path = self._folders.drafts / TOKEN
        try:
            path.write_text(self._token)
        except OSError as error:
            raise output_failed(path, error) from error

    def _made_errand(self) -> tuple[Errand, Any]:
        """What each worker is told, and the model's files, in Ray's object store."""
        order = self._order
        data = _packed_model(order)
        errand = Errand(
            job=order.job,
            listing=order.listing,
            num_images=order.num_images,
            first=order.first,
            sample=order.sample,
            drafts=self._folders.drafts,
            token=self._token,
            answer="",
            digest=sha256(data).hexdigest(),
            num_cpus=self.need.num_cpus,
            num_gpus=self.need.num_gpus,
            landmarks=order.witness.landmarks,
        )
        return errand, ray.put(data)

    # ---- starting workers ------------------------------------------------------------------------

    def grow(self) -> None:
        """From time to time, start workers where there is room for them."""
        if time.monotonic() - self._grown_at < GROW_S:
            return
        self._grown_at = time.monotonic()
        self._demand.repeat()
        most, hands = self._engine.workers, self._roster.hands
        rooms = self.rooms()
        if rooms and most != "auto":  # else all of them are filled
            rooms = self._best_first(rooms)
        while any(room > 0 for room in rooms.values()):
            for node in rooms:  # in turns, so that few workers are on many nodes
                if rooms[node] > 0 and (most == "auto" or len(hands) < most):
                    hands.append(self._started(node))
                rooms[node] -= 1

    def _best_first(self, rooms: Mapping[Node, int]) -> dict[Node, int]:
        """The same in the order in which to try them, once those that wait in vain have moved."""
        idle = idle_nodes(self.need)

        def is_busy(node: Node) -> bool:
            return idle is not None and node.id not in idle

        order = sorted(rooms, key=lambda node: (is_busy(node), self._left_at.get(node.id, 0.0)))
        left = {node: rooms[node] for node in order}
        before = time.monotonic() - self._hello_s
        late = [one for one in self._roster.hands if one.is_asked("hello")]
        late = [one for one in late if one.started_at < before]
        if idle is not None:  # where it is idle, a worker is being started, if slowly
            late = [one for one in late if is_busy(one.node)]
        self._move(late, [node for node in order if not is_busy(node)], left)
        return left

    def _move(self, late: list[Hand], goals: list[Node], rooms: dict[Node, int]) -> None:
        """Try workers on other nodes, as far as these have room: others may use theirs for long."""
        waited_s = self._hello_s
        for hand in late:
            others = (node for node in goals if rooms[node] > 0 and node.id != hand.node.id)
            if (goal := next(others, None)) is None:
                continue
            self._roster.drop(hand)
            self._left_at[hand.node.id] = time.monotonic()
            self._roster.hands.append(self._started(goal))
            rooms[goal] -= 1
            self._hello_s = 2 * waited_s  # starting may be slow everywhere
            self._order.log(
                f"node {hand.node.name}: no worker was started in {waited_s:g} s, as others may "
                f"use the node; one is tried on node {goal.name} instead"
            )

    def look_again(self) -> None:
        """Have `grow` look at the cluster at once."""
        self._grown_at = 0.0

    def rooms(self) -> dict[Node, int]:
        """How many more workers each node can have, where it can have any."""
        there = [node for node in nodes() if node.id not in self.bad]
        rooms = {
            node: max(1, self.need.room_on(node) - self.crowded[node.id])
            - len(self._roster.on(node.id))
            for node in there
            if self.need.room_on(node)
        }
        return {node: room for node, room in rooms.items() if room > 0}

    def ask_for_more(self, images_left: int) -> None:
        """Where `workers` is auto, ask for nodes, twice as many at most, while that is worth it."""
        if self._engine.workers != "auto" or time.monotonic() - self._asked_at < GROW_S:
            return
        self._asked_at = time.monotonic()
        working = self._roster.open
        rate = sum(hand.pace.images_per_s or 0.0 for hand in working)
        num_busy_s = images_left / rate if rate else 0.0
        wanted = min(2 * len(working), int(len(working) * num_busy_s / WORTH_S))
        self._demand.ask(self.need, max(1, len(working), wanted))

    def _started(self, node: Node) -> Hand:
        placed = NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = (
            ray.remote(Member)
            .options(
                num_cpus=self.need.num_cpus,
                num_gpus=self.need.num_gpus,
                resources=dict(self.need.resources),
                scheduling_strategy=placed,
                max_concurrency=NUM_AHEAD + 4,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )
        hand = Hand(node, actor, Pace(self._order.job.batch_size), is_first=not self.has_begun)
        hand.calls[actor.hello.remote()] = ("hello", None)
        return hand

    # ---- proving them ----------------------------------------------------------------------------

    def greet(self, hand: Hand, versions: Mapping[str, str]) -> None:
        """A worker is there, and says what runs there: have it open its sessions.

        Raises:
            EnvironmentFailed: it is of another version.
        """
        ours = {"batchclf": __version__, "Python": platform.python_version()}
        for name, version in ours.items():
            if versions[name] != version:
                raise EnvironmentFailed(
                    f"runs {name} {versions[name]}, and the driver {version}: install the same "
                    "on all nodes, or give engine.runtime_env"
                )
        landmarks = self._order.witness.landmarks_left()
        errand = replace(self._errand, answer=hand.answer, landmarks=landmarks)
        call = hand.actor.open.options(name="open the sessions").remote(errand, self._packed)
        hand.calls[call] = ("open", None)
        hand.looks_at = 0.0

    def look_for_proof(self, hand: Hand) -> None:
        """A worker opened its sessions: it is open once what it wrote to the output is seen here.

        Raises:
            EnvironmentFailed: it has not come for so long that it was written elsewhere.
        """
        assert hand.proof is not None
        found, since = hand.proof
        if not exists(self._folders.drafts / f"{TOKEN}.{hand.answer}"):
            if time.monotonic() - since < ARRIVE_S:
                return
            raise EnvironmentFailed(
                f"output: {self._order.files.folder}: what is written there on this node does "
                "not arrive at the driver; engine ray needs storage that all nodes share"
            )
        hand.proof, hand.is_open = None, True
        if self.has_begun:
            self._order.log(f"node {hand.node.name}: a worker joins")
        else:
            self.found.append((f"node {hand.node.name}", *found))

    def end(self) -> None:
        """Ask for no more nodes, so that they can go while the last of the work is done."""
        self._demand.take_back()

    def close(self) -> None:
        """As `end`, and wait until that has arrived."""
        is_stopped = self._order.stop.signal_number is not None
        self._demand.close(HASTY_S if is_stopped else CLOSE_S)


def _packed_model(order: Order) -> bytes:
    with tempfile.TemporaryDirectory(prefix="batchclf-") as temporary:
        bundle = copy_bundle(
            order.model.bundle,
            Path(temporary) / "bundle",
            labels=order.model.labels,
            preprocess=order.model.preprocess,
            variant=order.variant,
        )
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in sorted(bundle.folder.rglob("*")):
                archive.add(path, path.relative_to(bundle.folder), recursive=False)
    return packed.getvalue()
