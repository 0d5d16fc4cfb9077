"""Progress on stderr: a bar on a terminal, one plain line every 30 s elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from batchclf.cli.streams import is_read, printable, say, unless_gone

PLAIN_INTERVAL_S = 30.0


class Progress:
    """A `Reporter` for people; use as a context manager."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._num_images = 0
        self._num_before = 0
        self._started = 0.0
        self._next_line = 0.0

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
        line = f"batchclf: {text}"
        if self._bar is None:
            say(line)
        elif is_read():
            with unless_gone(sys.stderr):
                tqdm.write(printable(line), file=sys.stderr)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Start counting towards `num_images`, of which `num_done` were done before.

        Called again when the work goes on in another process, it changes nothing.
        """
        if self._num_images:
            return
        self._num_images = num_images
        self._num_before = num_done
        self._started = time.monotonic()
        self._next_line = self._started + PLAIN_INTERVAL_S
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=num_images,
                initial=num_done,
                unit="img",
                unit_scale=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(self, num_images: int, num_errors: int) -> None:
        """Show how many images have a record by now, and how many of those are errors."""
        if self._bar is not None:
            if not is_read():
                return
            with unless_gone(sys.stderr):
                if num_errors:
                    self._bar.set_postfix(errors=num_errors, refresh=False)
                self._bar.update(num_images - self._bar.n)
            return
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + PLAIN_INTERVAL_S
        rate = (num_images - self._num_before) / (now - self._started)
        left = (self._num_images - num_images) / rate if rate else float("inf")
        self.log(
            f"{num_images:,}/{self._num_images:,} images, {num_errors:,} errors, "
            f"{rate:.1f} images/s, {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
