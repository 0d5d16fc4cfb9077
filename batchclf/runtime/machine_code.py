"""Which GPUs a library has code for: read from the library, as `cuobjdump --list-elf` lists it.

CUDA's compiler puts the code into a section of the ELF file, as containers one after the other:
a header (magic, version, own size, size of what follows) and entries, each with a header of its
own (kind, own size, size of the code, and at byte 28 the architecture: 90 for compute capability
9.0).
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SECTION = b".nv_fatbin"
_MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2
"""Kinds of code."""
Data = mmap.mmap | bytearray


@dataclass(frozen=True, slots=True)
class Code:
    """Architectures, as 10 times their compute capability, that a library has code for."""

    machine: frozenset[int]
    ptx: frozenset[int]
    """As text that the driver compiles for any GPU from this one on."""

    def runs_on(self, architecture: int) -> bool:
        """Machine code is for its own major version, from its minor version on."""
        same = (one for one in self.machine if one // 10 == architecture // 10)
        return any(one <= architecture for one in (*same, *self.ptx))


class Piece(NamedTuple):
    """Code for one architecture."""

    kind: int
    """PTX or MACHINE_CODE, or another."""
    architecture: int
    start: int
    """Where in the library it lies."""
    stop: int


def code_in(library: Path) -> Code | None:
    """What a library has code for; None: it has none, or keeps it otherwise."""
    found: dict[int, set[int]] = {PTX: set(), MACHINE_CODE: set()}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for piece in pieces(data):
                found.setdefault(piece.kind, set()).add(piece.architecture)
        except struct.error:  # it ends before it should
            return None
    code = Code(frozenset(found[MACHINE_CODE]), frozenset(found[PTX]))
    return code if code.machine or code.ptx else None


def pieces(data: Data) -> Iterator[Piece]:
    """All code in a library.

    Raises:
        struct.error: it ends before it should.
    """
    at, end = _section(data)
    while (at := data.find(_MAGIC, at, end)) >= 0:
        own_size, size = struct.unpack_from("<HQ", data, at + 6)
        at += own_size
        last = at + size
        while at < last:
            kind, own_size, size, architecture = struct.unpack_from("<H2xIQ12xI", data, at)
            yield Piece(kind, architecture, at + own_size, at + own_size + size)
            at += max(1, own_size + size)


def _section(data: Data) -> tuple[int, int]:
    """Where the code begins and ends (ELF-64: https://refspecs.linuxfoundation.org/elf)."""
    if data[:4] != b"\x7fELF":
        return 0, 0
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names_at = struct.unpack_from("<HHH", data, 0x3A)
    # Of each section: where its name is, where it begins, how long it is.
    sections = [struct.unpack_from("<I20xQQ", data, table + at * size) for at in range(number)]
    if names_at >= number:
        return 0, 0
    names = sections[names_at][1]
    for name, begin, length in sections:
        at = names + name
        if data[at : at + len(_SECTION) + 1] == _SECTION + b"\0":
            return begin, begin + length
    return 0, 0
