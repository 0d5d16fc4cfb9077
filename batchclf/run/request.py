"""What travels together through a run, and what the run gives back."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from batchclf.results.bucket import Bucket
from batchclf.results.files import RunFiles
from batchclf.results.lines import read_records
from batchclf.results.mirror import working_folder
from batchclf.results.records import Record, Shard
from batchclf.results.stats import Summary
from batchclf.run.recovery import Recovery
from batchclf.run.reporter import Reporter
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest

if TYPE_CHECKING:
    from batchclf.run.crew import Hire


def files_of(job: JobSpec, shard: Shard) -> RunFiles:
    """The files of a job's output, on this machine."""
    if isinstance(job.output, str):
        return RunFiles(working_folder(job.output, shard), shard, job.output)
    return RunFiles(job.output, shard)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job in this process."""

    job: JobSpec
    options: RunOptions
    reporter: Reporter
    stop: StopRequest
    recovery: Recovery = field(default_factory=Recovery)
    hire: "Hire | None" = None
    """What finds those who are to classify; None: this process does."""

    @property
    def files(self) -> RunFiles:
        return files_of(self.job, self.options.shard)


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished job: its files and its summary."""

    files: RunFiles
    first: int
    """Of a shard: the number of its first image in the whole listing."""
    summary: Summary
    was_complete: bool
    """Whether an earlier run had already finished it."""

    def records(self) -> Iterator[Record]:
        """The record of each image, in the order of the listing, read as they are asked for.

        Those in a bucket are fetched first, into a temporary folder.

        Raises:
            EnvironmentFailed: they cannot be read, or are not what was written.
        """
        with ExitStack() as stack:
            files, address = self.files, self.files.address
            if address is not None:
                folder = stack.enter_context(TemporaryDirectory(prefix="batchclf-"))
                files = replace(files, folder=Path(folder))
                Bucket(address, "output").fetch(files.predictions.name, files.predictions)
            yield from read_records(files, self.first, self.summary.num_images)
