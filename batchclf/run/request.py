"""What is asked of one run of a job, what happened to it before, and what it gives back."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchclf.results.files import RunFiles
from batchclf.results.records import Failure, Shard


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line asks of one run, beyond the job itself."""

    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False
    extend: bool = False
    """Add the files that appeared since the listing was frozen."""
    retry_failed: bool = False
    codes: frozenset[str] | None = None
    """Retry only errors with these codes; None: all."""
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished job: its files and its summary line."""

    files: RunFiles
    summary: Mapping[str, Any]
    was_complete: bool
    """Whether an earlier run had already finished it."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """When the first process of a run began to classify, as time.perf_counter(), and from where."""

    began: float
    startup_s: float
    num_done: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """What to do otherwise after a process of this job died or hung."""

    suspects: tuple[int, ...] = ()
    """Images, by index in the listing, to be tried alone first."""
    quarantined: Mapping[bytes, Failure] = field(default_factory=dict)
    """Images found guilty, by their paths in the listing: never to be decoded again."""
    isolate: bool = False
    """Decode in processes of their own, whatever the job says."""
    max_batch_size: int = sys.maxsize
    """For which memory sufficed."""
    beginning: Beginning | None = None
    """Of the run, which started this process later."""
