"""Tar archives: their headers (POSIX.1-2024 pax, ustar, GNU tar, V7), damaged ones as well.

Nothing is taken on trust: where a header should be and none is, the next one is looked for.
"""

import re
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, Final, Protocol

from batchclf.images.archives.location import Location
from batchclf.images.archives.members import (
    Damage,
    Found,
    LeftOut,
    Limits,
    Link,
    Member,
    Ranges,
    damage,
    too_large,
    unreadable,
)
from batchclf.images.formats import describe_stranger
from batchclf.results.records import Failure

KIND = b"range"
BLOCK = 512
MAX_EXTENSION_BYTES = 2**20
"""Of a long name or of pax records: the longest path has 4,096 bytes."""
MAX_ZERO_BLOCKS = 2**21
"""1 GiB, after which an archive that goes on with zeros is taken to have ended."""
_HEADER: Final = struct.Struct("100s24x12s12x8sc100s6s2x80x155s")
"""Name, size, checksum, type, link name, magic, prefix."""
_FILES = b"0\0007"
_LINK, _SYMBOLIC_LINK, _FOLDER, _SPARSE = b"1", b"2", b"5", b"S"
_OTHERS = b"346VMND"
"""Devices, FIFOs, and GNU's volume labels, continued files and folder dumps."""
_LONG_NAME, _LONG_LINK, _GLOBAL = b"L", b"K", b"g"
_PAX = b"xX"
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_Notes = dict[bytes, bytes]
"""What extensions say of the next header, by the keys of pax."""


class Stream(Protocol):
    """An archive from its beginning on."""

    kind: bytes
    """Of the locations of its members."""
    size: int | None
    """None: unknown, as it is compressed."""
    position: int

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end only.

        Raises:
            Broken: they cannot be inflated.
        """

    def skip_to(self, position: int) -> None:
        """Go on from there; at most to the end.

        Raises:
            Broken: as `read`.
        """


class Broken(Exception):
    """What is compressed ends too soon, or does not inflate."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class PlainFile:
    """A tar archive as it is."""

    kind = KIND

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size: int | None = file.seek(0, 2)
        self.position = file.seek(0)

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end only."""
        data = self._file.read(num_bytes)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        """Go on from there; at most to the end."""
        assert self.size is not None
        self.position = min(position, self.size)
        self._file.seek(self.position)


@dataclass(frozen=True, slots=True)
class Header:
    """One header, with what extensions said of it."""

    name: bytes
    type: bytes
    target: bytes
    start: int
    """Where the member's bytes begin."""
    size: int
    is_extended: bool
    """Of a sparse file: whether its map goes on behind the header."""

    @property
    def end(self) -> int:
        """Where the next header should be."""
        has_bytes = self.type not in (_LINK, _SYMBOLIC_LINK)
        num_blocks = -(-self.size // BLOCK) if has_bytes else 0
        return self.start + num_blocks * BLOCK


def scan(stream: Stream) -> Iterator[Found]:
    """What an archive holds, in its order."""
    try:
        yield from _scan(stream)
    except Broken as broken:
        yield Damage(replace(broken.failure, code="damaged_archive"))


def _scan(stream: Stream) -> Iterator[Found]:
    headers = _headers(stream)
    notes: _Notes = {}
    for header in headers:
        if isinstance(header, Damage):
            notes = {}
            yield header
        elif header.type in _PAX or header.type in (_LONG_NAME, _LONG_LINK):
            if header.size > MAX_EXTENSION_BYTES:
                yield damage(f"byte {header.start:,}: a name of {header.size:,} bytes")
            else:
                notes |= _notes(header, stream.read(header.size))
            stream.skip_to(header.end)
        elif header.type == _GLOBAL:
            stream.skip_to(header.end)
        else:
            noted = (
                _noted(_behind_sparse_map(header, stream), notes)
                if notes or header.is_extended
                else header
            )
            if noted.type != _FOLDER and not noted.name.endswith(b"/"):
                yield _found(noted, stream, is_sparse=_is_sparse(noted, notes))
            notes = {}
            try:
                stream.skip_to(noted.end)
            except Broken as broken:
                is_cut = stream.position < noted.start + noted.size
                if is_cut and broken.failure.code == "truncated":  # reading the member tells
                    return
                raise


def _found(header: Header, stream: Stream, *, is_sparse: bool) -> Found:
    name, start, size = header.name, header.start, header.size
    if header.type == _LINK:
        return Link(name, start, header.target)
    if header.type == _SYMBOLIC_LINK or header.type in _OTHERS:
        return LeftOut(name)
    if is_sparse:
        why = "a sparse file in a tar archive; store it without holes (tar without --sparse)"
        return unreadable(name, start, Failure("unsupported_format", why))
    if stream.size is not None and start + size > stream.size:
        why = f"its archive ends after {stream.size - start:,} of its {size:,} bytes"
        return unreadable(name, start, Failure("truncated", why))
    fields = b"%s:%d,%d" % (stream.kind, start, size)
    return Member(name, start, fields, size, partial(_content, stream, size))


def _content(stream: Stream, size: int) -> bytes | Failure:
    try:
        return stream.read(size)
    except Broken as broken:
        return broken.failure


# ---- headers -------------------------------------------------------------------------------------


def _headers(stream: Stream) -> Iterator[Header | Damage]:
    """Each header; whoever takes one leaves the stream where the next should be."""
    num_found = 0
    while block := stream.read(BLOCK):
        header = _parse(block, stream.position)
        if header is None:
            header = yield from _next_header(stream, block, num_found)
        if header is None:
            return
        num_found += 1
        yield header


def _next_header(
    stream: Stream, block: bytes, num_found: int
) -> Generator[Damage, None, Header | None]:
    """The next header behind a block that is none, which may end the archive, or be damaged.

    Only zeros may stand between archives that were put one behind the other.
    """
    first, at = block, stream.position - len(block)
    is_zero, num_blocks = True, 0
    header: Header | None = None
    while block and header is None:
        is_zero = is_zero and not block.strip(b"\0")
        num_blocks += 1
        if is_zero and num_blocks > MAX_ZERO_BLOCKS:
            yield damage(f"only zeros from byte {at:,} on; what may follow was not looked at")
            return None
        block = stream.read(BLOCK)
        header = _parse(block, stream.position) if block[257:262] == b"ustar" else None
    if header is not None:
        if not is_zero:
            end = stream.position - BLOCK
            yield damage(f"bytes {at:,} to {end:,} cannot be read; their images are not listed")
    elif is_zero:
        return None
    elif not num_found:
        yield damage(f"no tar archive: {describe_stranger(first)}")
    else:
        yield damage(f"cannot be read from byte {at:,} on; images behind it are not listed")
    return header


def _parse(block: bytes, end: int) -> Header | None:
    """The header in a block that ends there; None: there is none."""
    if len(block) < BLOCK:
        return None
    name, size, checksum, type_, target, magic, prefix = _HEADER.unpack_from(block)
    expected, num_bytes = _number(checksum), _number(size)
    if expected is None or num_bytes is None or num_bytes < 0:
        return None
    others = block[:148] + block[156:]
    if sum(others) + 8 * 32 != expected and _signed_sum(others) + 8 * 32 != expected:
        return None
    name = _text(name)
    if magic == b"ustar\0" and prefix[0]:
        # star keeps times behind a shorter prefix, GNU tar in its place.
        is_star = block[508:] == b"tar\0"
        name = _text(prefix[:131] if is_star else prefix) + b"/" + name
    is_extended = type_ == _SPARSE and block[482] != 0
    return Header(name, type_, _text(target), end, num_bytes, is_extended)


def _signed_sum(data: bytes) -> int:
    """As some old programs computed it."""
    return sum(byte - 256 if byte > 127 else byte for byte in data)


def _number(field: bytes) -> int | None:
    """Octal digits; or, where the first bit is set, a number of base 256."""
    if field[0] & 0x80:
        return (
            int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] == 0x80 else -1
        )
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


