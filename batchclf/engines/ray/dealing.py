"""Ranges dealt to workers, and again where a worker is lost with them or is slow at the end."""

import time
from collections import deque
from collections.abc import Sequence

from batchclf.engines.ray.roster import Hand, Lot
from batchclf.results.parts import Committed, Folders
from batchclf.run.duty import Attempt
from batchclf.run.ranges import Ranges

DOUBLE_S = 5.0
"""A range that one worker had for so long is given to an idle one as well, at the end."""
NUM_AHEAD = 2
"""Ranges that a worker has at once: one at work, one that follows it."""


class Dealing:
    """Which worker has which range."""

    def __init__(self) -> None:
        self._lots: dict[int, Lot] = {}
        """Ranges that are being done, by their first image."""
        self._again: deque[Lot] = deque()
        """Of these, the ones that nobody is at."""

    @property
    def is_busy(self) -> bool:
        """Whether a range is being done, or to be done again."""
        return bool(self._lots)

    def deal(self, hands: Sequence[Hand], ranges: Ranges, folders: Folders) -> None:
        """Give each of the open workers what it lacks."""
        for hand in sorted(hands, key=lambda hand: len(hand.lots)):
            while hand.num_asked("do") < NUM_AHEAD:
                lot = self._next(hand, ranges, len(hands))
                if lot is None:
                    break
                self._give(hand, lot, folders)

    def _next(self, hand: Hand, ranges: Ranges, num_workers: int) -> Lot | None:
        if self._again:
            return self._again.popleft()
        taken = ranges.take(hand.pace.size(ranges.num_left, num_workers))
        if taken is not None:
            lot = self._lots[taken.first] = Lot(taken)
            return lot
        return None if hand.is_asked("do") else self._slowest()

    def _slowest(self) -> Lot | None:
        """A range for an idle worker that another has had for longest; None: none for so long."""
        now = time.monotonic()
        single = [lot for lot in self._lots.values() if len(lot.hands) == 1]
        late = [lot for lot in single if now - lot.since > DOUBLE_S]
        return min(late, key=lambda lot: lot.since, default=None)

    def _give(self, hand: Hand, lot: Lot, folders: Folders) -> None:
        if not hand.lots:
            hand.pace.begins()
        if not lot.hands:
            lot.since = time.monotonic()
        lot.hands.append(hand)
        hand.lots.append(lot)
        attempt = Attempt(lot.range, folders, folders.new_draft(lot.range.first))
        send(hand, lot, attempt)

    def has_done(self, part: Committed, ranges: Ranges) -> bool:
        """A part is committed; False: another attempt at it was faster, and that is known."""
        lot = self._lots.pop(part.first, None)
        if lot is None:
            return False
        for hand in lot.hands:
            hand.lots.remove(lot)
        if (num_less := lot.range.num_images - part.num_images) > 0:
            rest = Lot(ranges.after(lot.range, lot.range.num_images - num_less))
            self._lots[rest.range.first] = rest
            self._again.append(rest)
        return True

    def take_back(self, hand: Hand) -> list[Lot]:
        """What a worker has is no longer its; what nobody else is at is dealt again."""
        for lot in hand.lots:
            lot.hands.remove(hand)
        again = [lot for lot in hand.lots if not lot.hands and lot.range.first in self._lots]
        hand.lots = []
        self._again.extend(again)
        return again


def send(hand: Hand, lot: Lot, attempt: Attempt) -> None:
    """Have a worker do an attempt at a range that it has."""
    call = hand.actor.do.options(name=lot.range.name).remote(attempt)
    hand.calls[call] = ("do", lot)
