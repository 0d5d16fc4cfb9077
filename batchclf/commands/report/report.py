"""`report`: a job's records as one HTML page, also while the job runs."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from batchclf.commands.convert.target import replaced, require_target
from batchclf.commands.report.digest import Digest
from batchclf.commands.report.gallery import choose, pictures_of
from batchclf.commands.report.pace import pace_of
from batchclf.commands.report.page import Page, page_html
from batchclf.commands.status import status_of
from batchclf.results.output import Line, Output, open_output
from batchclf.results.records import Entry
from batchclf.scoring.score import Score, Scoring


@dataclass(frozen=True, slots=True)
class Reported:
    """What was written."""

    path: str
    num_bytes: int
    num_images: int
    """Of the job."""
    num_records: int
    """By now."""
    num_errors: int
    num_pictures: int
    why_missing: str | None
    """Of pictures."""


def report_output(
    output: Path,
    target: Path,
    *,
    truth: str | None = None,
    allow_unmatched: bool = False,
    overwrite: bool = False,
) -> Reported:
    """Write a page about a job's records, as far as there are some: whole or not at all.

    `truth`, `allow_unmatched`: as of `score_output`; None: nothing is said of what is right.

    Raises:
        UsageError: no job is there, something that is not to be replaced is at `target`, or as
            `score_output`.
        EnvironmentFailed: a file cannot be read or written.
    """
    found = open_output(output)
    target = Path(os.path.realpath(target))
    require_target(target, found, is_folder=False, overwrite=overwrite)
    status = status_of(output)
    digest, score, labels = _read(found, truth, allow_unmatched)
    cards = choose(digest)
    pictures = pictures_of(found, cards)
    page = Page(
        record=found.record,
        status=status,
        digest=digest,
        cards=cards,
        pictures=pictures,
        paces=[pace for part in found.parts if (pace := pace_of(part.files)).steps],
        score=score,
        labels=labels,
    )
    with replaced(target) as draft:
        draft.write_bytes(data := page_html(page))
    return Reported(
        path=str(target),
        num_bytes=len(data),
        num_images=found.listing.num_images,
        num_records=digest.num_images,
        num_errors=digest.num_errors,
        num_pictures=len(pictures.jpegs),
        why_missing=pictures.why_missing,
    )


def _read(
    output: Output, truth: str | None, allow_unmatched: bool
) -> tuple[Digest, Score | None, Mapping[int, str]]:
    """All records, read once; how right they are; and what the classes are called."""
    digest = Digest()
    if truth is None:
        digest.add_all(_without_truth(output))
        return digest, None, {}
    scoring = Scoring(output, truth)
    digest.add_all(scoring.lines())
    return digest, scoring.score(allow_unmatched=allow_unmatched), scoring.labels


def _without_truth(output: Output) -> Iterator[tuple[Entry, Line, int | None]]:
    return ((entry, line, None) for entry, line in output.lines())
