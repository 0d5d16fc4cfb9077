"""Zip archives (APPNOTE.TXT 6.3.10): members by the central directory at their end.

The directory is read as a stream: `zipfile` keeps 700 bytes and more for each member.
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final, NamedTuple

from batchclf.images.archives.location import File, Location, located, parse
from batchclf.images.archives.members import (
    Found,
    LeftOut,
    Limits,
    Member,
    Ranges,
    damage,
    too_large,
    unreadable,
)
from batchclf.images.archives.sides import MAX_SIDE_BYTES
from batchclf.images.formats import describe_stranger
from batchclf.results.records import Failure
from batchclf.system.alive import at_image

KIND = b"zip"
SLACK_BYTES = 32
"""Read beyond a member, as its local header may be longer than the directory tells; the directory
lies behind the last member, so there is as much in the file."""
INFLATE_BYTES = 2**18
MAX_LZMA_BYTES = 2**28
"""Of memory to inflate one member with."""
_END: Final = struct.Struct("<4s4H2LH")
"""Signature, this disk, the directory's, entries here and of all, the directory's bytes and
offset, bytes of the comment."""
_END_64: Final = struct.Struct("<4s12x2L4Q")
"""The same, but for the comment."""
_LOCATOR: Final = struct.Struct("<4s4xQ4x")
_ENTRY: Final = struct.Struct("<4sxB2x2H4x3L4H2x2L")
"""Signature, system, flags, method, CRC, compressed and plain size, bytes of name, extra fields and
comment, disk, attributes, offset."""
_LOCAL: Final = struct.Struct("<4s2x2H16x2H")
"""Signature, flags, method, bytes of name and extra fields."""
_MAX_COMMENT_BYTES = 2**16
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_OTHER_METHODS: Final = {1: "shrink", 6: "implode", 9: "deflate64", 93: "zstd", 95: "xz"}
_ENCRYPTED = 0x2041
"""Flags: encrypted, strongly, with a masked header."""
_HAS_END_MARK = 0x0002
_WINDOWS, _UNIX = (0, 10, 11), 3
_SYMBOLIC_LINK = 0xA000
_ZIP64, _UNICODE_NAME = 0x0001, 0x7075
_FULL, _FULL_16 = 0xFFFFFFFF, 0xFFFF


# ---- what is in it -------------------------------------------------------------------------------


class _Directory(NamedTuple):
    start: int
    num_bytes: int
    num_entries: int
    moved: int
    """By how much all offsets are too small: something was put before the archive."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    system: int
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    attributes: int
    offset: int
    head: int
    """At least as many bytes as lie before the member's own, most likely."""


def scan(file: BinaryIO, files: Ranges, path: bytes) -> Iterator[Found]:
    """What an archive holds, in the order of its directory."""
    found = _directory(file)
    if isinstance(found, Failure):
        yield damage(found.message)
        return
    file.seek(found.start)
    left, num_entries = found.num_bytes, 0
    while left > 0:
        fixed = file.read(_ENTRY.size)
        values = _ENTRY.unpack(fixed) if len(fixed) == _ENTRY.size else (b"",)
        if values[0] != b"PK\1\2":
            break
        num_name, num_extra, num_comment = values[7:10]
        rest = file.read(num_name + num_extra + num_comment)
        left -= _ENTRY.size + len(rest)
        num_entries += 1
        entry = _entry(values, rest[:num_name], rest[num_name : num_name + num_extra], found.moved)
        if not entry.name.endswith(b"/"):
            yield _found(entry, files, path, found.start)
    if num_entries < found.num_entries or left > 0:
        at = found.start + found.num_bytes - left
        yield damage(
            f"its directory is damaged at byte {at:,}: {num_entries:,} of its "
            f"{found.num_entries:,} members are listed"
        )


def _found(entry: _Entry, files: Ranges, path: bytes, end: int) -> Found:
    name, offset = entry.name, entry.offset
    if entry.system == _UNIX and entry.attributes >> 16 & 0xF000 == _SYMBOLIC_LINK:
        return LeftOut(name)
    if entry.flags & _ENCRYPTED:
        return unreadable(name, offset, Failure("unsupported_format", "encrypted in its archive"))
    if entry.method not in (_STORED, _DEFLATED, _BZIP2, _LZMA):
        method = _OTHER_METHODS.get(entry.method, f"method {entry.method}")
        why = f"compressed with {method}; zip it anew with deflate, or stored"
        return unreadable(name, offset, Failure("unsupported_format", why))
    if offset + _LOCAL.size + entry.packed > end:
        why = f"its archive ends before byte {offset + _LOCAL.size + entry.packed:,}"
        return unreadable(name, offset, Failure("truncated", why))
    head = min(entry.head, end - offset - entry.packed)
    numbers = (KIND, offset, head, entry.packed, entry.size, entry.method, entry.crc)
    fields = b"%s:%d,%d,%d,%d,%d,%d" % numbers
    return Member(name, offset, fields, entry.size, partial(_content, files, path, fields))


def _content(files: Ranges, path: bytes, fields: bytes) -> bytes | Failure:
    return read(files, parse(located(fields, File(path, path))), Limits(MAX_SIDE_BYTES))


