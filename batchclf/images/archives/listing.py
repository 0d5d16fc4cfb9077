"""Which archive is being listed, for whoever finds this process dead to know the suspect.

What was found to end, or to hold up, whoever lists it is not opened any more: it is one record.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from batchclf.images.archives.location import File
from batchclf.images.archives.members import Ranges, Rows
from batchclf.results.records import Failure


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive of an input; plain data, so that it can be sent to other processes."""

    files: Ranges
    """Those that it is one of."""
    rows: Rows | None
    file: File


Unlistable = Mapping[Archive, Failure]
"""What cannot be listed, as others found out."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What is known of archives, and who hears which one is being listed."""

    unlistable: Unlistable = field(default_factory=dict)
    tell: Callable[[Archive | None], None] = lambda archive: None
    """None: none is, any more."""


_ALONE = Listing()
_listing: ContextVar[Listing] = ContextVar("listing", default=_ALONE)


def why_unlistable(archive: Archive) -> Failure | None:
    """Why an archive is not even opened, if it is so."""
    return _listing.get().unlistable.get(archive)


@contextmanager
def being_listed(archive: Archive) -> Iterator[None]:
    """Tell that this thread lists an archive, until the end of the block."""
    tell = _listing.get().tell
    tell(archive)
    try:
        yield
    finally:
        tell(None)


@contextmanager
def listing_with(listing: Listing) -> Iterator[None]:
    """Have it known to what this thread lists within."""
    token = _listing.set(listing)
    try:
        yield
    finally:
        _listing.reset(token)
