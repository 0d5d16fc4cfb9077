"""What a job has left to do, in ranges of its listing that are handed out one after the other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from batchclf.results.listing import BEGINNING, Listing, Mark
from batchclf.results.records import ImageRef


@dataclass(frozen=True, slots=True)
class Range:
    """Some images, in the order of the listing; plain data."""

    first: int
    """The number of the first one, in the listing, or among the failed ones that are retried."""
    num_images: int
    near: Mark = BEGINNING
    """Where the first one stands in the listing."""
    retried: tuple[ImageRef, ...] = ()
    """The images themselves, where they do not follow each other in the listing."""

    @property
    def name(self) -> str:
        """For people."""
        return f"images {self.first:,} to {self.first + self.num_images - 1:,}"

    def refs(self, listing: Listing, start: int = 0) -> Iterator[ImageRef]:
        """The images from the one with number `start` of the range on.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        if self.retried:
            return iter(self.retried[start:])
        return listing.refs(self.first + start, self.first + self.num_images, self.near)


class Ranges(Protocol):
    """What is left to do, handed out in order."""

    @property
    def origin(self) -> int:
        """The number of the image whose record comes first in the file that all end up in."""

    @property
    def num_left(self) -> int:
        """Images that are not handed out yet."""

    def take(self, num_images: int) -> Range | None:
        """The next range, of at most so many images; None: all are handed out."""

    def after(self, taken: Range, num_done: int) -> Range:
        """What a range lacks when only its first images were done."""


@dataclass(slots=True)
class Gaps:
    """The images of a listing without a record; a `Ranges`. What is held does not grow with them.

    `gaps` are given as first image and the one behind the last, in order.
    """

    listing: Listing
    gaps: list[tuple[int, int]]
    origin: int
    _near: Mark = field(default=BEGINNING, init=False)

    @property
    def num_left(self) -> int:
        return sum(stop - start for start, stop in self.gaps)

    def take(self, num_images: int) -> Range | None:
        """The next range of the first gap.

        Raises:
            EnvironmentFailed: the listing cannot be read.
        """
        if not self.gaps:
            return None
        start, stop = self.gaps[0]
        end = min(start + num_images, stop)
        self._near = self.listing.mark(start, self._near)
        self.gaps[:1] = [(end, stop)] if end < stop else []
        return Range(start, end - start, self._near)

    def after(self, taken: Range, num_done: int) -> Range:
        """What a range lacks when only its first images were done."""
        near = self.listing.mark(taken.first + num_done, taken.near)
        return Range(near.number, taken.num_images - num_done, near)


@dataclass(slots=True)
class Failed:
    """Images whose records are errors, to be tried again; a `Ranges`."""

    refs: Iterator[ImageRef]
    num_left: int
    num_done: int
    """Of the failed images, before these."""
    origin: int = field(default=0, init=False)

    def take(self, num_images: int) -> Range | None:
        """The next of them.

        Raises:
            EnvironmentFailed: the listing or the records cannot be read.
        """
        if not (refs := tuple(islice(self.refs, num_images))):
            return None
        found = Range(self.num_done, len(refs), retried=refs)
        self.num_done += len(refs)
        self.num_left -= len(refs)
        return found

    def after(self, taken: Range, num_done: int) -> Range:
        """What a range lacks when only its first images were done."""
        rest = taken.retried[num_done:]
        return Range(taken.first + num_done, len(rest), retried=rest)


def gaps_between(first: int, last: int, done: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of `first` to `last` lies between spans that are done, which are in order."""
    gaps = []
    for start, stop in (*done, (last, last)):
        if first < start:
            gaps.append((first, start))
        first = max(first, stop)
    return gaps
