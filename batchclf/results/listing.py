"""The frozen listing: written once per job, shared by its shards, read as it is asked for."""

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from batchclf.results.files import (
    RunFiles,
    move_into_place,
    open_temporary,
    output_failed,
    reading,
    remove,
    temporary_of,
)
from batchclf.results.lock import held, others_at_work
from batchclf.results.records import ImageRef

READ_BYTES = 1 << 16
"""Of the listing at once; its paths as objects take several times as much."""
WRITE_PATHS = 4096


def freeze_listing(files: RunFiles, paths: Iterable[bytes]) -> None:
    """Write the listing once; whoever comes second keeps the first one's.

    Raises:
        EnvironmentFailed: disk full, I/O error; there is no listing then.
    """
    with held(files.listing_lock):  # another shard may be listing: its listing is the job's
        if not files.listing.exists():
            _write(files, paths, keep=False)


def extend_listing(files: RunFiles, paths: Iterable[bytes]) -> int:
    """Add those `paths` to the listing that it does not hold; returns how many they were.

    Raises:
        EnvironmentFailed: disk full, I/O error; the listing then stays as it is.
    """
    num_before = count_listing(files)
    with held(files.listing_lock):
        _write(files, new_paths(files, paths), keep=True)
    return count_listing(files) - num_before


def new_paths(files: RunFiles, paths: Iterable[bytes]) -> Iterator[bytes]:
    """Those `paths` that the frozen listing does not hold.

    Compares hashes of 64 bits, in 8 bytes per listed path: two of a million paths share one in 1 of
    10^7 listings, and one of them would then be taken for listed.
    """
    known = np.fromiter(map(hash, read_paths(files)), np.int64)
    known.sort()
    iterator = iter(paths)
    while chunk := list(itertools.islice(iterator, WRITE_PATHS)):
        hashes = np.fromiter(map(hash, chunk), np.int64, len(chunk))
        places = np.searchsorted(known, hashes)
        is_known = known[np.minimum(places, len(known) - 1)] == hashes if len(known) else places > 0
        for path, listed in zip(chunk, is_known, strict=True):
            if not listed:
                yield path


def _write(files: RunFiles, paths: Iterable[bytes], *, keep: bool) -> None:
    try:
        with open_temporary(files.listing) as file:
            if keep:
                with files.listing.open("rb") as before:
                    shutil.copyfileobj(before, file)
            iterator = iter(paths)
            while chunk := list(itertools.islice(iterator, WRITE_PATHS)):
                file.write(b"\0".join(chunk) + b"\0")
            file.flush()
            os.fsync(file.fileno())
        move_into_place(files.listing)
    except BaseException as error:
        with suppress(OSError):
            temporary_of(files.listing).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise output_failed(files.listing, error) from error
        raise


def discard_abandoned_listing(files: RunFiles) -> None:
    """Remove the listing of a run that ended before it began; nothing was done by it."""
    if not any(files.folder.glob("run*.json")) and not others_at_work(files):
        remove(files.listing)


def serves_others(files: RunFiles) -> bool:
    """Whether other shards use the listing, so that it stays when this one starts anew."""
    has_others = any(path != files.run for path in files.folder.glob("run*.json"))
    return files.listing.exists() and (has_others or others_at_work(files))


def read_listing(files: RunFiles, start: int = 0, stop: int | None = None) -> Iterator[ImageRef]:
    """The entries `start` to `stop` of the frozen listing, read as they are asked for.

    Raises:
        EnvironmentFailed: the listing cannot be read.
    """
    return itertools.starmap(ImageRef, enumerate(read_paths(files, start, stop), start))


def read_paths(files: RunFiles, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The paths alone of the entries `start` to `stop`.

    Raises:
        EnvironmentFailed: the listing cannot be read.
    """
    paths = _nul_paths(files.listing, start)
    return itertools.islice(paths, None if stop is None else max(0, stop - start))


def count_listing(files: RunFiles) -> int:
    """Number of entries in the frozen listing.

    Raises:
        EnvironmentFailed: the listing cannot be read.
    """
    return sum(chunk.count(b"\0") for chunk in _chunks(files.listing))


def _nul_paths(listing: Path, start: int) -> Iterator[bytes]:
    rest = b""
    num_left = start
    for chunk in _chunks(listing):
        *paths, rest = (rest + chunk).split(b"\0")
        yield from paths[num_left:]
        num_left = max(0, num_left - len(paths))


def _chunks(listing: Path) -> Iterator[bytes]:
    with reading(listing), listing.open("rb") as file:
        yield from iter(partial(file.read, READ_BYTES), b"")
