"""Whether processes on several machines see one input: by some of its images, and by missing ones.

A mount that a machine lacks, or loses while it works, leaves an empty folder: each image below it
would be recorded as missing, for good. So what begins with other images than the others is refused,
and what misses many is asked about before it is committed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from batchclf.errors import EnvironmentFailed
from batchclf.images.store import Store
from batchclf.results.files import RunFiles
from batchclf.results.listing import Listing
from batchclf.results.records import Failure, ImageRef
from batchclf.results.writer import failed_refs
from batchclf.run.draft import MISSING
from batchclf.run.duty import Attempt, Landmark
from batchclf.sessions.sample import evenly_spread

NUM_LANDMARKS = 32
WITHIN = 100_000
"""Of so many first images: a listing of a billion would take minutes to go through."""
NUM_ASKED = 10
"""Missing images of a range that are looked for elsewhere, evenly spread, the last among them."""


def landmarks_of(store: Store, listing: Listing) -> tuple[Landmark, ...]:
    """Some images that are files here, and how large they are.

    Raises:
        EnvironmentFailed: the listing cannot be read.
    """
    refs = islice(listing.refs(), WITHIN)
    spread = evenly_spread(refs, min(listing.num_images, WITHIN), NUM_LANDMARKS)
    sizes = ((ref, _size(store, ref)) for ref in spread)
    return tuple(Landmark(ref, size) for ref, size in sizes if size is not None)


def require_landmarks(store: Store, landmarks: Sequence[Landmark]) -> None:
    """Refuse to work on what is another input here; one image may have changed meanwhile.

    Raises:
        EnvironmentFailed: naming an image, and what was found.
    """
    found = [(one, _size(store, one.ref)) for one in landmarks]
    others = [(one, size) for one, size in found if size != one.num_bytes]
    if len(others) > 1 or (others and len(others) == len(landmarks)):
        one, size = others[0]
        here = "it is not there" if size is None else f"it has {size:,} bytes"
        raise EnvironmentFailed(
            f"input: {_name(store, one.ref)}: {here}, and where the job was started it has "
            f"{one.num_bytes:,}, as with {len(others):,} of {len(landmarks):,} images that were "
            "compared; engine ray needs an input that is the same on all nodes (is it mounted?)"
        )


@dataclass(frozen=True)
class Witness:
    """What the process that started a job sees of its input, to be compared with what others do."""

    store: Store
    listing: Listing
    """Not yet in its place."""
    files: RunFiles

    @cached_property
    def landmarks(self) -> tuple[Landmark, ...]:
        """Some images, as they were at the start."""
        return landmarks_of(self.store, self.listing)

    def landmarks_left(self) -> tuple[Landmark, ...]:
        """Those that are from here what they were: what others are to see that begin now."""
        return tuple(one for one in self.landmarks if _size(self.store, one.ref) == one.num_bytes)

    def seen(self, attempt: Attempt) -> str | None:
        """One of the images that an attempt found to be missing, and that is there from here.

        Raises:
            EnvironmentFailed: the whole input has gone, or the draft cannot be read.
        """
        for ref in self._missing(attempt):
            found = self.store.read(ref, 1)
            if not (isinstance(found, Failure) and found.code in MISSING):
                return _name(self.store, ref)
        return None

    def require_input(self) -> None:
        """Refuse to take images for missing where most of what was there has gone.

        Raises:
            EnvironmentFailed: naming an image.
        """
        gone = [one for one in self.landmarks if _size(self.store, one.ref) is None]
        if gone and 2 * len(gone) > len(self.landmarks):
            raise EnvironmentFailed(
                f"input: {_name(self.store, gone[0].ref)}: it is no longer there, nor are most of "
                f"the images that were when the job was started ({len(gone):,} of "
                f"{len(self.landmarks):,} that were looked at); put them back (is the input still "
                "mounted?) and run the same command to resume"
            )

    def _missing(self, attempt: Attempt) -> list[ImageRef]:
        listing = replace(self.listing, path=self.files.listing)
        failed = failed_refs(attempt.draft, attempt.range.refs(listing), MISSING)
        refs = [ref for ref in failed if not self.store.lies_far(ref)]
        last = len(refs) - 1
        spread = sorted({number * last // (NUM_ASKED - 1) for number in range(NUM_ASKED)})
        return [refs[number] for number in spread] if refs else []


def _size(store: Store, ref: ImageRef) -> int | None:
    """None: it is not there, or is no file of this machine's."""
    path = store.local_file(ref)
    if path is None:
        return None
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _name(store: Store, ref: ImageRef) -> str:
    return os.fsdecode(store.local_file(ref) or ref.path)
