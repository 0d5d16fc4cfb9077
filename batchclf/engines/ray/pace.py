"""How many images a range should have, for each worker by how fast it is."""

import math
import time

RANGE_S = 45.0
"""Seconds of work in a range: what the death of a node costs, and what its bookkeeping is worth."""
MAX_GROWTH = 8
"""A range has at most so many times the images of the one before."""
SHARES = 2
"""Near the end each worker is given no more than such a part of its share of what is left."""


class Pace:
    """One worker's speed, told by when its ranges were done."""

    def __init__(self, batch_size: int) -> None:
        self._least = 2 * batch_size
        """Fewer would leave a stream idle."""
        self._size = 4 * self._least
        self.images_per_s: float | None = None
        self._since = time.monotonic()

    def begins(self) -> None:
        """It is given something to do, and had nothing."""
        self._since = time.monotonic()

    def has_done(self, num_images: int) -> None:
        """A range was committed; the next one is at work already."""
        now = time.monotonic()
        speed = num_images / max(now - self._since, 1e-3)
        before = self.images_per_s
        self.images_per_s = speed if before is None else (before + speed) / 2
        self._since = now

    def size(self, num_left: int, num_workers: int) -> int:
        """Images of its next range, of all that nobody has."""
        if self.images_per_s is not None:
            self._size = min(MAX_GROWTH * self._size, int(self.images_per_s * RANGE_S))
        share = math.ceil(num_left / (SHARES * num_workers))
        return max(self._least, min(self._size, share))
