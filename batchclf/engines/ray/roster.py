"""The workers that there are: each with its node and what it is at; and what earlier ones did."""

import secrets
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from batchclf.engines.ray.cluster import Node
from batchclf.engines.ray.pace import Pace
from batchclf.engines.ray.station import Look
from batchclf.results.stats import RunStats, together
from batchclf.run.ranges import Range
from batchclf.sessions.open import Opened


@dataclass(eq=False, slots=True)
class Lot:
    """A range that is being done, and by whom."""

    range: Range
    num_lost: int = 0
    """Workers that were lost with it."""
    since: float = 0.0
    hands: "list[Hand]" = field(default_factory=list)
    """In the order in which it was given to them."""


@dataclass(eq=False, slots=True)
class Hand:
    """One worker, as the driver sees it."""

    node: Node
    actor: Any
    pace: Pace
    is_first: bool
    """One of those that the job began with."""
    started_at: float = field(default_factory=time.monotonic)
    asked_at: float = field(default_factory=time.monotonic)
    is_open: bool = False
    proof: tuple[tuple[Opened, int], float] | None = None
    """What it opened and when it said so, until what it wrote to the output is seen here."""
    lots: list[Lot] = field(default_factory=list)
    calls: dict[Any, tuple[str, Lot | None]] = field(default_factory=dict)
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

    def has_looked(self, look: Look) -> None:
        """It says how it does; an earlier answer that comes late counts what is in parts by now."""
        if self.look is None or look.number > self.look.number:
            self.look = look


class Roster:
    """All workers of a job."""

    def __init__(self) -> None:
        self.hands: list[Hand] = []
        self._past: dict[str, RunStats] = {}
        """Figures of all workers that were lost, by their nodes."""

    @property
    def open(self) -> list[Hand]:
        """Those that can be given ranges."""
        return [hand for hand in self.hands if hand.is_open]

    @property
    def num_waiting(self) -> int:
        """Those that are not open yet."""
        return len(self.hands) - len(self.open)

    def on(self, node_id: str) -> list[Hand]:
        """Those on a node."""
        return [hand for hand in self.hands if hand.node.id == node_id]

    def asked(self) -> dict[Any, Hand]:
        """All that was not answered yet, and by whom."""
        return {call: hand for hand in self.hands for call in hand.calls}

    def drop(self, hand: Hand) -> None:
        """End a worker; what it did counts."""
        if hand not in self.hands:
            return
        self.hands.remove(hand)
        if hand.look is not None and hand.look.figures is not None:
            # How fast it was counts no more.
            past = [replace(hand.look.figures, images_per_s=0.0)]
            if (earlier := self._past.get(hand.node.name)) is not None:
                past.append(earlier)
            self._past[hand.node.name] = together(past)
        end(hand)

    def close(self) -> None:
        """End all."""
        for hand in self.hands:
            end(hand)

    def underway(self) -> tuple[int, int]:
        """As `Crew`; a range that two workers are at is counted once."""
        working = [hand for hand in self.hands if hand.lots and hand.lots[0].hands[0] is hand]
        looks = [hand.look for hand in working if hand.look is not None]
        return sum(one.num_underway for one in looks), sum(one.num_errors for one in looks)

    def figures(self) -> Mapping[str, RunStats]:
        """As `Crew`."""
        found = defaultdict(list, {name: [past] for name, past in self._past.items()})
        for hand in self.hands:
            if hand.look is not None and hand.look.figures is not None:
                found[hand.node.name].append(hand.look.figures)
        return {name: together(figures) for name, figures in found.items()}


def end(hand: Hand) -> None:
    """Have Ray end a worker, whatever it is at."""
    with suppress(RayError):
        ray.kill(hand.actor)
