"""A sample of the job's own images: to calibrate int8 on, and to compare answers on.

Array shapes: N images, H rows, W columns, C = 3 (RGB).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from hashlib import sha256

from batchclf.errors import NoImagesError
from batchclf.images.ahead import reading_ahead
from batchclf.images.decode import PIXELS_RECIPE
from batchclf.images.extras import installed_readers
from batchclf.images.jpeg import decoder_name
from batchclf.images.load import Loader, loader_of
from batchclf.images.prefetch import Memory, Prefetcher, noted, threads
from batchclf.images.resampler import pillow_version
from batchclf.images.resize import goes_tall_first
from batchclf.images.store import open_input
from batchclf.images.watch import UNWATCHED, Watch
from batchclf.models.bundle import digest_of
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import Entry, ImageRef, Pixels, refs_of
from batchclf.spec.job import JobSpec, auto
from batchclf.system.machine import usable_cores

SAMPLE_SIZE = 200
"""Images of a sample: an agreement of 0.97 is then known to within about 0.012."""


_OF_PIXELS = {"decode", "max_pixels", "max_bytes", "strict", "sixteen_bit", "allow_outside_links"}
"""Keys of `loader` that decide what is in a sample."""


class Sample:
    """Some of a job's images, decoded once, and only where they are needed."""

    def __init__(
        self,
        job: JobSpec,
        loader: Loader,
        refs: Iterable[ImageRef],
        watch: Watch = UNWATCHED,
    ) -> None:
        """`refs` is gone through when the sample is first asked for."""
        self._job = job
        self._loader = loader
        self._refs = refs
        self._watch = watch

    @cached_property
    def listed(self) -> list[ImageRef]:
        """The images, whether they decode or not."""
        return list(self._refs)

    @cached_property
    def pixels(self) -> Pixels:
        """Those of the images that decode, uint8 NHWC.

        Raises:
            NoImagesError: not one of them decodes.
        """
        return load_sample(self._job, self._loader, self.listed, self._watch)

    @cached_property
    def digest(self) -> str:
        """Another one where the pixels may be others.

        Of files here it is told by their names, sizes and times, and by what decodes, so that a
        start need not decode them; of what lies elsewhere, by the pixels themselves.

        Raises:
            NoImagesError: as `pixels`.
        """
        versions = [self._loader.store.version(ref) for ref in self.listed]
        if None in versions:
            return sha256(self.pixels.data).hexdigest()
        job = self._job
        return digest_of(
            (
                str(job.input),
                [(ref.path, ref.location) for ref in self.listed],
                versions,
                (PIXELS_RECIPE, decoder_name(), pillow_version(), goes_tall_first()),
                sorted(installed_readers().items()),
                sorted(job.loader.model_dump(include=_OF_PIXELS).items()),
                self._loader.decoder.preprocess,
                job.model.preprocess,
            )
        )


def spread(
    entries: Iterable[Entry], size: int, until: Callable[[], bool]
) -> tuple[list[ImageRef], int, bool]:
    """About `size` to twice as many of the entries, evenly spread, in memory that does not grow.

    Returns:
        The sample, the number of entries seen, and whether those are all: `until` ends the listing.
    """
    kept: list[ImageRef] = []
    step, count = 1, 0
    for count, entry in enumerate(entries, start=1):
        if (count - 1) % step == 0:
            kept.append(ImageRef(count - 1, *entry))
            if len(kept) == 2 * size:
                kept, step = kept[::2], 2 * step
        if count % 1024 == 0 and until():
            return kept, count, False
    return kept, count, True


def evenly_spread(
    refs: Iterable[ImageRef], num_listed: int, size: int = SAMPLE_SIZE
) -> Iterator[ImageRef]:
    """At most `size` of a listing's entries, evenly spread."""
    wanted = {number * num_listed // size for number in range(size)}
    return (ref for number, ref in enumerate(refs) if number in wanted)


def load_sample(
    job: JobSpec, loader: Loader, refs: Iterable[ImageRef], watch: Watch = UNWATCHED
) -> Pixels:
    """Those of the images that decode, decoded as the job decodes them, as one uint8 array NHWC.

    `watch` hears which image is being loaded.

    Raises:
        NoImagesError: not one of them decodes.
    """
    listed = list(refs)
    memory = Memory(1, (max(1, len(listed)), *loader.decoder.preprocess.crop, 3))
    decoding = noted(threads(loader, auto(job.loader.workers, usable_cores()), memory), watch)
    with (
        reading_ahead(loader.read_far, iter(listed), decoding, watch) as (ahead, fed),
        Prefetcher(ahead, fed) as batches,
    ):
        batch = batches.next_batch()
    good = [] if batch is None else [row for row, one in enumerate(batch.loaded) if not one.failure]
    if batch is None or not good:
        raise NoImagesError(
            f"input: not one of the {len(listed)} images sampled can be decoded, so nothing can "
            "be compared on them; a run at precision fp32 records the cause of each"
        )
    return batch.pixels_NHWC[good]


def sample_input(job: JobSpec, model: ResolvedModel, *, size: int = SAMPLE_SIZE) -> Sample:
    """A sample for a command that freezes no listing; the input is listed in memory.

    Raises:
        NoImagesError: the input holds no image.
    """
    store = open_input(job)
    refs = list(refs_of(store.entries()))
    loader = loader_of(job, store.source, model.preprocess)
    return Sample(job, loader, evenly_spread(refs, len(refs), size))
