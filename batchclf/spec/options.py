"""What is asked of one run, beyond what the job says."""

from dataclasses import dataclass, field

from batchclf.errors import UsageError
from batchclf.results.records import Shard


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one run is to do.

    Raises:
        UsageError: options that contradict each other.
    """

    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False
    extend: bool = False
    """Add the files that appeared since the listing was frozen."""
    retry_failed: bool = False
    codes: frozenset[str] | None = None
    """Retry only errors with these codes; None: all."""
    limit: int | None = None
    """Only so many images, the first of the listing."""

    def __post_init__(self) -> None:
        if self.overwrite and self.retry_failed:
            raise UsageError("--overwrite starts anew, --retry-failed keeps: give one of them")
        if self.codes is not None and not self.retry_failed:
            raise UsageError("--codes says which errors --retry-failed tries again: give both")
        if self.extend and (self.overwrite or self.retry_failed):
            raise UsageError(
                "--extend adds files to a job that goes on: give it without --overwrite and "
                "--retry-failed"
            )
        if self.extend and (self.limit is not None or self.shard.count > 1):
            raise UsageError(
                "--extend moves the bounds of --shard, and --limit leaves files out: give it alone"
            )
