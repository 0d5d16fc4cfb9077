"""Who waits for something outside, such as a network, tells whoever watches over this process.

A wait shows neither as CPU time nor as finished images, so it would be taken for a hang. Whoever
tells that it is alive must end by itself where what it waits for never comes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tell: ContextVar[Callable[[], None]] = ContextVar("tell", default=lambda: None)
_tell_away: ContextVar[Callable[[bool], None]] = ContextVar(
    "tell away", default=lambda is_away: None
)


def alive() -> None:
    """Tell that all is well, though nothing shows it."""
    _tell.get()()


@contextmanager
def away() -> Iterator[None]:
    """Tell that this thread is not at its image: it passes over others, or waits for its turn."""
    tell = _tell_away.get()
    tell(True)
    try:
        yield
    finally:
        tell(False)


@contextmanager
def watched(
    tell: Callable[[], None], tell_away: Callable[[bool], None] = lambda is_away: None
) -> Iterator[None]:
    """Have `tell` called whenever this thread says that it is `alive`; `tell_away`, when `away`."""
    tokens = _tell.set(tell), _tell_away.set(tell_away)
    try:
        yield
    finally:
        _tell.reset(tokens[0])
        _tell_away.reset(tokens[1])
