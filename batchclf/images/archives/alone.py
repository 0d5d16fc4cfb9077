"""An archive listed to see, in a process of its own, whether that would end ours."""

import os
from contextlib import suppress
from dataclasses import dataclass

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.images.archives import Archives, failure_of
from batchclf.images.archives.listing import Archive
from batchclf.images.archives.passage import BEHIND_ALL
from batchclf.images.decode_pool import try_alone
from batchclf.images.decode_process import Beat
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels
from batchclf.system.alive import Place, alive, passing


def list_alone(archive: Archive, max_seconds: float, beat: Beat = lambda: None) -> Failure | None:
    """Why an archive is not to be listed again; None: alone, it does no harm.

    `beat` is called every second that it takes.

    Raises:
        EnvironmentFailed: no process is to be had.
    """
    ref = ImageRef(0, archive.file.path)
    try:
        blame = try_alone(_Lister(archive), ref, (1, 1, 3), max_seconds, beat)
    except OSError as error:
        raise no_process_for(ref, error) from error
    if blame is None:
        return None
    return Failure("damaged_archive", f"cannot be listed: {blame.failure.message}")


def no_process_for(ref: ImageRef, error: OSError) -> EnvironmentFailed:
    """The error where an image, or an archive, cannot be tried."""
    return EnvironmentFailed(
        f"no process in which to try {os.fsdecode(ref.path)} alone: {error}; run again to resume"
    )


@dataclass(frozen=True, slots=True)
class _Lister:
    """Lists an archive, in the place of what loads an image."""

    archive: Archive

    def __call__(self, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        """Find all that is in it; each member shows that it goes on."""
        archives = Archives(self.archive.files, self.archive.rows, log=lambda text: None)
        # What the job must say of its input, whoever lists all of it tells.
        with passing() as tell, suppress(UsageError):
            tell(Place(0, BEHIND_ALL))
            for entry in archives.glimpse(self.archive.file):
                alive()
                failure = failure_of(entry.location)
                if failure is not None and failure.code == "oom":
                    return Loaded(failure)
        return Loaded()
