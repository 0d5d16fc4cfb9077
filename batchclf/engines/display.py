"""What people, or a program, are shown of a run while it goes on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from batchclf.results.stats import Live

LOGGER = logging.getLogger("batchclf")


class Display(Protocol):
    """Who is shown a run."""

    def log(self, text: str) -> None:
        """One line for people."""

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Classifying begins, or goes on in another process."""

    def update(self, num_images: int, num_errors: int) -> None:
        """So many images have a record by now, of which some are errors."""


class RunDisplay(Display, Protocol):
    """Who is shown a whole run."""

    def live(self, live: "Live") -> None:
        """What is to be seen of it just now; told every second or so, and at its end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    num_images: int
    """Of the whole job, or of the shard."""
    num_done: int
    """With a record by now, those of earlier runs included."""
    num_errors: int
    """Of these."""


ShowProgress = Callable[[Progress], None]


class ProgramDisplay:
    """Lines go to the logger `batchclf`, progress to a function; what that raises ends the run."""

    def __init__(self, show: ShowProgress | None = None) -> None:
        self._show = show
        self._num_images = 0
        self._last: Progress | None = None

    def log(self, text: str) -> None:
        """One line, at level INFO."""
        LOGGER.info("%s", text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Tell how many images there are, and how far an earlier run came."""
        self._num_images = num_images
        self.update(num_done, num_errors)

    def update(self, num_images: int, num_errors: int) -> None:
        """Tell how far the run is, where that has changed."""
        progress = Progress(self._num_images, num_images, num_errors)
        if self._show is not None and progress != self._last:
            self._last = progress
            self._show(progress)

    def live(self, live: "Live") -> None:
        """Programs read the summary, or stats.jsonl."""


class Bar:
    """A bar of tqdm's, in a notebook one of the notebook's; a `ShowProgress`."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Move the bar, which is drawn at the first call."""
        if self._bar is None:
            from tqdm.auto import tqdm  # late: it looks whether this is a notebook

            self._bar = tqdm(total=progress.num_images, initial=progress.num_done, unit="img")
        if progress.num_errors:
            self._bar.set_postfix(errors=progress.num_errors, refresh=False)
        self._bar.update(progress.num_done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
