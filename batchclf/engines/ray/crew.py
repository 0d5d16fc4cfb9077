"""The driver's side: workers placed on the nodes, given ranges, and replaced when they are lost.

Plain actors, not Ray Data's map: a worker keeps its sessions and its prefetcher full from one range
to the next, which a task that returns cannot; a range is dealt to who is free and done again where
its worker is lost, without lineage; nothing but counts comes back; and one that hangs is doubled.

A worker is lost when Ray says so, or when it has not answered for a while (its node may be frozen
or cut off, and go on later: what it commits then is committed already, or is as good).
"""

import io
import platform
import secrets
import tarfile
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchclf import __version__
from batchclf.engines.ray.cluster import Node, named, need_of, nodes
from batchclf.engines.ray.member import TOKEN, Errand, Member
from batchclf.engines.ray.pace import Pace
from batchclf.engines.ray.station import Look
from batchclf.errors import BatchclfError, EnvironmentFailed, WorkerFailed
from batchclf.models.bundle import copy_bundle
from batchclf.results.files import output_failed, remove_folder
from batchclf.results.parts import Committed, Folders
from batchclf.results.stats import RunStats, together
from batchclf.run.crew import Order
from batchclf.run.duty import Attempt
from batchclf.run.feeders import opened_by_all
from batchclf.run.ranges import Range, Ranges
from batchclf.sessions.open import Opened

TICK_S = 0.2
LOOK_S = 1.0
"""How often each worker is asked how it does."""
GROW_S = 3.0
"""How often the cluster is looked at for nodes that came or went."""
LOST_S = 30.0
"""A worker that has not answered for so long is given up."""
SETTLE_S = 20.0
"""How long a job waits for the rest of its workers, once one is open."""
DOUBLE_S = 5.0
"""A range that one worker had for so long is given to an idle one as well, at the end."""
MAX_STILLBORN = 3
"""Workers that die before they are open, after which their node is done without."""
NUM_AHEAD = 2
"""Ranges that a worker has at once: one at work, one that follows it."""
MAX_FAILURES = 3
"""Of workers on a node, one after the other with nothing done: then it is given up."""
STOP_S = 3.8
"""How long workers may take to commit what is in flight, after a signal."""


@dataclass(slots=True)
class _Lot:
    """A range that is being done, and by whom."""

    range: Range
    num_lost: int = 0
    """Workers that were lost with it."""
    since: float = 0.0
    hands: "set[_Hand]" = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Hand:
    """One worker, as it is seen from here."""

    node: Node
    actor: Any
    pace: Pace
    asked_at: float
    is_first: bool
    """One of those that the job began with."""
    is_open: bool = False
    lots: list[_Lot] = field(default_factory=list)
    calls: dict[Any, tuple[str, _Lot | None]] = field(default_factory=dict)
    """What it was asked for, and has not answered."""
    looks_at: float = 0.0
    look: Look | None = None
    answer: str = field(default_factory=partial(secrets.token_hex, 8))
    """The name of what it writes to the output, for the driver to see."""

    def is_asked(self, for_what: str) -> bool:
        """Whether it has not answered something of the kind."""
        return self.num_asked(for_what) > 0

    def num_asked(self, for_what: str) -> int:
        """How much of the kind it has not answered."""
        return sum(what == for_what for what, _ in self.calls.values())


