"""A library with code for GPUs, as CUDA's compiler and the linker lay it out."""

import struct
from collections.abc import Sequence

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = 64
"""Bytes of an ELF header, of one of a section, and of one of a piece of code."""


def fat_library(*containers: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Pieces of code in containers: kind, 10 times the compute capability, and the code of each."""
    code = b"".join(map(_container, containers))
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    contents = {b".text": MAGIC + b"by chance" * 9, b".nv_fatbin": code, b".shstrtab": names}
    body, headers = b"", bytes(HEADER)
    for name, content in contents.items():
        at = HEADER + len(body)
        section = struct.pack("<I20xQQ", names.index(name), at, len(content))
        headers += section.ljust(HEADER, b"\0")
        body += content
    elf = b"\x7fELF".ljust(0x28, b"\0") + struct.pack("<Q", HEADER + len(body))
    numbers = struct.pack("<HHH", HEADER, 1 + len(contents), len(contents))
    return (elf.ljust(0x3A, b"\0") + numbers).ljust(HEADER, b"\0") + body + headers


def _container(pieces: Sequence[tuple[int, int, bytes]]) -> bytes:
    body = b"".join(_piece(*one) for one in pieces)
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def _piece(kind: int, architecture: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ12xI", kind, 0, HEADER, len(code), architecture)
    return header.ljust(HEADER, b"h") + code
