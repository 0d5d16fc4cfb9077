"""What the tests of archives share: archives as they are written, and what is found in them."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from batchclf.images.archives.members import Rows
from batchclf.images.entries import truth_of
from batchclf.images.source import open_source
from batchclf.images.store import open_store
from batchclf.results.records import Failure, refs_of

MAX_BYTES = 2**20
Content = bytes | str
"""The bytes of an image, or the code of its failure."""


@dataclass
class Looked:
    """What an input holds, as a job sees it."""

    images: list[tuple[bytes, Content]] = field(default_factory=list)
    """Their paths, below the archive where the input is one, and what was read."""
    messages: dict[bytes, str] = field(default_factory=dict)
    """Of the failures."""
    truths: dict[bytes, bytes] = field(default_factory=dict)
    num_left_out: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[bytes]:
        return [path for path, _ in self.images]


def look(path: Path, rows: Rows | None = None, *, max_bytes: int = MAX_BYTES) -> Looked:
    """List an input, and read all of its images."""
    source = open_source(path)
    store = open_store(replace(source, rows=rows) if rows else source)
    looked = Looked()
    entries = store.entries(looked.log.append)
    prefix = path.name.encode() + b"/"
    for ref in refs_of(entries):
        name = ref.path.removeprefix(prefix)
        found = store.read(ref, max_bytes)
        if isinstance(found, Failure):
            looked.messages[name] = found.message
        looked.images.append((name, found.code if isinstance(found, Failure) else found))
        truth = truth_of(ref.location)
        if truth is not None:
            looked.truths[name] = truth
    looked.num_left_out = entries.num_left_out
    return looked


def photo(number: int, num_bytes: int = 700) -> bytes:
    """What begins like a JPEG, and is unlike any other."""
    return b"\xff\xd8\xff" + b"%d," % number * (num_bytes // (len(str(number)) + 1))


PHOTOS: Mapping[bytes, bytes] = {b"%s/%d.jpg" % (b"ab"[n % 2 :][:1], n): photo(n) for n in range(6)}


def as_tar(
    files: Mapping[bytes, bytes], mode: str = "w", format_: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar archive of some files."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode=mode, format=format_, encoding="utf-8", errors="surrogateescape"
    ) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))
    return buffer.getvalue()


def tar_member(name: bytes, size: int = 0, type_: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """A header."""
    member = tarfile.TarInfo(name.decode(errors="surrogateescape"))
    member.size, member.type = size, type_
    return member


def as_zip(files: Mapping[bytes, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of some files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name.decode(), content)
    return buffer.getvalue()


def written(path: Path, content: bytes) -> Path:
    """A file with this content."""
    path.write_bytes(content)
    return path
