"""What to do after a process of a run died: a function of what happened, for every engine.

A process that died leaves word of the images that it was loading. The next one tries these alone,
each in a process of its own; those that are to blame get a record and are not loaded again. When
reading an archive is to blame, so is all of it that cannot be had without reading that place. When
that does not help, decoding moves to processes of its own for good; when that does not help either,
the death has other reasons, and the job ends.
"""

import os
import sys
from dataclasses import dataclass, field, replace

from batchclf.errors import BatchclfError, EnvironmentFailed, OutOfMemory, WorkerFailed
from batchclf.images.archives.listing import Archive, Unlistable
from batchclf.results.records import Quarantined

MAX_FUTILE = 3
"""Deaths of a worker in a row, without a record or a culprit between them, that a job survives."""
ISOLATE_AFTER = 2
"""Such deaths after which decoding is moved to processes of its own."""
MANY_GUILTY = 3
"""Images to blame after which it is moved as well: starting a worker again costs more."""


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
    quarantined: Quarantined = field(default_factory=dict)
    """What was found guilty: never to be loaded again."""
    readers: tuple[int, ...] = ()
    """More images, which are not even to be read but alone."""
    listing: Archive | None = None
    """An archive to be listed alone first."""
    unlistable: Unlistable = field(default_factory=dict)
    """What was found guilty of that: never to be listed again."""
    isolate: bool = False
    """Decode in processes of their own, whatever the job says."""
    max_batch_size: int = sys.maxsize
    """For which memory sufficed."""
    beginning: Beginning | None = None
    """Of the run, which started this process later."""
    num_futile: int = 0
    """Deaths in a row that brought the run no further."""
    num_images: int = 0
    """Records that there were when this process was started."""


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a process that did not say why it ended."""

    cause: str
    suspects: tuple[int, ...] = ()
    """Images, by index in the listing, that it was decoding."""
    readers: tuple[int, ...] = ()
    """Others to which it was reading its way through their archives."""
    listing: Archive | None = None
    """What it was listing."""
    by_kernel: bool = False
    """Whether it was killed, and not by its parent: as where memory runs out."""
    by_device: bool = False
    """Whether its device stopped answering."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run was when its process ended."""

    num_images: int
    """Records by then; 0: it had not begun."""
    guilty: Quarantined
    """What was found guilty by then."""
    beginning: Beginning | None
    unlistable: Unlistable = field(default_factory=dict)
    """What was found, by then, not to be listed."""


def recover(
    recovery: Recovery, ended: Death | OutOfMemory, progress: Progress
) -> tuple[Recovery, str]:
    """How the next process is to go on, and what to tell people of it.

    `recovery` is what the one that ended was given.

    Raises:
        OutOfMemory: a batch cannot be any smaller.
        EnvironmentFailed, WorkerFailed: going on did not help, again and again.
    """
    resumed = 0 if progress.beginning is None else progress.beginning.num_done
    has_progressed = progress.num_images > max(recovery.num_images, resumed)
    has_found = len(progress.guilty) > len(recovery.quarantined) or len(progress.unlistable) > len(
        recovery.unlistable
    )
    is_futile = not has_progressed and not has_found
    found = replace(
        recovery,
        suspects=(),
        readers=(),
        quarantined=dict(progress.guilty),
        listing=None,
        unlistable=dict(progress.unlistable),
        beginning=progress.beginning,
        num_futile=recovery.num_futile if is_futile else 0,
        num_images=progress.num_images,
    )
    if isinstance(ended, OutOfMemory):
        return _smaller(found, ended)
    num_futile = found.num_futile + is_futile
    if num_futile > MAX_FUTILE:
        raise _hopeless(ended, num_futile)
    is_elsewhere = ended.by_device or ended.listing is not None
    may_be_decoding = num_futile >= ISOLATE_AFTER and not is_elsewhere
    num_guilty = sum(isinstance(one, bytes) for one in progress.guilty)
    isolate = recovery.isolate or may_be_decoding or num_guilty >= MANY_GUILTY
    what = "starting it again"
    if ended.suspects:
        what += f"; images that it was decoding, to be tried alone: {len(ended.suspects)}"
    if ended.readers:
        what += f"; images that it was reading archives for, likewise: {len(ended.readers)}"
    if ended.listing is not None:
        what += f"; the archive that it was listing, to be tried alone: {_shown(ended.listing)}"
    if isolate and not recovery.isolate:
        what += "; decoding in processes of its own from now on"
    found = replace(
        found,
        suspects=ended.suspects,
        readers=ended.readers,
        listing=ended.listing,
        isolate=isolate,
        num_futile=num_futile,
    )
    return found, f"the worker {ended.cause}: {what}"


def _smaller(recovery: Recovery, error: OutOfMemory) -> tuple[Recovery, str]:
    if not error.can_be_smaller:
        raise error
    half = error.batch_size // 2
    return replace(recovery, max_batch_size=half), (
        f"memory does not suffice for batches of {error.batch_size} ({error.cause}): "
        f"going on with {half} in a new session"
    )


def _shown(archive: Archive) -> str:
    return os.fsdecode(archive.file.path)


def _hopeless(death: Death, number: int) -> BatchclfError:
    if death.listing is not None:
        return WorkerFailed(
            f"the worker {death.cause} {number} times while listing {_shown(death.listing)}, which "
            "does no harm in a process of its own: leave it out of the input, or run again"
        )
    if death.by_kernel:
        return EnvironmentFailed(
            f"the worker was killed (SIGKILL) {number} times without getting any further, most "
            "likely since memory ran out: choose a smaller batch_size, fewer loader.workers or "
            "runtime.streams, and run again to resume"
        )
    if death.by_device:
        return WorkerFailed(
            f"the worker {death.cause} {number} times without getting any further: look at the "
            "device (nvidia-smi, the kernel's log), and run again to resume"
        )
    return WorkerFailed(
        f"the worker {death.cause} {number} times without getting any further, also with decoding "
        "in processes of its own, so no image is to blame; run again to resume, perhaps with "
        "another provider, precision or batch_size"
    )
