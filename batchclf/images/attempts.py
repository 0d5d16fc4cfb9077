"""Asking other machines: what they answer instead of content, and how often they are asked.

A request is tried again, after a pause, where what went wrong may pass. No wait is endless, and one
in the main thread ends with a signal, whatever the server does.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

PAUSES_S = (0.1, 0.5, 2.0)
"""Before a request is tried again; half of each up to one and a half of it, by chance, so that
those that were refused together do not come back together."""
MAX_PAUSE_S = 30.0
"""A server that asks for a longer one is not waited for."""
OPENING_S = 8.0
"""Seconds in which a place must answer before a job begins."""
LONGEST_REQUEST_S = 30.0
CHANGED = "changed since it was listed, or while it was read"
Code = Literal["vanished", "permission_denied", "changed", "io_error", "bad_name", "no_parts"]
"""As of `Failure`, but for the last two, which end a job: a name in a listing that no path can be,
and a server that sends files in one piece only."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one read may take; three quarters of `loader.max_seconds`, and no more."""

    total_s: float
    """No try begins later than so many seconds after the first."""
    request_s: float
    """Of one try."""

    @classmethod
    def within(cls, max_seconds: float) -> "Patience":
        """So that decoding what was read has time left."""
        return cls(max_seconds / 2, min(LONGEST_REQUEST_S, max_seconds / 4))


@dataclass(frozen=True, slots=True)
class Content:
    """What a server sent of a file."""

    data: bytes
    """Empty where the file is larger than was asked for."""
    size: int
    """Of the whole file."""
    tag: str | None = None
    """Another one where the file is another (ETag)."""


class Refused(Exception):
    """What a server said, or what became of the connection, in place of content.

    The message holds no address: some carry a signature.
    """

    def __init__(
        self,
        why: str,
        code: Code = "io_error",
        *,
        may_pass: bool = False,
        is_everywhere: bool = False,
        is_unanswered: bool = False,
        after_s: float | None = None,
    ) -> None:
        super().__init__(why)
        self.code = code
        self.may_pass = may_pass
        self.is_everywhere = is_everywhere
        """Whether it is said of everything there: credentials that have expired, no such bucket."""
        self.is_unanswered = is_unanswered
        """Whether nothing came from the server: it may be down, or the network."""
        self.after_s = after_s
        """When the server wants to be asked again."""
        self.num_tries = 1

    def __str__(self) -> str:
        tried = f"tried {self.num_tries} times: " if self.num_tries > 1 else ""
        return tried + str(self.args[0])


def insist(ask: Callable[[], _Answer], total_s: float) -> _Answer:
    """What `ask` returns, tried again after what may pass.

    Raises:
        Refused: it does not pass, or not in time.
    """
    ends_at = time.monotonic() + total_s
    is_main = threading.current_thread() is threading.main_thread()
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return _interruptible(ask, ends_at - time.monotonic()) if is_main else ask()
        except Refused as refused:
            refused.num_tries = num_tries
            pause_s = _pause_s(refused, num_tries)
            if pause_s is None or time.monotonic() + pause_s >= ends_at:
                raise
        time.sleep(pause_s)


def _pause_s(refused: Refused, num_tries: int) -> float | None:
    """None: no further try."""
    if not refused.may_pass or num_tries > len(PAUSES_S):
        return None
    own_s = PAUSES_S[num_tries - 1] * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
    if refused.after_s is None:
        return own_s
    return max(own_s, refused.after_s) if refused.after_s <= MAX_PAUSE_S else None


def _interruptible(ask: Callable[[], _Answer], seconds: float) -> _Answer:
    """Ask in a thread that is left behind where a signal, or the end of the time, comes first.

    Python handles signals in the main thread only, and not before a library's call returns.

    Raises:
        Refused: also for want of an answer in time.
    """
    answers: list[_Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            errors.append(error)

    asking = threading.Thread(target=run, name="ask", daemon=True)
    asking.start()
    asking.join(max(0.0, seconds))
    if errors:
        raise errors[0]
    if not answers:
        raise Refused(
            f"no answer within {max(0.0, seconds):.0f} s", may_pass=True, is_unanswered=True
        )
    return answers[0]
