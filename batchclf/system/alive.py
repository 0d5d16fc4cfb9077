"""What a thread tells of itself to whoever watches over this process.

A wait for something outside, such as a network, shows neither as CPU time nor as finished images,
so it would be taken for a hang. Whoever tells that it is alive must end by itself where what it
waits for never comes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Place(NamedTuple):
    """Where a thread is in what can only be read from its beginning on, such as bytes or rows."""

    start: int
    """The unit that is read next."""
    stop: int
    """The next unit from which reading can begin anew: those before it are had by passing here."""


TellAway = Callable[[bool], None]
TellAt = Callable[[bool], None]
TellPlace = Callable[[Place | None], None]
"""None: the thread reads nothing in passing any more."""
_tell: ContextVar[Callable[[], None]] = ContextVar("tell", default=lambda: None)
_tell_away: ContextVar[TellAway] = ContextVar("tell away", default=lambda is_away: None)
_tell_place: ContextVar[TellPlace] = ContextVar("tell place", default=lambda place: None)
_tell_at: ContextVar[TellAt] = ContextVar("tell at", default=lambda is_at: None)


def alive() -> None:
    """Tell that all is well, though nothing shows it."""
    _tell.get()()


def away() -> AbstractContextManager[None]:
    """Tell that this thread is not at its image: it waits for its turn."""
    return _during(_tell_away.get())


def at_image() -> AbstractContextManager[None]:
    """Tell that this thread is at its image itself, whatever it does otherwise."""
    return _during(_tell_at.get())


@contextmanager
def _during(tell: Callable[[bool], None]) -> Iterator[None]:
    tell(True)
    try:
        yield
    finally:
        tell(False)


@contextmanager
def passing() -> Iterator[TellPlace]:
    """Tell that this thread passes over others to its image: at which place it is, each time.

    The place at which memory runs out stays told: it is to blame for that.
    """
    tell = _tell_place.get()
    try:
        yield tell
    except MemoryError:
        raise
    except BaseException:
        tell(None)
        raise
    tell(None)


@contextmanager
def watched(
    tell: Callable[[], None],
    tell_away: TellAway = lambda is_away: None,
    tell_place: TellPlace = lambda place: None,
    tell_at: TellAt = lambda is_at: None,
) -> Iterator[None]:
    """Have `tell` called whenever this thread says that it is `alive`; the others likewise."""
    tokens = _tell.set(tell), _tell_away.set(tell_away), _tell_place.set(tell_place)
    token_at = _tell_at.set(tell_at)
    try:
        yield
    finally:
        _tell.reset(tokens[0])
        _tell_away.reset(tokens[1])
        _tell_place.reset(tokens[2])
        _tell_at.reset(token_at)
