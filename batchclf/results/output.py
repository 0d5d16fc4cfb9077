"""What a job has written so far, whole or in shards, read as one; also while it runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchclf.errors import EnvironmentFailed, ResumeRefused, UsageError
from batchclf.results.files import RunFiles, read_lines, reading
from batchclf.results.lines import is_of, parse_record
from batchclf.results.listing import Listing, open_listing
from batchclf.results.records import Entry, Shard
from batchclf.results.run_record import RunRecord, read_run
from batchclf.system.paths import nearest
from batchclf.system.text import escaped

Line = dict[str, Any]
"""The JSON object of one record."""


@dataclass(frozen=True, slots=True)
class Part:
    """The records of one shard, or of a job without shards."""

    files: RunFiles
    record: RunRecord
    first: int
    """Its first image, by number in the listing."""
    last: int
    """The one behind its last."""


@dataclass(frozen=True, slots=True)
class Output:
    """A job's records, in the order of its listing."""

    folder: Path
    listing: Listing
    parts: tuple[Part, ...]

    @property
    def record(self) -> RunRecord:
        """What the job is; all shards agree on that."""
        return self.parts[0].record

    def entries(self) -> Iterator[Entry]:
        """The images of the shards that have begun, whether they have a record yet or not."""
        for part in self.parts:
            yield from self.listing.entries(part.first, part.last)

    def lines(self) -> Iterator[tuple[Entry, Line]]:
        """Each image that has a record, and that record, read as they are asked for.

        Raises:
            EnvironmentFailed: the records cannot be read, or are not those of the images.
        """
        for part in self.parts:
            yield from self._lines_of(part)

    def _lines_of(self, part: Part) -> Iterator[tuple[Entry, Line]]:
        number, path = 0, part.files.predictions
        entries = self.listing.entries(part.first, part.last)
        for line, entry in zip(read_lines(path), entries, strict=False):
            found = parse_record(line)
            if found is None and not line.endswith(b"\n"):
                break  # it is being written
            number += 1
            if found is None or not is_of(found, entry.path):
                name = escaped(entry.path.decode(errors="backslashreplace"))
                raise EnvironmentFailed(
                    f"output: {path}:{number}: is not the record of {name}, which the listing has "
                    "there; run the job again to have the records written anew"
                )
            yield entry, found
        if part.record.status == "complete" and number != part.last - part.first:
            raise EnvironmentFailed(
                f"output: {path}: {number:,} records are there, not {part.last - part.first:,}; "
                "run the job again to have them written anew"
            )


def open_output(folder: Path) -> Output:
    """What a job has written to a folder.

    Raises:
        UsageError: no job has begun there.
        ResumeRefused: what is there was written by another version, is damaged, or of several
            divisions into shards.
        EnvironmentFailed: it cannot be read.
    """
    listing = open_listing(RunFiles(folder))
    parts = []
    all_parts = files_of_parts(folder)
    if len({files.shard.count for files in all_parts}) > 1:
        raise ResumeRefused(
            f"output: {folder} holds shards of several divisions; move those of one away"
        )
    for files in all_parts:
        record = read_run(files)
        if record is not None and listing is not None:
            parts.append(Part(files, record, *files.shard.bounds(listing.num_images)))
    if not all_parts:
        raise UsageError(f"output: {folder}: no job has begun there: it holds no run.json")
    if listing is None:
        raise UsageError(
            f"output: {RunFiles(folder).listing} is not there; copy the whole folder that the job "
            "wrote to"
        )
    return Output(folder, listing, tuple(parts))


def files_of_parts(folder: Path) -> list[RunFiles]:
    """Of the whole job where it has begun, or is merged; else of its shards, begun or not.

    Raises:
        UsageError: there is no such folder.
        EnvironmentFailed: it cannot be looked at.
    """
    files = RunFiles(folder)
    with reading(folder):
        if not folder.is_dir():
            raise UsageError(
                f"output: {folder} is no folder; give the folder a job writes to{nearest(folder)}"
            )
        found = [files] if files.run.exists() else []
        others = [] if found else list(files.of_others())
    for count in sorted({other.shard.count for other in others}):
        found += [RunFiles(folder, Shard(index, count)) for index in range(count)]
    return found
