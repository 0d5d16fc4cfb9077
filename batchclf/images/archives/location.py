"""Where the bytes of a member lie: one line of bytes, which stands in the frozen listing.

`kind:fields:version:truth:archive`. The fields are separated by commas, and in them and in the
truth what would be taken for a separator is percent-encoded; the path of the archive comes last, as
it is. The version tells whether the archive is the one that was listed: in another one, the same
place holds other bytes.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from batchclf.results.records import Failure

FAILED = b"failed"
"""Kind of what cannot be read, as its listing found already: the fields are why."""


@dataclass(frozen=True, slots=True)
class Location:
    """A location, taken apart."""

    kind: bytes
    fields: tuple[bytes, ...]
    version: bytes
    """Of the archive that was listed."""
    archive: bytes

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields, of a kind of which all are numbers."""
        return tuple(map(int, self.fields))


def fields_of(kind: bytes, *values: int | bytes) -> bytes:
    """The first two parts of a location."""
    return kind + b":" + b",".join(_quoted(value) for value in values)


def failed(failure: Failure) -> bytes:
    """The same of what cannot be read."""
    return fields_of(FAILED, failure.code.encode(), failure.message.encode())


class File(NamedTuple):
    """A file that may be an archive."""

    path: bytes
    """As its records name it."""
    place: bytes
    """Where it is opened: the path, but for what a list names otherwise."""
    version: bytes = b""
    """As `short`, of an archive that is listed."""


def short(version: bytes) -> bytes:
    """A version, as locations have it: two have the same in 1 of 4 billion cases."""
    return blake2b(version, digest_size=4).hexdigest().encode()


def located(fields: bytes, archive: File, truth: bytes = b"") -> bytes:
    """A whole location."""
    return b"%s:%s:%s:%s" % (fields, archive.version, _quoted(truth), archive.place)


def parse(location: bytes) -> Location:
    """A location, taken apart."""
    kind, fields, version, _, archive = location.split(b":", 4)
    return Location(kind, tuple(map(unquote_to_bytes, fields.split(b","))), version, archive)


def truth_of(location: bytes) -> bytes | None:
    """The true label that stands beside an image in its archive; None: there is none."""
    return unquote_to_bytes(location.split(b":", 4)[3]) or None


def failure_in(location: Location) -> Failure:
    """Why what is located so cannot be read."""
    code, message = location.fields
    return Failure(code.decode(), message.decode())


def _quoted(value: int | bytes) -> bytes:
    if isinstance(value, int):
        return b"%d" % value
    return quote_from_bytes(value, safe=" /").encode()
