"""Who waits for something outside, such as a network, tells whoever watches over this process.

A wait shows neither as CPU time nor as finished images, so it would be taken for a hang. Whoever
tells that it is alive must end by itself where what it waits for never comes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tell: ContextVar[Callable[[], None]] = ContextVar("tell", default=lambda: None)


def alive() -> None:
    """Tell that all is well, though nothing shows it."""
    _tell.get()()


@contextmanager
def watched(tell: Callable[[], None]) -> Iterator[None]:
    """Have `tell` called whenever this thread says that it is `alive`."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
