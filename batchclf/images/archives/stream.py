"""Compressed tar archives: inflated from their beginning on, since nothing else can be done."""

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

from batchclf.errors import UsageError
from batchclf.images.archives.location import Location
from batchclf.images.archives.members import Limits, Ranges, too_large
from batchclf.images.archives.names import archive_kind
from batchclf.images.archives.passage import BEHIND_ALL, Chunk, cursor_at, required
from batchclf.images.archives.tar import Broken
from batchclf.results.records import Failure
from batchclf.system.alive import Place, alive

KIND = b"stream"
KEPT_BYTES = 2**26
CHUNK_BYTES = 2**16
"""Inflated at once: so much before a place where that ends the process cannot be had either."""


class Inflated:
    """A compressed file from its beginning on."""

    kind = KIND
    size: int | None = None

    def __init__(self, file: BinaryIO, path: bytes) -> None:
        """
        Raises:
            UsageError: this Python cannot inflate it.
        """
        self._file = _opened(file, path)
        self._broken: Broken | None = None
        self.position = 0

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end and before damage only.

        Raises:
            Broken: the file ends too soon, or is damaged.
            OSError: the disk fails.
        """
        parts: list[bytes] = []
        left = num_bytes
        while left and self._broken is None and (data := self._read_some(left)):
            parts.append(data)
            left -= len(data)
        if self._broken is not None and not parts:
            raise self._broken
        self.position += num_bytes - left
        return b"".join(parts)

    def _read_some(self, num_bytes: int) -> bytes:
        """What there is before the end, or before damage; then nothing."""
        try:
            # Unlike `read`, it loses nothing of what it inflated before it fails.
            return self._file.read1(num_bytes)
        except EOFError:
            self._broken = Broken(Failure("truncated", "its archive ends too soon"))
        except (zlib.error, lzma.LZMAError) as error:
            self._broken = _damaged(error)
        except OSError as error:
            if error.errno is not None:
                raise
            self._broken = _damaged(error)
        return b""

    def skip_to(self, position: int) -> None:
        """Go on from there; at most to the end.

        Raises:
            Broken, OSError: as `read`.
        """
        while (left := position - self.position) > 0 and self.read(min(left, CHUNK_BYTES)):
            alive()  # a large member is passed over


def _damaged(error: Exception) -> Broken:
    return Broken(Failure("corrupt", f"its archive is damaged: {error}"))


class _Inflating(Protocol):
    def read1(self, size: int, /) -> bytes: ...


def _opened(file: BinaryIO, path: bytes) -> _Inflating:
    kind = archive_kind(path)
    if kind == "gz":
        return gzip.GzipFile(fileobj=file)
    if kind == "bz2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return lzma.LZMAFile(file)
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return cast(_Inflating, importlib.import_module(module).ZstdFile(file))
        except ModuleNotFoundError:
            continue
    name = path.decode(errors="backslashreplace")
    raise UsageError(
        f"input: {name}: needs Python 3.14, or `pip install backports.zstd`, to be read; "
        "or make it a plain .tar: zstd -d"
    )


@dataclass(frozen=True, slots=True)
class _Bytes:
    """The bytes of a compressed file."""

    files: Ranges
    path: bytes
    kept_bytes = KEPT_BYTES

    def span_of(self, unit: int) -> Place:
        """There is only the beginning."""
        return Place(0, BEHIND_ALL)

    def size_of(self, unit: int) -> int:
        """As `Passage`: a byte."""
        return 1

    def begin(self, start: int) -> Iterator[Chunk[bytes]]:
        """As `Passage`."""
        with required(self.files.open(self.path)) as file:
            inflated = Inflated(file, self.path)
            try:
                while data := inflated.read(CHUNK_BYTES):
                    yield Chunk(len(data), data, len(data))
            except Broken as broken:
                yield Chunk(BEHIND_ALL, broken.failure, 0)


def span_of(location: Location) -> tuple[int, int]:
    """The bytes of a member: the first, and the one behind the last."""
    start, length = location.numbers
    return start, start + length


def read(files: Ranges, location: Location, limits: Limits) -> bytes | Failure:
    """The bytes of a member, or why they cannot be read.

    Raises:
        OSError, Refused: the disk fails, or the archive cannot be opened.
    """
    start, length = location.numbers
    if refused := too_large(length, limits.max_bytes):
        return refused
    path = location.archive
    cursor = cursor_at((files, path, location.version), lambda: _Bytes(files, path))
    limits.claim(2 * length)  # in chunks, and joined
    return _joined(cursor.read(start, start + length), start, length)


def _joined(chunks: list[tuple[int, Chunk[bytes]]], start: int, length: int) -> bytes | Failure:
    parts: list[bytes] = []
    num_bytes = 0
    for at, chunk in chunks:
        if isinstance(chunk.payload, Failure):
            return _cut(chunk.payload, at - start, length)
        parts.append(chunk.payload[max(0, start - at) : start + length - at])
        num_bytes += len(parts[-1])
    if num_bytes < length:
        return _cut(Failure("truncated", "its archive ends too soon"), num_bytes, length)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _cut(failure: Failure, num_bytes: int, length: int) -> Failure:
    if failure.code != "truncated":
        return failure
    return Failure(failure.code, f"{failure.message}: {max(0, num_bytes):,} of {length:,} bytes")
