"""An archive listed to see, in a process of its own, whether that would end ours."""

from contextlib import suppress
from dataclasses import dataclass

from batchclf.errors import UsageError
from batchclf.images.archives import Archives, failure_of
from batchclf.images.archives.listing import Archive
from batchclf.images.archives.passage import BEHIND_ALL
from batchclf.results.records import ImageRef, Loaded, Pixels
from batchclf.system.alive import Place, alive, passing


@dataclass(frozen=True, slots=True)
class ListAlone:
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
