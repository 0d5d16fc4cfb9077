"""What a process of a crew is told, and tells. Imports little: its parent needs it, too."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchclf.results.listing import Listing
from batchclf.results.parts import Committed, Folders
from batchclf.results.records import Entry, ImageRef
from batchclf.results.stats import RunStats
from batchclf.run.ranges import Range
from batchclf.run.reporter import Reporter
from batchclf.spec.job import JobSpec

if TYPE_CHECKING:
    from batchclf.models.resolve import ResolvedModel
    from batchclf.sessions.open import Opened


@dataclass(frozen=True, slots=True)
class Attempt:
    """A range that is to be classified, and where: plain data."""

    range: Range
    folders: Folders
    draft: Path
    """Nobody else's."""
    is_confirmed: bool = False
    """Whether the images that it found to be missing are so elsewhere, too."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """An attempt that is complete, and found many images to be missing: are they, elsewhere?"""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Landmark:
    """An image of the input, and how large its file is where the job was started."""

    ref: ImageRef
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Duty:
    """What a process of a crew needs to know first: plain data."""

    job: JobSpec
    model: "ResolvedModel"
    listing: Listing
    """In its place by the time that ranges come, and not before."""
    num_images: int
    first: tuple[Entry, ...] = ()
    """Its first ones."""
    sample: tuple[ImageRef, ...] = ()
    """Some of it, where the sessions are opened with a sample."""
    landmarks: tuple[Landmark, ...] = ()
    """What the input must hold here as well."""


class ServeReporter(Reporter):
    """What it tells besides."""

    def opened(self, opened: "Opened", num_streams: int) -> None:
        """Its sessions are open and proven; what they are, without the classifiers."""

    def committed(self, attempt: Attempt, part: Committed) -> None:
        """A range is done, by this process or by another that was faster."""

    def doubts(self, doubt: Doubt) -> None:
        """A range is done, and is to be committed once it is confirmed."""

    def figures(self, figures: RunStats) -> None:
        """How it does, every few seconds."""


class Inbox:
    """The ranges that come, from another thread; None is the last."""

    def __init__(self, attempts: Sequence[Attempt] = ()) -> None:
        self._come: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self.has_ended = False
        for attempt in attempts:
            self.put(attempt)

    def put(self, attempt: Attempt | None) -> None:
        """One more."""
        self._come.put(attempt)

    def take(self, seconds: float) -> Attempt | None:
        """The next; None: none came in that time, or there are no more."""
        if self.has_ended:
            return None
        try:
            found = self._come.get(timeout=seconds)
        except queue.Empty:
            return None
        self.has_ended = found is None
        return found
