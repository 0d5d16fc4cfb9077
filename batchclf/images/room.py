"""Room in memory: who is about to take a far file's content says first how large it is.

What reads ahead bounds the sum. A read for which there is no room yet ends, and begins again when
there is: waiting on an open connection, it would be given up as one whose server does not answer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Claim = Callable[[int], None]
"""Called with the bytes that a read will take in all, with those that it claimed before."""


def unclaimed(num_bytes: int) -> None:
    """A claim of who need not ask."""


_claim: ContextVar[Claim] = ContextVar("claim", default=unclaimed)


class NoRoom(Exception):
    """There is no room for so many bytes yet; no failure of the read."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"no room for {num_bytes:,} bytes yet")
        self.num_bytes = num_bytes


def this_claim() -> Claim:
    """What this thread claims room with; whatever it calls raises NoRoom where there is none."""
    return _claim.get()


@contextmanager
def claiming(claim: Claim) -> Iterator[None]:
    """Have room claimed by what this thread reads within."""
    token = _claim.set(claim)
    try:
        yield
    finally:
        _claim.reset(token)
