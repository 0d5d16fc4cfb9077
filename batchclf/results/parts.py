"""Ranges of a listing, made by several processes at once, as files: `parts/00000042.jsonl`.

A part holds the records of images from its number on. It is written in a folder of drafts, under a
name of its attempt's own, and then committed: it gets its final name, unless another attempt was
first, and is never changed again. Each start of a job has a new folder of drafts, and takes away
the earlier ones: who is left over from an earlier start has nothing more to commit.
"""

import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from batchclf.errors import EnvironmentFailed
from batchclf.results.files import (
    RunFiles,
    output_failed,
    place_first,
    reading,
    remove,
    sync_folder,
)
from batchclf.results.lines import Done, find_done
from batchclf.results.listing import BEGINNING, Listing


class Committed(NamedTuple):
    """A part that is there to stay."""

    first: int
    """The number of its first image."""
    num_bytes: int
    num_ok: int
    errors_by_code: Counter[str]

    @property
    def num_images(self) -> int:
        return self.num_ok + self.errors_by_code.total()

    @property
    def stop(self) -> int:
        """The number of the image behind its last."""
        return self.first + self.num_images


@dataclass(frozen=True, slots=True)
class Folders:
    """Where parts are written, and where they are committed; all processes reach both."""

    parts: Path
    drafts: Path

    def path(self, first: int) -> Path:
        """The part that begins with an image."""
        return self.parts / f"{first:08d}.jsonl"

    def new_draft(self, first: int) -> Path:
        """Where an attempt at a part is written: a name that no other attempt has."""
        return self.drafts / f"{first:08d}.{secrets.token_hex(8)}.jsonl"

    def of_retry(self) -> "Folders":
        """Where records of failed images that are tried again go: of this start of the job only."""
        return Folders(self.drafts / "retried", self.drafts)

    def make(self) -> None:
        """Make the folder of drafts.

        Raises:
            EnvironmentFailed: it cannot be made.
        """
        self._make(self.drafts)

    def make_parts(self) -> None:
        """Make the folder of parts, unless it is there.

        Raises:
            EnvironmentFailed: it cannot be made.
        """
        self._make(self.parts)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
        except OSError as error:
            raise output_failed(folder, error) from error

    def commit(self, draft: Path, first: int) -> bool:
        """Give a draft, which is synced, its final name; False: another attempt was first.

        Raises:
            EnvironmentFailed: the file system does not take it, or the draft was taken away.
        """
        path = self.path(first)
        is_ours = False
        try:
            place_first(draft, path)
            is_ours = True
        except FileExistsError:
            # A server that was asked twice says so, too (NFS, when its first answer was lost).
            with suppress(FileNotFoundError):
                is_ours = os.path.samefile(draft, path)
        except OSError as error:
            raise output_failed(path, error) from error
        try:
            sync_folder(self.parts)
        except OSError as error:
            raise output_failed(path, error) from error
        remove(draft)
        return is_ours


def find_parts(files: RunFiles, listing: Listing, position: int) -> Iterator[Committed]:
    """The parts from image `position` of the listing on, in their order; none of them overlap.

    One that is damaged is removed: its images have no record then.

    Raises:
        EnvironmentFailed: one cannot be read, or not be removed.
    """
    _, last = files.shard.bounds(listing.num_images)
    near = BEGINNING
    for number in _numbers(files.parts):
        if not position <= number < last:
            continue
        near = listing.mark(number, near)
        path = Folders(files.parts, files.parts).path(number)
        part = _committed(path, number, find_done(path, listing.paths(number, last, near)))
        if part is None:
            remove(path)
            continue
        yield part
        position = part.stop


def read_part(folders: Folders, first: int, paths: Iterator[bytes]) -> Committed:
    """A part that another attempt has committed, of the images with these paths.

    Raises:
        EnvironmentFailed: it cannot be read, or holds other images.
    """
    path = folders.path(first)
    found = _committed(path, first, find_done(path, paths))
    if found is None:
        raise EnvironmentFailed(
            f"output: {path}: holds other records than those of its images; remove it and run the "
            "same command to resume"
        )
    return found


def _numbers(folder: Path) -> list[int]:
    with reading(folder), suppress(FileNotFoundError):
        found = (re.fullmatch(r"(\d{8,})\.jsonl", one.name) for one in folder.iterdir())
        return sorted(int(one[1]) for one in found if one)
    return []


def _committed(path: Path, first: int, done: Done) -> Committed | None:
    """None: not all that is there is whole records, or there are none."""
    with reading(path):
        size = path.stat().st_size
    if done.num_bytes != size or not done.num_images:
        return None
    return Committed(first, done.num_bytes, done.num_ok, done.errors_by_code)
