"""A job's records in another form, read and written as streams."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from batchclf.commands.convert.csv import write_csv
from batchclf.commands.convert.folders import Choice, Placed, write_folders
from batchclf.commands.convert.parquet import require_pyarrow, write_parquet
from batchclf.commands.convert.target import replaced, require_target
from batchclf.errors import UsageError
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.results.output import Output, open_output
from batchclf.results.records import ImageRef
from batchclf.spec.job import recorded_job

Form = Literal["csv", "parquet", "folders"]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    to: Form
    path: str
    num_images: int
    """Of the job."""
    num_records: int
    """By now; each was converted."""
    num_errors: int
    folders: Mapping[str, int] = field(default_factory=dict)
    """Images in each folder."""
    num_written_out: int = 0
    """Images copied into folders since they lie in archives or on other machines."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Images that could not be had for a folder, by why."""


def convert_output(
    output: Path,
    to: Form,
    target: Path,
    *,
    overwrite: bool = False,
    choice: Choice | None = None,
) -> Converted:
    """Write a job's records, as far as there are some, to `target`: whole or not at all.

    `choice`: for folders.

    Raises:
        UsageError: no job is there, or something that is not to be replaced is at `target`.
        EnvironmentFailed: a file cannot be read or written.
    """
    found = open_output(output)
    target = Path(os.path.realpath(target))
    choice = choice or Choice()
    if choice.min_score is not None and math.isnan(choice.min_score):
        raise UsageError("--min-score: found nan; give a number")
    if to == "parquet":
        require_pyarrow()
    require_target(target, found, is_folder=to == "folders", overwrite=overwrite)
    counted = _Counted(found)
    with replaced(target) as draft:
        placed = _write(draft, to, counted, choice)
    return Converted(
        to=to,
        path=str(target),
        num_images=found.listing.num_images,
        num_records=counted.statuses.total(),
        num_errors=counted.statuses["error"],
        folders=dict(placed.num_of.most_common()),
        num_written_out=placed.num_written_out,
        left_out=dict(placed.left_out.most_common()),
    )


@dataclass(slots=True)
class _Counted:
    """Records, counted as they are read."""

    output: Output
    statuses: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[tuple[ImageRef, dict[str, Any]]]:
        for number, (entry, line) in enumerate(self.output.lines()):
            self.statuses[line["status"]] += 1
            yield ImageRef(number, *entry), line

    def lines(self) -> Iterator[dict[str, Any]]:
        """The records alone."""
        return (line for _, line in self)


def _write(draft: Path, to: Form, counted: _Counted, choice: Choice) -> Placed:
    record = counted.output.record
    if to == "csv":
        write_csv(draft, counted.lines(), record.fingerprint.top_k)
    elif to == "parquet":
        write_parquet(draft, counted.lines())
    else:
        store = open_store(source_of(recorded_job(record.job)))
        return write_folders(draft, iter(counted), store, choice)
    return Placed()