class RayCrew:
    """A `Crew` of actors."""

    opened: Opened
    num_streams: int
    folders: Folders

    def __init__(self, order: Order) -> None:
        self._order = order
        self._engine = order.job.engine
        self.folders = Folders(order.files.parts, order.files.new_drafts())
        self._token = secrets.token_hex(16)
        self._hands: list[_Hand] = []
        self._bad: set[str] = set()
        """Nodes where the job does not run."""
        self._found: list[tuple[str, Opened, int]] = []
        self._again: deque[_Lot] = deque()
        """Ranges whose workers were lost."""
        self._lots: dict[int, _Lot] = {}
        """Ranges that are being done, by their first image."""
        self._past: dict[str, RunStats] = {}
        """Figures of all workers that were lost, by their nodes."""
        self._failures: defaultdict[str, int] = defaultdict(int)
        """Workers that failed one after the other, with nothing done, by their nodes."""
        self._stillborn: defaultdict[str, int] = defaultdict(int)
        """Workers that died before they were open, by their nodes."""
        self._said: set[str] = set()
        self._grown_at = 0.0
        self._looked_at = time.monotonic()
        self._has_begun = False
        self._is_alone = False
        """No worker is left, and that is said."""
        self._stack = ExitStack()

    def keep(self, stack: ExitStack) -> None:
        """What `close` is to undo."""
        self._stack = stack

    def __enter__(self) -> "RayCrew":
        return self

    def __exit__(self, *exception: object) -> None:
        for hand in self._hands:
            with suppress(RayError):
                ray.kill(hand.actor)
        with suppress(EnvironmentFailed):  # the next start of the job removes it
            remove_folder(self.folders.drafts)

    def close(self) -> None:
        """End all, whatever they are at; what they have not committed is gone."""
        self._stack.close()

    # ---- finding workers -------------------------------------------------------------------------

    def gather(self) -> None:
        """Start workers, and wait until they are open; some may come later.

        Raises:
            BatchclfError: as `hire` of engine.py.
        """
        there = nodes()
        self._need = need_of(self._order.job, there)
        self._leave_token()
        self._errand, self._packed = self._made_errand()
        if self._engine.workers != "auto":
            self._ask_for_nodes(self._engine.workers)
        first_at = None
        while first_at is None or (self._num_waiting and time.monotonic() - first_at < SETTLE_S):
            self._order.stop.raise_if_requested()
            self._order.beat()
            list(self._turn())
            if not self._hands and not self._rooms():
                raise EnvironmentFailed(
                    "engine: no node of the cluster is left to work on (see the lines above, and "
                    "`ray status`); run the same command when there is one"
                )
            if first_at is None and self._found:
                first_at = time.monotonic()
        self.opened = opened_by_all([(node, opened) for node, opened, _ in self._found])
        self.num_streams = sum(num_streams for _, _, num_streams in self._found)
        num_open = sum(hand.is_open for hand in self._hands)
        names = {hand.node.name for hand in self._hands if hand.is_open}
        self._order.log(
            f"{num_open:,} workers on {len(names):,} nodes, each with "
            + ", ".join(f"{amount:g} {name}" for name, amount in self._need.bundle.items())
        )

    @property
    def _num_waiting(self) -> int:
        return sum(not hand.is_open for hand in self._hands)

    def _leave_token(self) -> None:
        self.folders.make()
        path = self.folders.drafts / TOKEN
        try:
            path.write_text(self._token)
        except OSError as error:
            raise output_failed(path, error) from error

    def _made_errand(self) -> tuple[Errand, Any]:
        """What each worker is told, and the model's files, in Ray's object store."""
        order = self._order
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
        data = packed.getvalue()
        errand = Errand(
            job=order.job,
            listing=order.listing,
            placed=order.files.listing,
            num_images=order.num_images,
            drafts=self.folders.drafts,
            token=self._token,
            answer="",
            digest=sha256(data).hexdigest(),
            num_cpus=self._need.num_cpus,
            num_gpus=self._need.num_gpus,
        )
        return errand, ray.put(data)

    def _ask_for_nodes(self, count: int) -> None:
        """Tell an autoscaler, where there is one, that so many workers are wanted."""
        from ray.autoscaler.sdk import request_resources

        with suppress(RayError, RuntimeError):
            request_resources(bundles=[self._need.bundle] * count)

    def _grow(self) -> None:
        """Start workers where there is room for them."""
        if time.monotonic() - self._grown_at < GROW_S:
            return
        self._grown_at = time.monotonic()
        most = self._engine.workers
        rooms = self._rooms()
        while any(room > 0 for room in rooms.values()):
            for node in rooms:  # in turns, so that few workers are on many nodes
                if rooms[node] > 0 and (most == "auto" or len(self._hands) < most):
                    self._hands.append(self._started(node))
                rooms[node] -= 1

    def _rooms(self) -> dict[Node, int]:
        """How many more workers each node can have, where it can have any."""
        placed: defaultdict[str, int] = defaultdict(int)
        for hand in self._hands:
            placed[hand.node.id] += 1
        there = [node for node in nodes() if node.id not in self._bad]
        rooms = {node: self._need.room_on(node) - placed[node.id] for node in there}
        return {node: room for node, room in rooms.items() if room > 0}

    def _started(self, node: Node) -> _Hand:
        placed = NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = (
            ray.remote(Member)
            .options(
                num_cpus=self._need.num_cpus,
                num_gpus=self._need.num_gpus,
                resources=dict(self._need.resources),
                scheduling_strategy=placed,
                max_concurrency=NUM_AHEAD + 4,
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )
        pace = Pace(self._order.job.batch_size)
        hand = _Hand(node, actor, pace, time.monotonic(), is_first=not self._has_begun)
        hand.calls[actor.hello.remote()] = ("hello", None)
        return hand

    # ---- one turn --------------------------------------------------------------------------------

    def _turn(self) -> Iterator[Committed]:
        """Hear what workers answer, for a moment; the parts that were committed meanwhile."""
        self._grow()
        asked = {call: hand for hand in self._hands for call in hand.calls}
        if not asked:
            time.sleep(TICK_S)
        else:
            ready, _ = ray.wait(list(asked), num_returns=1, timeout=TICK_S, fetch_local=False)
            if ready:  # whatever else is there
                ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for call in ready:
                if (hand := asked[call]) in self._hands:
                    part = self._heard(hand, call)
                    if part is not None:
                        yield part
        self._look()

    def _heard(self, hand: _Hand, call: Any) -> Committed | None:
        what, lot = hand.calls.pop(call)
        try:
            answer = ray.get(call)
        except RayTaskError as error:
            self._has_failed(hand, _cause(error))
            return None
        except RayError as error:
            self._is_gone(hand, error)
            return None
        match what:
            case "hello":
                self._greet(hand, answer)
            case "open":
                self._has_opened(hand, answer)
            case "look":
                self._has_looked(hand, answer)
            case "do":
                assert lot is not None
                part, look = answer
                self._has_looked(hand, look)
                return self._has_done(hand, lot, part)
        return None

    def _greet(self, hand: _Hand, versions: Mapping[str, str]) -> None:
        ours = {"batchclf": __version__, "Python": platform.python_version()}
        for name, version in ours.items():
            if versions[name] != version:
                self._has_failed(
                    hand,
                    EnvironmentFailed(
                        f"runs {name} {versions[name]}, and the driver {version}: install the same "
                        "on all nodes, or give engine.runtime_env"
                    ),
                )
                return
        errand = replace(self._errand, answer=hand.answer)
        call = hand.actor.open.options(name="open the sessions").remote(errand, self._packed)
        hand.calls[call] = ("open", None)
        hand.looks_at = 0.0

    def _has_opened(self, hand: _Hand, found: tuple[Opened, int]) -> None:
        if not (self.folders.drafts / f"{TOKEN}.{hand.answer}").exists():
            self._has_failed(
                hand,
                EnvironmentFailed(
                    f"output: {self._order.files.folder}: what is written there on this node does "
                    "not arrive at the driver; engine ray needs storage that all nodes share"
                ),
            )
            return
        hand.is_open = True
        if self._has_begun:
            self._order.log(f"node {hand.node.name}: a worker joins")
        else:
            self._found.append((f"node {hand.node.name}", *found))

    def _look(self) -> None:
        """Ask those that were not asked for a while; give up those that do not answer."""
        now = time.monotonic()
        if (gap_s := now - self._looked_at) > LOST_S / 2:  # it was this process that stood still
            for hand in self._hands:
                hand.asked_at += gap_s
        self._looked_at = now
        for hand in list(self._hands):
            if hand.is_asked("look"):
                if now - hand.asked_at > LOST_S:
                    self._lose(hand, f"has not answered for {LOST_S:.0f} s")
            elif (hand.is_open or hand.is_asked("open")) and now - hand.looks_at > LOOK_S:
                hand.asked_at = now
                hand.calls[hand.actor.look.options(name="look").remote()] = ("look", None)

    def _has_looked(self, hand: _Hand, look: Look | None) -> None:
        hand.looks_at = time.monotonic()
        if look is not None:
            hand.look = look
            for line in look.lines:
                if not self._has_begun:  # what all say at the start, once
                    if line in self._said:
                        continue
                    self._said.add(line)
                self._order.log(f"node {hand.node.name}: {line}")

    # ---- losing workers --------------------------------------------------------------------------

    def _has_failed(self, hand: _Hand, error: BatchclfError) -> None:
        """A worker says that it cannot do what it was asked for.

        Raises:
            BatchclfError: nor can the job go on then.
        """
        error = named(error, hand.node)
        is_final = False
        if hand.is_open:
            self._lose(hand, f"failed: {error}", error)
            self._failures[hand.node.id] += 1
            if self._failures[hand.node.id] < MAX_FAILURES:
                return
        else:
            is_final = hand.is_first and not self._engine.allow_fewer
        self._bad.add(hand.node.id)
        others = [one for one in self._hands if one.node.id not in self._bad]
        if is_final or not (others or self._rooms()):
            raise error
        self._order.log(f"going on without this node: {error}")
        for one in [one for one in self._hands if one.node.id == hand.node.id]:
            self._give_up(one, "is given up with its node")

    def _is_gone(self, hand: _Hand, error: RayError) -> None:
        """Ray says that a worker is no more."""
        is_alive = any(node.id == hand.node.id for node in nodes())
        self._stillborn[hand.node.id] += is_alive and not hand.is_open
        if self._stillborn[hand.node.id] == MAX_STILLBORN:  # else its node may be gone as well
            text = str(error).strip().splitlines()
            self._has_failed(
                hand,
                EnvironmentFailed(
                    f"no worker can be started: {text[-1] if text else error!r}; is batchclf "
                    "installed there, as it is here, and is there memory enough?"
                ),
            )
            return
        self._lose(hand, "died" if is_alive else "is gone with its node")

    def _lose(self, hand: _Hand, why: str, error: BatchclfError | None = None) -> None:
        """Give a worker up; its ranges are done elsewhere.

        Raises:
            BatchclfError: one of them was lost too often.
        """
        at_work = hand.lots[0] if hand.lots else None
        self._give_up(hand, why)
        if at_work is not None and not at_work.hands and at_work.range.first in self._lots:
            at_work.num_lost += 1
            if at_work.num_lost > self._engine.max_retries:
                raise error or WorkerFailed(
                    f"{at_work.range.name}: {at_work.num_lost} workers were lost with them, the "
                    f"last on node {hand.node.name}; look at the nodes' logs, raise "
                    "engine.max_retries, and run the same command to resume"
                )
        self._grown_at = 0.0

    def _give_up(self, hand: _Hand, why: str) -> None:
        """End a worker; whatever nobody else is at is to be done again."""
        lots = hand.lots
        self._drop(hand)
        again = [lot for lot in lots if not lot.hands and lot.range.first in self._lots]
        self._order.log(
            f"node {hand.node.name}: a worker {why}"
            + (f"; done elsewhere: {', '.join(lot.range.name for lot in again)}" if again else "")
        )
        self._again.extend(again)

    def _drop(self, hand: _Hand) -> None:
        if hand not in self._hands:
            return
        self._hands.remove(hand)
        if hand.look is not None and hand.look.figures is not None:
            # What it did counts, and how fast it was does so no more.
            past = [replace(hand.look.figures, images_per_s=0.0)]
            if (earlier := self._past.get(hand.node.name)) is not None:
                past.append(earlier)
            self._past[hand.node.name] = together(past)
        for lot in hand.lots:
            lot.hands.discard(hand)
        hand.lots = []
        with suppress(RayError):
            ray.kill(hand.actor)

    # ---- working ---------------------------------------------------------------------------------

    def work(self, ranges: Ranges, folders: Folders) -> Iterator[Committed | None]:
        """As `Crew`."""
        self._has_begun = True
        stop = self._order.stop
        while stop.signal_number is None and (ranges.num_left or self._lots):
            if self._hands:
                self._is_alone = False
            elif not self._is_alone:
                self._is_alone = True
                self._order.log("no node is left to work on; waiting for one to join")
            self._deal(ranges, folders)
            yield from self._handed_on(ranges)
            yield None
        if stop.signal_number is not None:
            yield from self._drained(ranges)

    def _handed_on(self, ranges: Ranges) -> Iterator[Committed]:
        for part in self._turn():
            lot = self._lots.pop(part.first, None)
            if lot is None:
                continue  # another was faster
            for hand in lot.hands:
                hand.lots.remove(lot)
            if (num_less := lot.range.num_images - part.num_images) > 0:
                rest = _Lot(ranges.after(lot.range, lot.range.num_images - num_less))
                self._lots[rest.range.first] = rest
                self._again.append(rest)
            yield part

    def _drained(self, ranges: Ranges) -> Iterator[Committed]:
        """What workers commit after a signal, as long as there is time."""
        ends_at = time.monotonic() + STOP_S
        for hand in self._hands:
            hand.actor.stop.remote()
        while time.monotonic() < ends_at and any(hand.is_asked("do") for hand in self._hands):
            yield from self._handed_on(ranges)

    def _deal(self, ranges: Ranges, folders: Folders) -> None:
        """Give each worker what it lacks."""
        working = [hand for hand in self._hands if hand.is_open]
        for hand in sorted(working, key=lambda hand: len(hand.lots)):
            while hand.num_asked("do") < NUM_AHEAD:
                lot = self._next(hand, ranges, len(working))
                if lot is None:
                    break
                self._give(hand, lot, folders)

    def _next(self, hand: _Hand, ranges: Ranges, num_workers: int) -> _Lot | None:
        if self._again:
            return self._again.popleft()
        taken = ranges.take(hand.pace.size(ranges.num_left, num_workers))
        if taken is not None:
            lot = self._lots[taken.first] = _Lot(taken)
            return lot
        return None if hand.is_asked("do") else self._slowest()

    def _slowest(self) -> _Lot | None:
        """A range for an idle worker that another has had for longest; None: none for so long."""
        now = time.monotonic()
        single = [lot for lot in self._lots.values() if len(lot.hands) == 1]
        late = [lot for lot in single if now - lot.since > DOUBLE_S]
        return min(late, key=lambda lot: lot.since, default=None)

    def _give(self, hand: _Hand, lot: _Lot, folders: Folders) -> None:
        if not hand.lots:
            hand.pace.begins()
        if not lot.hands:
            lot.since = time.monotonic()
        lot.hands.add(hand)
        hand.lots.append(lot)
        attempt = Attempt(lot.range, folders, folders.new_draft(lot.range.first))
        call = hand.actor.do.options(name=lot.range.name).remote(attempt)
        hand.calls[call] = ("do", lot)

    def _has_done(self, hand: _Hand, lot: _Lot, part: Committed | None) -> Committed | None:
        if part is None:  # given up, as after a signal
            return None
        hand.pace.has_done(part.num_images)
        self._failures[hand.node.id] = 0
        return part

    # ---- how they do -----------------------------------------------------------------------------

    def underway(self) -> tuple[int, int]:
        """As `Crew`."""
        looks = [hand.look for hand in self._hands if hand.look is not None and hand.lots]
        return sum(one.num_underway for one in looks), sum(one.num_errors for one in looks)

    def figures(self) -> Mapping[str, RunStats]:
        """As `Crew`."""
        found = defaultdict(list, {name: [past] for name, past in self._past.items()})
        for hand in self._hands:
            if hand.look is not None and hand.look.figures is not None:
                found[hand.node.name].append(hand.look.figures)
        return {name: together(figures) for name, figures in found.items()}


def _cause(error: RayTaskError) -> BatchclfError:
    """What a worker raised, as it was there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BatchclfError):
        return cause
    return WorkerFailed(f"unexpected failure of a worker:\n{error}")
