"""Whether a job's output folder is a place for results, and nobody else's just now."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batchclf.errors import UsageError
from batchclf.images.addresses import would_hold
from batchclf.images.source import would_list
from batchclf.images.streams import is_stream
from batchclf.results.lock import Lease, only_writer
from batchclf.results.records import Shard
from batchclf.run.request import files_of
from batchclf.spec.input import places_of
from batchclf.spec.job import JobSpec
from batchclf.system.paths import kind_of

_IN_BUCKET = ("predictions.jsonl", "parts/00000000.jsonl")
"""Where the records of a job lie in a bucket, at its end and on the way there."""


def require_separate_output(job: JobSpec) -> None:
    """Refuse an output inside the input: the next run would list, and classify, it.

    A list inside the output is refused too: it may be a file that the run writes, or --overwrite
    deletes, such as the predictions.jsonl of an earlier job. A folder of images there is not.

    Raises:
        UsageError: also when the output is a file.
        EnvironmentFailed: one of them cannot be looked at.
    """
    if isinstance(job.output, str):
        _require_separate_addresses(job, job.output)
        return
    if kind_of(job.output, "output") not in ("folder", "nothing"):
        raise UsageError(f"output: {job.output} is a file; give a folder")
    # Path.resolve raises RuntimeError at a link that leads to itself.
    output = Path(os.path.realpath(job.output))
    for place in places_of(job.input):
        if not isinstance(place, Path) or is_stream(place):
            continue
        kind = kind_of(place, "input")
        source = Path(os.path.realpath(place))
        if would_list(source, output / "predictions.jsonl"):
            raise UsageError(
                f"output: {job.output} lies inside the input {place}; give a folder outside it"
            )
        if kind == "file" and source.is_relative_to(output):
            raise UsageError(
                f"output: {job.output} holds the input {place}, which a run could overwrite; "
                "give another folder"
            )


def _require_separate_addresses(job: JobSpec, output: str) -> None:
    records = [f"{output.rstrip('/')}/{name}" for name in _IN_BUCKET]
    for place in places_of(job.input):
        if isinstance(place, str) and any(would_hold(place, one) for one in records):
            raise UsageError(
                f"output: {output} lies inside the input {place}; give an address outside it"
            )


def local_output(job: JobSpec) -> Path:
    """A job's output folder, for what cannot write to a bucket.

    Raises:
        UsageError: it is an address.
    """
    if isinstance(job.output, str):
        raise UsageError(
            f"output: {job.output}: only `run` writes to a bucket; give a folder: -o FOLDER"
        )
    return job.output


@contextmanager
def hold_output(
    job: JobSpec, shard: Shard | None = None, renewed: Callable[[], None] = lambda: None
) -> Iterator[Lease]:
    """Hold a job's output for this process; `renewed` as in `only_writer`.

    Raises:
        UsageError: the output lies inside the input, or is a file.
        ResumeRefused: another process holds it.
        EnvironmentFailed: it cannot be created or written.
    """
    require_separate_output(job)
    with only_writer(files_of(job, shard or Shard()), renewed) as lease:
        yield lease
