"""A sample of the job's own images: to calibrate int8 on, and to compare answers on.

Array shapes: N images, H rows, W columns, C = 3 (RGB).
"""

from collections.abc import Iterable, Iterator

from batchclf.errors import NoImagesError
from batchclf.images.ahead import reading_ahead
from batchclf.images.load import Loader, loader_of
from batchclf.images.prefetch import Memory, Prefetcher, noted, threads
from batchclf.images.store import open_input
from batchclf.images.watch import UNWATCHED, Watch
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import ImageRef, Pixels, refs_of
from batchclf.spec.job import JobSpec, auto
from batchclf.system.machine import usable_cores

SAMPLE_SIZE = 200
"""Images of a sample: an agreement of 0.97 is then known to within about 0.012."""


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


def sample_input(job: JobSpec, model: ResolvedModel, *, size: int = SAMPLE_SIZE) -> Pixels:
    """A sample for a command that freezes no listing; the input is listed in memory.

    Raises:
        NoImagesError: the input holds no image, or not one of the sample decodes.
    """
    store = open_input(job)
    refs = list(refs_of(store.entries()))
    loader = loader_of(job, store.source, model.preprocess)
    return load_sample(job, loader, evenly_spread(refs, len(refs), size))
