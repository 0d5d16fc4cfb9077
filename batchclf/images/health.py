"""Whether places on other machines still answer: what tells a lost file from a lost network.

Only the former is an image's record; the latter ends the job, which then goes on where it was.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from itertools import islice
from typing import Protocol

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.images.addresses import OPENING, bucket_at, file_at, split_address, unreadable
from batchclf.images.attempts import OPENING_S, Patience, Refused, insist
from batchclf.images.dialect import is_far
from batchclf.images.local import LocalFiles
from batchclf.images.source import Source

ASK_EVERY_S = 1.0
"""Whether a place still answers is asked at most so often, however many reads fail."""
NUM_IN_A_ROW = 100
"""Files of one server that a list names and that are refused without one that is not. Where no
answer comes at all, it is asked after the first: the network may be down."""
NUM_ASKED = 8
"""Files of the list that are tried then, as many as may be of other servers. Of a list that names
fewer, no answer at all tells nothing of the network."""
MAX_LINES = 1_000_000
"""Of a list, among which they are looked for."""


class Health(Protocol):
    """Tells a file that cannot be read from a place of which nothing can be."""

    def answered(self, address: str) -> None:
        """A file was read."""

    def require(self, address: str, refused: Refused) -> None:
        """Refuse to take one file for unreadable where nothing is to be had.

        Raises:
            EnvironmentFailed: with what the place says.
        """


@cache
def health_of(source: Source) -> Health:
    """The state of an input's places, as this process knows it."""
    return _ListHealth(source) if source.kind == "list" else _PlaceHealth(source)


class _PlaceHealth:
    """Of a bucket, or a file of a server."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._asking = threading.Lock()
        self._answered_at = -ASK_EVERY_S

    def answered(self, address: str) -> None:
        """As `Health`."""

    def require(self, address: str, refused: Refused) -> None:
        """As `Health`."""
        if refused.is_everywhere:
            raise unreadable(str(self._source.spec), refused) from refused
        with self._asking:
            if time.monotonic() - self._answered_at < ASK_EVERY_S:
                return
            try:
                self._ask()
            except Refused as error:
                raise unreadable(str(self._source.spec), error) from error
            self._answered_at = time.monotonic()

    def _ask(self) -> None:
        source, patience = self._source, Patience.within(self._source.max_seconds)
        root = os.fsdecode(source.root)
        if source.kind == "file":
            with _answering():
                file = file_at(f"{root}/{source.names[-1]}", patience)
                insist(lambda: file.get((0, 1)), OPENING_S)
            return
        key = split_address(root).key
        if not insist(lambda: next(bucket_at(root, patience).pages(key, None, 1), []), OPENING_S):
            raise EnvironmentFailed(
                f"input: {source.spec}: nothing lies there any more, and it held images when it "
                "was listed; put them back, and run the same command to resume"
            )


class _ListHealth:
    """Of the servers that a list names: some may be gone for good, but not all.

    Where nothing comes of a file, the network is down if nothing comes of `NUM_ASKED` files of the
    list either. Where it names fewer on other machines, each that fails is a failure of its own.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._asking = threading.Lock()
        self._asked_at = -ASK_EVERY_S
        self._is_up = True
        """Whether anything answered then."""
        self._num_refused: Counter[str] = Counter()
        """By server, in a row."""
        self._last_read: str | None = None

    def answered(self, address: str) -> None:
        """As `Health`."""
        self._last_read = address
        self._num_refused.pop(split_address(address).server, None)

    def require(self, address: str, refused: Refused) -> None:
        """As `Health`; credentials that are refused will be for the next files as well."""
        server = split_address(address).server
        if refused.code not in ("permission_denied", "io_error"):
            self._num_refused.pop(server, None)  # it answers
            return
        if refused.is_everywhere:
            raise unreadable(server, refused) from refused
        with self._asking:
            self._num_refused[server] += 1
            in_a_row = self._num_refused[server]
            may_be_down = refused.is_unanswered and len(self._to_ask) == NUM_ASKED
            if not may_be_down and in_a_row < NUM_IN_A_ROW:
                return
            if time.monotonic() - self._asked_at >= ASK_EVERY_S:
                self._is_up = self._anything_answers()
                self._asked_at = time.monotonic()
            if not self._is_up:
                raise EnvironmentFailed(
                    f"input: {self._source.spec}: {server}: cannot be read: {refused} (in a row: "
                    f"{in_a_row:,} of its files); nor can others of the list; is the network up, "
                    "and are the addresses and the credentials right? Run again to resume"
                ) from refused

    def _anything_answers(self) -> bool:
        if self._last_read is not None and _answers(self._last_read):
            return True
        # At once: each may take as long as a server that hangs is waited for.
        with ThreadPoolExecutor(NUM_ASKED) as pool:
            return any(pool.map(_answers, self._to_ask))

    @cached_property
    def _to_ask(self) -> list[str]:
        """Files of the list, of as many servers as may be."""
        # Where the list is not there any more, or not a list, it names nothing that answers.
        with suppress(EnvironmentFailed, UsageError):
            paths = islice(LocalFiles(self._source).paths(), MAX_LINES)
            addresses = map(os.fsdecode, filter(is_far, paths))
            return list(islice(_from_all_servers(addresses), NUM_ASKED))
        return []


def _from_all_servers(addresses: Iterable[str]) -> Iterator[str]:
    """The first address of each server, then the next ones of any."""
    servers: set[str] = set()
    others: list[str] = []
    for address in addresses:
        if (server := split_address(address).server) not in servers:
            servers.add(server)
            yield address
        elif len(others) < NUM_ASKED:
            others.append(address)
    yield from others


@contextmanager
def _answering() -> Iterator[None]:
    """What says of one file that it is gone is an answer."""
    try:
        yield
    except Refused as refused:
        if refused.is_everywhere or refused.code not in ("vanished", "changed"):
            raise


def _answers(address: str) -> bool:
    try:
        with _answering():
            file_at(address, OPENING).get((0, 1))
    except Refused:
        return False
    return True