# ---- extensions ----------------------------------------------------------------------------------


def _notes(header: Header, data: bytes) -> _Notes:
    """What an extension says of the next header."""
    if header.type == _LONG_NAME:
        return {b"path": _text(data)}
    if header.type == _LONG_LINK:
        return {b"linkpath": _text(data)}
    notes = {}
    at = 0
    while match := _PAX_RECORD.match(data, at):
        end = at + int(match[1])
        if end <= match.end() or data[end - 1 : end] != b"\n":
            break
        notes[match[2]] = data[match.end() : end - 1]
        at = end
    return notes


def _noted(header: Header, notes: _Notes) -> Header:
    size = notes.get(b"size", b"")
    return replace(
        header,
        name=notes.get(b"GNU.sparse.name") or notes.get(b"path") or header.name,
        target=notes.get(b"linkpath") or header.target,
        size=int(size) if re.fullmatch(rb"\d{1,20}", size) else header.size,
    )


def _is_sparse(header: Header, notes: _Notes) -> bool:
    return header.type == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in notes)


def _behind_sparse_map(header: Header, stream: Stream) -> Header:
    """Of an old GNU sparse file: its bytes begin behind the blocks that its map takes."""
    is_extended = header.is_extended
    while is_extended:
        is_extended = any(stream.read(BLOCK)[504:505])
    return replace(header, start=stream.position)


# ---- reading -------------------------------------------------------------------------------------


def read(files: Ranges, location: Location, limits: Limits) -> bytes | Failure:
    """The bytes of a member of a plain archive, or why they cannot be read."""
    start, length = location.numbers
    return too_large(length, limits.max_bytes) or files.read_range(location.archive, start, length)
