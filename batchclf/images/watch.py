"""Which image each thread is at, for whoever finds this process dead or stuck to know the suspects.

A thread is at an image while it loads it: not while it waits for its turn, and in passing through
an archive only at one place after the other, each of which has as much time as an image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from batchclf.system.alive import Place, watched

Note = Callable[[int, int | None, int], None]
"""Told, by a thread's number, the image (index in the listing) that it is at, None: at none; and
how many places it has passed on its way there: 0, once it has it."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who hears of it."""

    note: Note = lambda thread, index, step: None
    beat: Callable[[], None] = lambda: None
    """Called when all is well, though nothing shows it."""

    @contextmanager
    def loading(self, thread: int, index: int) -> Iterator[None]:
        """Note that a thread reads and decodes an image, until the end of the block."""
        with self._told(thread, index, index):
            yield

    @contextmanager
    def reading(self, thread: int, index: int) -> Iterator[None]:
        """Note where it reads an image in passing, and inflates it; any other read is not noted."""
        with self._told(thread, index, None):
            yield

    @contextmanager
    def _told(self, thread: int, index: int, otherwise: int | None) -> Iterator[None]:
        step, is_passing = 0, False

        def tell_alive() -> None:
            nonlocal step
            if is_passing:
                step += 1
                self.note(thread, index, step)
            self.beat()

        def tell_place(place: Place | None) -> None:
            nonlocal is_passing
            is_passing = place is not None
            if is_passing:
                tell_alive()
            else:
                self.note(thread, otherwise, 0)

        def tell_away(is_away: bool) -> None:
            self.note(thread, None if is_away else otherwise, 0)

        def tell_at(is_at: bool) -> None:
            self.note(thread, index if is_at else otherwise, 0)

        self.note(thread, otherwise, 0)
        try:
            with watched(tell_alive, tell_away, tell_place, tell_at):
                yield
        finally:
            self.note(thread, None, 0)


UNWATCHED = Watch()
"""Nobody hears of it."""
