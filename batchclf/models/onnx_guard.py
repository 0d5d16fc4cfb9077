"""What an ONNX file could reach for is looked at before ONNX Runtime or onnx open it.

Both resolve file names that a model carries, and ran after them out of its folder more than once
(CVE-2024-27318, CVE-2026-27489). So the file's protocol buffers are walked here, without either:
every tensor wherever it stands, every operator, every file named. Weights are skipped, not read.

The wire format: https://protobuf.dev/programming-guides/encoding. The numbers of the fields: ONNX's
onnx.proto.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from batchclf.errors import ModelError
from batchclf.models.own_files import WeightsFile, says, shortened, weights_file
from batchclf.system.paths import GIT_LFS_POINTER, unread

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""Domains whose operators are ONNX Runtime's own; those of others come in libraries."""
LOADS_FILES = ("EPContext",)
"""Operators of those domains that make a provider load a compiled file."""
MAX_MODEL_BYTES = 2**31 - 1
"""Where protocol buffers end."""
MAX_FIELDS = 3_000_000
"""A graph of 10,000 nodes has a tenth of them; reading more takes seconds, and then minutes."""
MAX_NODES = 100_000
MAX_NESTING = 100
"""Messages in one another, as protocol buffers have it themselves: about 30 graphs."""
_MAX_NAME_BYTES = 4096

