"""One listed image, read and decoded into its slot."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from batchclf.images.ahead import Fetched, Read
from batchclf.images.archives.members import Pace
from batchclf.images.decode import Decoder
from batchclf.images.local import MAX_FILE_BYTES
from batchclf.images.memory import Claim as MemoryClaim
from batchclf.images.memory import default_limit
from batchclf.images.resize import require_pillow
from batchclf.images.room import Claim, this_claim, unclaimed
from batchclf.images.source import AnySource
from batchclf.images.store import Store, open_store
from batchclf.results.records import (
    Failure,
    ImageRef,
    Loaded,
    Pixels,
    Preprocess,
    Quarantined,
    Stretch,
)
from batchclf.spec.job import JobSpec


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads a job's images; plain data, so that it can be sent to other processes."""

    store: Store
    decoder: Decoder
    max_bytes: int = MAX_FILE_BYTES
    quarantined: Quarantined = field(default_factory=dict)
    """What is not read, since that would crash or hang this process."""
    pace: Pace = "many"
    """How archives are read in passing."""

    def __call__(self, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        """Read and decode one image; a failure leaves its slot zero."""
        with self.decoder.claim() as claim:
            data = ref.content if isinstance(ref, Fetched) else self.read(ref, claim)
            if isinstance(data, Failure):
                slot_HWC[:] = 0
                return Loaded(failure=data)
            return self.decoder(data, ref.path, slot_HWC, claim)

    def read(self, ref: ImageRef, claim: Claim = unclaimed) -> bytes | Failure:
        """The whole content of one image, or why it cannot be read; `claim` as `Store.read`."""
        found, pace = self._known_of(ref) if self.quarantined else (None, self.pace)
        return found or self.store.read(ref, self.max_bytes, claim, pace)

    def _known_of(self, ref: ImageRef) -> tuple[Failure | None, Pace]:
        """Why an image is not even tried, if it is so; and how it is read.

        An archive that has ended a process may do so again: the less is read at once, the less is
        to blame.
        """
        if found := self.quarantined.get(ref.path):
            return found, self.pace
        own = self.store.stretch_of(ref)
        bad = [
            (one, failure)
            for one, failure in self.quarantined.items()
            if own is not None and isinstance(one, Stretch) and one.archive == own.archive
        ]
        met = (failure for one, failure in bad if own is not None and one.meets(own))
        return next(met, None), "one" if bad else self.pace

    @property
    def read_far(self) -> Read | None:
        """What reads those images that lie so far away that it should be done ahead, if any."""
        return self._read_if_far if self.store.is_far else None

    def _read_if_far(self, ref: ImageRef) -> bytes | Failure | None:
        return self.read(ref, this_claim()) if self.store.lies_far(ref) else None

    @contextmanager
    def fetched(
        self,
        refs: Sequence[ImageRef],
        reading: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
    ) -> Iterator[Sequence[ImageRef]]:
        """The same images for another process to load, which it has done at the end of the block.

        With their contents, where each process would have to go through a whole archive for them.
        `reading` is entered with the index of an image while that is done.
        """
        with self.decoder.claim() as claim:
            found = []
            for ref in refs:
                if not isinstance(ref, Fetched) and self.store.stretch_of(ref) is None:
                    found.append(ref)
                    continue
                with reading(ref.index):
                    found.append(self._fetched(ref, claim))
            yield found

    def _fetched(self, ref: ImageRef, claim: MemoryClaim) -> ImageRef:
        if not isinstance(ref, Fetched):
            ref = Fetched(ref.index, ref.path, ref.location, self.read(ref, claim))
        if isinstance(ref.content, bytes):
            claim.keep(len(ref.content))
        return ref


def loader_of(job: JobSpec, source: AnySource, preprocess: Preprocess) -> Loader:
    """What loads a job's images.

    Raises:
        UsageError: `loader.decode` is exact, and what is installed as Pillow resizes otherwise.
    """
    require_pillow(job.loader.decode)
    limit = job.loader.max_memory
    decoder = Decoder(
        preprocess,
        mode=job.loader.decode,
        exif_transpose=bool(job.model.preprocess and job.model.preprocess.exif_transpose),
        max_pixels=job.loader.max_pixels,
        strict=job.loader.strict,
        sixteen_bit=job.loader.sixteen_bit,
        max_memory=default_limit() if limit == "auto" else limit,
    )
    return Loader(open_store(source), decoder, job.loader.max_bytes)
