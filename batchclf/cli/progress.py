"""Progress on stderr: a bar on a terminal, one plain line every 30 s elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from batchclf.cli.streams import PREFIX, coloured, is_read, logs_json, printable, say, unless_gone
from batchclf.system.words import duration

if TYPE_CHECKING:
    from batchclf.results.stats import Live, RunStats

PLAIN_INTERVAL_S = 30.0


class Progress:
    """A `RunDisplay` for people; use as a context manager."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._num_images = 0
        self._num_before = 0
        self._started = 0.0
        self._next_line = 0.0
        self._seen = (0.0, 0)
        """When the last line was printed, and how many images there were then."""
        self._figures: RunStats | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None and is_read():
            with unless_gone(sys.stderr):
                self._bar.close()

    def log(self, text: str) -> None:
        """One line of log, above the bar where there is one."""
        line = f"{PREFIX}{text}"
        if self._bar is None:
            say(line)
        elif is_read():
            with unless_gone(sys.stderr):
                tqdm.write(coloured(printable(line)), file=sys.stderr)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Start counting towards `num_images`, of which `num_done` were done before.

        Called again when the work goes on in another process, it changes nothing.
        """
        if self._num_images:
            return
        self._num_images = num_images
        self._num_before = num_done
        self._started = time.monotonic()
        self._seen = self._started, num_done
        self._next_line = self._started + PLAIN_INTERVAL_S
        if sys.stderr.isatty() and not logs_json():
            self._bar = tqdm(
                total=num_images,
                initial=num_done,
                unit="img",
                unit_scale=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def live(self, live: "Live") -> None:
        """Keep what is to be shown beside the counts."""
        self._figures = live.figures

    def update(self, num_images: int, num_errors: int) -> None:
        """Show how many images have a record by now, and how many of those are errors."""
        if self._bar is not None:
            if not is_read():
                return
            with unless_gone(sys.stderr):
                self._bar.set_postfix_str(self._beside(num_errors), refresh=False)
                self._bar.update(num_images - self._bar.n)
            return
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + PLAIN_INTERVAL_S
        self._tell(now, num_images, num_errors)

    def _beside(self, num_errors: int) -> str:
        """What the bar, which tells the rate of just now, does not tell itself."""
        told = [f"errors={num_errors:,}"] if num_errors else []
        if self._figures is not None:
            told += [
                f"avg={self._figures.images_per_s:,.1f}img/s",
                f"limit={self._figures.bottleneck}",
            ]
        return ", ".join(told)

    def _tell(self, now: float, num_images: int, num_errors: int) -> None:
        (before, num_seen), self._seen = self._seen, (now, num_images)
        rate = (num_images - self._num_before) / (now - self._started)
        rate_now = (num_images - num_seen) / (now - before)
        left = (self._num_images - num_images) / rate if rate else float("inf")
        bottleneck = None if self._figures is None else self._figures.bottleneck
        say(
            f"{PREFIX}{num_images:,}/{self._num_images:,} images, {num_errors:,} errors, "
            f"{rate:.1f} images/s, {rate_now:.1f} now, {duration(left)} left"
            + ("" if bottleneck is None else f", limited by {bottleneck}"),
            event="progress",
            num_done=num_images,
            num_images=self._num_images,
            num_errors=num_errors,
            images_per_s=round(rate, 2),
            images_per_s_now=round(rate_now, 2),
            left_s=round(left, 1) if rate else None,
            bottleneck=bottleneck,
        )