def _entry(values: tuple[int, ...], name: bytes, extra: bytes, moved: int) -> _Entry:
    _, system, flags, method, crc, packed, size, *_, attributes, offset = values
    fields = dict(_extra_fields(extra))
    wide = fields.get(_ZIP64, b"")
    numbers = []
    for number in (size, packed, offset):
        if number == _FULL and len(wide) >= 8:
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        numbers.append(number)
    size, packed, offset = numbers
    head = _LOCAL.size + len(name) + len(extra) + SLACK_BYTES
    unicode_name = fields.get(_UNICODE_NAME, b"")
    if unicode_name[:1] == b"\1" and unicode_name[1:5] == zlib.crc32(name).to_bytes(4, "little"):
        name = unicode_name[5:]
    if system in _WINDOWS and b"/" not in name:
        name = name.replace(b"\\", b"/")
    return _Entry(name, system, flags, method, crc, packed, size, attributes, offset + moved, head)


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        tag, num_bytes = struct.unpack_from("<2H", extra, at)
        yield tag, extra[at + 4 : at + 4 + num_bytes]
        at += 4 + num_bytes


def _directory(file: BinaryIO) -> _Directory | Failure:
    """Where the central directory is, or why there is none."""
    size = file.seek(0, 2)
    tail_at = max(0, size - _END.size - _MAX_COMMENT_BYTES - _LOCATOR.size)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size) + 4)
    if at < 0:
        return _no_directory(file)
    _, disk, _, _, num_entries, num_bytes, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if tail[max(0, at - _LOCATOR.size) : at].startswith(b"PK\6\7"):
        located_at = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)[1]
        for wide_at in (end - _LOCATOR.size - _END_64.size, located_at):
            file.seek(min(max(0, wide_at), size))
            wide = file.read(_END_64.size)
            if wide.startswith(b"PK\6\6") and len(wide) == _END_64.size:
                end = wide_at
                _, disk, _, _, num_entries, num_bytes, offset = _END_64.unpack(wide)
                break
    if disk not in (0, _FULL_16):
        return Failure("damaged_archive", "one of several parts of an archive; join them first")
    start = end - num_bytes
    if start < 0 or offset > start:
        return Failure("damaged_archive", "its directory would begin before the archive does")
    return _Directory(start, num_bytes, num_entries, start - offset)


def _no_directory(file: BinaryIO) -> Failure:
    file.seek(0)
    first = file.read(64)
    if first.startswith(b"PK\3\4"):
        why = "ends without the directory of its members: copy or download it again"
    elif first:
        why = f"no zip archive: {describe_stranger(first)}"
    else:
        why = "an empty file"
    return Failure("damaged_archive", why)


# ---- reading -------------------------------------------------------------------------------------


def read(files: Ranges, location: Location, limits: Limits) -> bytes | Failure:
    """The bytes of a member, or why they cannot be read."""
    offset, head, packed, size, method, crc = location.numbers
    if refused := too_large(max(size, packed), limits.max_bytes):
        return refused
    limits.claim(packed if method == _STORED else packed + size)
    data = files.read_range(location.archive, offset, head + packed)
    if isinstance(data, Failure):
        return data
    signature, flags, _, num_name, num_extra = _LOCAL.unpack_from(data)
    if signature != b"PK\3\4":
        return Failure("corrupt", f"its header at byte {offset:,} of the archive is damaged")
    begin = _LOCAL.size + num_name + num_extra
    if (num_missing := begin + packed - len(data)) > 0:
        more = files.read_range(location.archive, offset + len(data), num_missing)
        if isinstance(more, Failure):
            return _beyond(more)
        data += more
    with at_image():  # also where it is read ahead: inflating it may end this process
        content = _unpacked(data[begin : begin + packed], method, flags, (size, limits.max_bytes))
    if isinstance(content, bytes) and zlib.crc32(content) != crc:
        return Failure("corrupt", "its checksum in the archive is that of other bytes")
    return content


def _beyond(failure: Failure) -> Failure:
    """The failure to read what a local header alone says is there."""
    if failure.code != "changed":
        return failure
    return Failure("corrupt", "its header says that it goes on behind the end of the archive")


_Step = Callable[[int], bytes]
"""Inflates up to so many more bytes; none: that was all."""


def _unpacked(data: bytes, method: int, flags: int, limits: tuple[int, int]) -> bytes | Failure:
    if method == _STORED:
        return data
    try:
        return _inflated(_inflater(data, method, flags, limits[0]), *limits)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        return Failure("corrupt", f"does not inflate: {error}")


def _inflated(step: _Step, size: int, max_bytes: int) -> bytes | Failure:
    """What is inflated; if that is more than the archive says, it is only counted."""
    parts: list[bytes] = []
    num_bytes = 0
    while piece := step(size + 1 - num_bytes if num_bytes <= size else INFLATE_BYTES):
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            why = f"inflates to more than the {size:,} bytes that its archive says"
            return Failure("too_large_bytes", f"{why}; loader.max_bytes allows {max_bytes:,}")
        if num_bytes <= size:
            parts.append(piece)
    if num_bytes != size:
        return Failure("corrupt", f"inflates to {num_bytes:,} bytes; its archive says {size:,}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _inflater(data: bytes, method: int, flags: int, size: int) -> _Step:
    if method == _DEFLATED:
        return _deflate(data)
    if method == _BZIP2:
        return _buffered(bz2.BZ2Decompressor(), data)
    # What .lzma files begin with: properties, and the size unless the end is marked.
    num_bytes = b"\xff" * 8 if flags & _HAS_END_MARK else size.to_bytes(8, "little")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_LZMA_BYTES)
    return _buffered(decompressor, data[4:9] + num_bytes + data[9:])


def _deflate(data: bytes) -> _Step:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    left = data

    def step(max_length: int) -> bytes:
        nonlocal left
        piece = inflater.decompress(left, max_length)
        left = inflater.unconsumed_tail
        return piece

    return step


def _buffered(decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: bytes) -> _Step:
    left = data

    def step(max_length: int) -> bytes:
        nonlocal left
        if decompressor.eof:
            return b""
        piece = decompressor.decompress(left, max_length)
        left = b""
        return piece

    return step
