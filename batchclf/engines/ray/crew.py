"""The driver's side: workers found on the nodes, given ranges, and replaced when they are lost.

Plain actors, not Ray Data's map: a worker keeps its sessions and its prefetcher full from one range
to the next, which a task that returns cannot; a range is dealt to who is free and done again where
its worker is lost, without lineage; nothing but counts comes back; and one that hangs is doubled.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from batchclf.engines.ray.dealing import Dealing, send
from batchclf.engines.ray.finding import TICK_S, Finding
from batchclf.engines.ray.losing import Losing
from batchclf.engines.ray.roster import Hand, Lot, Roster
from batchclf.engines.ray.station import Look
from batchclf.errors import BatchclfError, EnvironmentFailed, WorkerFailed
from batchclf.results.files import remove_folder
from batchclf.results.parts import Committed, Folders
from batchclf.results.stats import RunStats
from batchclf.run.crew import Order
from batchclf.run.duty import Doubt
from batchclf.run.feeders import opened_by_all
from batchclf.run.ranges import Ranges
from batchclf.sessions.open import Opened
from batchclf.system.words import counted

LOOK_S = 1.0
"""How often each worker is asked how it does."""
LOOKS_PER_S = 100
"""But all of them together no more often than that: an answer costs the driver a millisecond."""
LOST_S = 30.0
"""A worker that has not answered for so long is given up."""
SETTLE_S = 20.0
"""How long a job waits for the rest of its workers, once one is open."""
STOP_S = 3.8
"""How long workers may take to commit what is in flight, after a signal."""


class RayCrew:
    """A `Crew` of actors."""

    opened: Opened
    num_streams: int
    folders: Folders
    held: ExitStack
    """What `close` ends."""

    def __init__(self, order: Order, held: ExitStack) -> None:
        """Nobody is hired yet; what is made here is ended with `held`."""
        self.held = held
        self.folders = Folders(order.files.parts, order.files.new_drafts())
        held.callback(self._remove_drafts)
        self._order = order
        self._roster = Roster()
        held.callback(self._roster.close)
        self._finding = Finding(order, self._roster, self.folders)
        held.callback(self._finding.close)
        self._dealing = Dealing()
        self._losing = Losing(order, self._roster, self._finding, self._dealing)
        self._looked_at = time.monotonic()
        self._said: set[str] = set()
        """What workers said before the work began."""
        self._is_stopping = False

    def close(self) -> None:
        """End all, whatever they are at; what they have not committed is gone."""
        self.held.close()

    def _remove_drafts(self) -> None:
        with suppress(EnvironmentFailed):  # the next start of the job removes it
            remove_folder(self.folders.drafts)

    def gather(self) -> None:
        """Start workers, and wait until they are open; some may come later.

        Raises:
            BatchclfError: as `hire` of engine.py.
        """
        self._finding.prepare()
        first_at = None
        while first_at is None or (
            self._roster.num_waiting and time.monotonic() - first_at < SETTLE_S
        ):
            self._order.stop.raise_if_requested()
            self._order.beat()
            list(self._turn())
            self._finding.await_nodes()
            if first_at is None and self._finding.found:
                first_at = time.monotonic()
        found = self._finding.found
        self.opened = opened_by_all([(name, opened) for name, opened, _ in found])
        self.num_streams = sum(num_streams for _, _, num_streams in found)
        working = self._roster.open
        num_nodes = len({hand.node.id for hand in working})
        self._order.log(
            f"{counted(len(working), 'worker')} on {counted(num_nodes, 'node')}, "
            f"each with {self._finding.need}"
        )

    # ---- one turn --------------------------------------------------------------------------------

    def _turn(self) -> Iterator[Committed]:
        """Hear what workers answer, for a moment; the parts that were committed meanwhile."""
        if not self._is_to_stop:
            self._finding.grow()
        asked = self._roster.asked()
        if not asked:
            time.sleep(TICK_S)
        else:
            ready, _ = ray.wait(list(asked), num_returns=1, timeout=TICK_S, fetch_local=False)
            if ready:  # whatever else is there
                ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for call in ready:
                if (hand := asked[call]) in self._roster.hands:
                    part = self._heard(hand, call)
                    if part is not None:
                        yield part
        if not self._is_to_stop:
            self._look()

    def _heard(self, hand: Hand, call: Any) -> Committed | None:
        what, lot = hand.calls.pop(call)
        try:
            answer: Any = ray.get(call)
        except RayError as error:
            self._is_lost(hand, error)
            return None
        match what:
            case "hello" if not self._is_to_stop:
                self._greet(hand, answer)
            case "open":
                hand.proof = answer, time.monotonic()
            case "look":
                self._has_looked(hand, answer)
            case "do":
                assert lot is not None
                found: Committed | Doubt | None
                found, look = answer
                self._has_looked(hand, look)
                if isinstance(found, Doubt):
                    self._settle(hand, lot, found)
                elif found is not None:  # else it was given up, as after a signal
                    hand.pace.has_done(found.num_images)
                    self._losing.has_done(hand)
                    return found
        return None

    def _is_lost(self, hand: Hand, error: RayError) -> None:
        if self._is_to_stop:  # what the job ends with is why it is to stop
            self._roster.drop(hand)
        elif isinstance(error, RayTaskError):
            self._losing.has_failed(hand, _cause(error))
        else:
            self._losing.is_gone(hand, error)

    def _greet(self, hand: Hand, versions: Mapping[str, str]) -> None:
        try:
            self._finding.greet(hand, versions)
        except EnvironmentFailed as error:
            self._losing.has_failed(hand, error)

    def _settle(self, hand: Hand, lot: Lot, doubt: Doubt) -> None:
        """A worker misses many images: have it say so where they are missing here as well.

        Raises:
            EnvironmentFailed: most of the input has gone.
        """
        if lot not in hand.lots or self._is_to_stop:
            return  # another was faster; or the range is done after the next start
        witness = self._order.witness
        witness.require_input()
        if (seen := witness.seen(doubt.attempt)) is None:
            send(hand, lot, replace(doubt.attempt, is_confirmed=True))
            return
        self._losing.is_misled(
            hand,
            EnvironmentFailed(
                f"input: {seen}: it is not there, nor are others of {lot.range.name}, and where "
                "the job was started it is; is the input still mounted on this node?"
            ),
        )

    def _look(self) -> None:
        """Ask those that were not asked for a while; give up those that do not answer."""
        now = time.monotonic()
        if (gap_s := now - self._looked_at) > LOST_S / 2:  # it was this process that stood still
            for hand in self._roster.hands:
                hand.asked_at += gap_s
        self._looked_at = now
        every_s = max(LOOK_S, len(self._roster.hands) / LOOKS_PER_S)
        for hand in list(self._roster.hands):
            if hand.proof is not None:
                self._look_for_proof(hand)
            elif hand.is_asked("look"):
                if now - hand.asked_at > LOST_S:
                    self._losing.lose(hand, f"has not answered for {LOST_S:.0f} s")
            elif (hand.is_open or hand.is_asked("open")) and now - hand.looks_at > every_s:
                hand.asked_at = now
                hand.calls[hand.actor.look.options(name="look").remote()] = ("look", None)

    def _look_for_proof(self, hand: Hand) -> None:
        try:
            self._finding.look_for_proof(hand)
        except EnvironmentFailed as error:
            self._losing.has_failed(hand, error)

    def _has_looked(self, hand: Hand, look: Look | None) -> None:
        hand.looks_at = time.monotonic()
        if look is not None:
            hand.has_looked(look)
            for line in look.lines:
                if not self._finding.has_begun:  # what all say at the start, once
                    if line in self._said:
                        continue
                    self._said.add(line)
                self._order.log(f"node {hand.node.name}: {line}")

    # ---- working ---------------------------------------------------------------------------------

    def work(self, ranges: Ranges, folders: Folders) -> Iterator[Committed | None]:
        """As `Crew`."""
        self._finding.has_begun = True
        while not self._is_to_stop and (ranges.num_left or self._dealing.is_busy):
            if not self._roster.open:
                self._finding.await_nodes()
            self._finding.ask_for_more(ranges.num_left)
            self._dealing.deal(self._roster.open, ranges, folders)
            yield from self._handed_on(ranges)
            yield None
        if self._is_to_stop:
            yield from self._drained(ranges)

    def stop(self) -> None:
        """As `Crew`."""
        self._is_stopping = True

    @property
    def _is_to_stop(self) -> bool:
        return self._is_stopping or self._order.stop.signal_number is not None

    def _handed_on(self, ranges: Ranges) -> Iterator[Committed]:
        return (part for part in self._turn() if self._dealing.has_done(part, ranges))

    def _drained(self, ranges: Ranges) -> Iterator[Committed]:
        """What workers commit once they are asked to end, as long as there is time."""
        ends_at = time.monotonic() + STOP_S
        for hand in self._roster.hands:
            hand.actor.stop.remote()
        self._finding.end()
        while time.monotonic() < ends_at and any(
            hand.is_asked("do") for hand in self._roster.hands
        ):
            yield from self._handed_on(ranges)

    # ---- how they do -----------------------------------------------------------------------------

    def underway(self) -> tuple[int, int]:
        """As `Crew`."""
        return self._roster.underway()

    def figures(self) -> Mapping[str, RunStats]:
        """As `Crew`."""
        return self._roster.figures()


def _cause(error: RayTaskError) -> BatchclfError:
    """What a worker raised, as it was there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BatchclfError):
        return cause
    return WorkerFailed(f"unexpected failure of a worker:\n{error}")
