"""Outputs of jobs as they might be, written without running one."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from batchclf.models.bundle import digest_of
from batchclf.results.files import RunFiles
from batchclf.results.identity import Identity
from batchclf.results.lines import encode_record
from batchclf.results.listing import drafted, place
from batchclf.results.records import Entry, Failure, ImageRef, Prediction, Record, Shard
from batchclf.results.run_record import read_run, write_run

Outcome = tuple[Prediction, ...] | Failure


@dataclass(frozen=True, slots=True)
class _Entries:
    """What is to be listed."""

    entries: Iterable[Entry]
    num_left_out: int = 0
    located: bool = False

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        raise NotImplementedError


def predicted(labels: Sequence[str], *ranked: int, score: float = 0.9) -> Outcome:
    """The first classes of an image, the first with this score, the others with hardly any."""
    scores = [score, *(0.001 for _ in ranked[1:])]
    return tuple(
        Prediction(labels[index], index, one) for index, one in zip(ranked, scores, strict=True)
    )


def write_output(
    template: Path,
    folder: Path,
    labels: Sequence[str],
    outcomes: Mapping[str, Outcome],
    *,
    top_k: int = 5,
    num_done: int | None = None,
    **job: Any,
) -> Path:
    """The output of a job with these records; its other facts are those of the job `template`.

    `num_done`: it stopped after so many images. `job`: keys of its job.
    """
    record = read_run(RunFiles(template))
    assert record is not None
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("".join(f"{one}\n" for one in labels))
    model = {**record.job["model"], "labels": str(folder / "labels.txt")}
    record = replace(
        record,
        job={**record.job, "model": model, "output": str(folder), **job},
        status="complete" if num_done is None else "interrupted",
        num_images=len(outcomes),
        fingerprint=replace(
            record.fingerprint, labels=digest_of(tuple(labels)), top_k=top_k, model="unknown"
        ),
    )
    files = RunFiles(folder)
    entries = [Entry(one.encode()) for one in outcomes]
    same = {one.name: getattr(record.fingerprint, one.name) for one in fields(Identity)}
    with drafted(files, Identity(**same), _Entries(entries)) as draft:
        listing = place(files, draft)
    fingerprint = replace(record.fingerprint, listing=listing.extent, num_images=len(outcomes))
    write_run(files, replace(record, fingerprint=fingerprint))
    with files.predictions.open("wb") as file:
        for index, (entry, outcome) in enumerate(zip(entries, outcomes.values(), strict=True)):
            if num_done is None or index < num_done:
                file.write(encode_record(Record(ImageRef(index, entry.path), outcome)))
    return folder


def divide(whole: Path, folder: Path, count: int, *, without: Sequence[int] = ()) -> Path:
    """The same output as shards, some of which have not begun."""
    folder.mkdir()
    (folder / "listing.nul").write_bytes((whole / "listing.nul").read_bytes())
    lines = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    run = json.loads((whole / "run.json").read_text())
    for index in range(count):
        files, (first, last) = RunFiles(folder, Shard(index, count)), (0, 0)
        first, last = files.shard.bounds(len(lines))
        if index not in without:
            files.predictions.write_bytes(b"".join(lines[first:last]))
            files.run.write_text(json.dumps(run | {"num_images": last - first}))
    return folder
