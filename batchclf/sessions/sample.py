"""A sample of the job's own images: to calibrate int8 on, and to compare answers on.

Array shapes: N images, H rows, W columns, C = 3 (RGB).
"""

from collections.abc import Callable, Iterable, Iterator

from batchclf.errors import NoImagesError
from batchclf.images.ahead import reading_ahead
from batchclf.images.load import loader_of
from batchclf.images.prefetch import Decoding, Load, Memory, Prefetcher, threads
from batchclf.images.source import AnySource
from batchclf.images.store import open_input
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import ImageRef, Pixels, refs_of
from batchclf.spec.job import JobSpec, auto
from batchclf.system.machine import usable_cores

Decode = Callable[[Load, int, Memory], Decoding]
"""Makes so many workers that load images into memory."""
SAMPLE_SIZE = 200
"""Images of a sample: an agreement of 0.97 is then known to within about 0.012."""


def evenly_spread(
    refs: Iterable[ImageRef], num_listed: int, size: int = SAMPLE_SIZE
) -> Iterator[ImageRef]:
    """At most `size` of a listing's entries, evenly spread."""
    wanted = {number * num_listed // size for number in range(size)}
    return (ref for number, ref in enumerate(refs) if number in wanted)


def load_sample(
    job: JobSpec,
    source: AnySource,
    model: ResolvedModel,
    refs: Iterable[ImageRef],
    decode: Decode = threads,
) -> Pixels:
    """Those of the images that decode, decoded as the job decodes them, as one uint8 array NHWC.

    Raises:
        NoImagesError: not one of them decodes.
    """
    listed = list(refs)
    load = loader_of(job, source, model.preprocess)
    memory = Memory(1, (max(1, len(listed)), *model.preprocess.crop, 3))
    decoding = decode(load, auto(job.loader.workers, usable_cores()), memory)
    with (
        reading_ahead(load.read_far, iter(listed), decoding) as (ahead, fed),
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
    return load_sample(job, store.source, model, evenly_spread(refs, len(refs), size))