_ORT_FORMAT = b"ORTM"
"""At offset 4 of ONNX Runtime's other format, which it takes a file for whatever its name is."""
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "tensor": {13: "entry"},
    "sparse": {1: "tensor", 2: "tensor"},
    "value": {},
    "entry": {},
}
"""Of each message (ONNX's GraphProto is "graph"), the fields that hold others of them."""
_TEXTS = {
    "node": {1: "input", 2: "output", 3: "name", 4: "operator", 7: "domain"},
    "attribute": {1: "name"},
    "function": {1: "operator", 10: "domain"},
    "tensor": {8: "name"},
    "value": {1: "name"},
    "entry": {1: "key", 2: "value"},
}
"""Texts that are used, or have to be texts: onnx hands out bytes where they are not UTF-8."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


class _Malformed(Exception):
    """Not the wire format, or beyond a limit; the message says which."""


@dataclass(slots=True)
class _Walk:
    """One pass through a file, from its beginning to its end."""

    file: BinaryIO
    at: int = 0
    num_fields: int = 0
    num_nodes: int = 0
    operators: set[tuple[str, str]] = field(default_factory=set)
    """(domain, operator) of every node."""
    functions: set[tuple[str, str]] = field(default_factory=set)
    """The same of every function that the file defines."""
    external: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    """What tensors say of the file that holds their weights: sorted (key, value)."""

    def message(self, kind: str, end: int, depth: int = 0) -> dict[str, str]:
        """Walk one message up to `end`; returns its texts."""
        if depth > MAX_NESTING:
            raise _Malformed(f"messages nested deeper than {MAX_NESTING}")
        texts: dict[str, str] = {}
        entries: dict[str, str] = {}
        for number, stop in self._fields(end):
            if (inner := _MESSAGES[kind].get(number)) is not None:
                found = self.message(inner, stop, depth + 1)
                if inner == "entry":
                    entries[found.get("key", "")] = found.get("value", "")
            elif name := _TEXTS.get(kind, {}).get(number):
                texts[name] = self._text(stop)
        if entries:
            self.external.add(tuple(sorted(entries.items())))
        if kind in ("node", "function"):
            self._note(kind, (texts.get("domain", ""), texts.get("operator", "")))
        return texts

    def _note(self, kind: str, operator: tuple[str, str]) -> None:
        if kind == "function":
            self.functions.add(operator)
            return
        self.operators.add(operator)
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _Malformed(f"more than {MAX_NODES:,} nodes")

    def _fields(self, end: int) -> Iterator[tuple[int, int]]:
        """Number and end of each field up to `end` that holds bytes; what is left of it is skipped.

        As strict as the parsers that come later, or stricter: what one skips, another might read.
        """
        while self.at < end:
            self.num_fields += 1
            if self.num_fields > MAX_FIELDS:
                raise _Malformed(f"more than {MAX_FIELDS:,} parts")
            tag = self._varint(end)
            number, wire = tag >> 3, tag & 7
            if not 0 < number < 2**29:
                raise _Malformed(f"field number {number}")
            if wire == _VARINT:
                self._varint(end)
                continue
            if wire == _BYTES:
                length = self._varint(end)
            elif wire in (_FIXED_32, _FIXED_64):
                length = 4 if wire == _FIXED_32 else 8
            else:
                raise _Malformed(f"wire type {wire}")
            stop = self.at + length
            if stop > end:
                raise _Malformed("cut short")
            if wire == _BYTES:
                yield number, stop
            self.at = stop
            self.file.seek(stop)

    def _varint(self, end: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.file.read(1)
            self.at += 1
            if not byte or self.at > end:
                raise _Malformed("cut short")
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return value
        raise _Malformed("a number of more than 64 bits")

    def _text(self, end: int) -> str:
        if end - self.at > _MAX_NAME_BYTES:
            raise _Malformed(f"a name of {end - self.at:,} bytes")
        try:
            return self.file.read(end - self.at).decode()
        except UnicodeDecodeError:
            raise _Malformed("a name that is not UTF-8") from None


def check_onnx(path: Path, key: str = "", *, may_link: bool = False) -> list[WeightsFile]:
    """Refuse an ONNX file that reaches out of its folder or needs foreign code.

    Args:
        key: what names the file in the job, for messages: "model.onnx: ".
        may_link: whether the weights beside it may be links, symbolic or hard, to wherever whoever
            made the folder put them, as in the cache of the Hugging Face hub. What the model's own
            text names is in its folder, or below, all the same.

    Returns:
        The files beside it that hold its weights.

    Raises:
        ModelError: no ONNX model; an operator of another domain than `DOMAINS`; or weights that
            are not in a regular file in the model's own folder or below; without `may_link`, one
            of one name only.
    """
    what = f"{key}{path}"
    walk = _walk(path, what)
    for domain, operator in sorted(walk.operators):
        name = f"{shortened(domain) or 'ai.onnx'}:{shortened(operator)}"
        if operator in LOADS_FILES:
            raise ModelError(
                f"{what}: has an operator {name}, which loads a model compiled elsewhere from a "
                "file of its own; give the ONNX file that it was compiled from"
            )
        if domain not in DOMAINS and (domain, operator) not in walk.functions:
            raise ModelError(
                f"{what}: has a custom operator {name}, which ONNX Runtime only runs with a "
                "library of somebody's own; export the model with standard operators "
                f"(domains {', '.join(DOMAINS[1:])})"
            )
    files = {_weights_file(path, what, dict(entries), may_link) for entries in walk.external}
    return sorted(files, key=lambda file: file.location)


def _walk(path: Path, what: str) -> _Walk:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ModelError(f"{what}: cannot be read: not a regular file")
            if found.st_size > MAX_MODEL_BYTES:
                raise ModelError(
                    f"{what}: has {found.st_size:,} bytes, and an ONNX file ends at "
                    f"{MAX_MODEL_BYTES:,}; export it with its weights in a second file"
                )
            start = file.read(24)
            file.seek(0)
            walk = _Walk(file)
            if start.startswith(GIT_LFS_POINTER):
                raise ModelError(
                    f"{what}: is a Git LFS pointer, not the file itself; fetch it with `git lfs "
                    "pull`, or download it from the repository's web page"
                )
            if start[4:8] == _ORT_FORMAT:
                raise _Malformed("ONNX Runtime's own format")
            walk.message("model", found.st_size)
            return walk
    except OSError as error:
        raise ModelError(f"{what}: cannot be read: {unread(path, error)}") from None
    except _Malformed as error:
        raise ModelError(
            f"{what}: not an ONNX model: it starts with {start!r} ({error}); "
            "download or export it again"
        ) from None


def _weights_file(path: Path, what: str, entries: dict[str, str], may_link: bool) -> WeightsFile:
    """The file in which a tensor's weights are, once it is known to hold them.

    Raises:
        ModelError: see `check_onnx`.
    """
    name = entries.get("location", "")
    said = says(what, name)
    found = weights_file(path.parent, name, said, may_link=may_link)
    start, length = (_number(said, key, entries.get(key, "0")) for key in ("offset", "length"))
    if start + length > found.num_bytes:
        raise ModelError(
            f"{said}, from byte {start:,} to {start + length:,}, but it ends at "
            f"{found.num_bytes:,}; download or export it again"
        )
    return found


def _number(said: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{said} with {key} {shortened(text)!r}, which is no number of bytes")
    return int(text)
