"""A sample of the job's own images: to calibrate int8 on, and to compare answers on.

Array shapes: N images, H rows, W columns, C = 3 (RGB), K classes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import orjson

from batchclf.errors import NoImagesError, PrecisionRefused
from batchclf.images.load import loader_of
from batchclf.images.prefetch import Decoding, Load, Prefetcher, threads
from batchclf.images.source import Source, open_source
from batchclf.images.store import list_paths, require_images
from batchclf.models.bundle import cache_folder, digest_of
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import ImageRef, Pixels, PrecisionCheck, Scores
from batchclf.runtime.ranking import softmax
from batchclf.spec.job import JobSpec, auto
from batchclf.system.machine import usable_cores

Decode = Callable[[Load, int], Decoding]
SAMPLE_SIZE = 200
"""Images of a sample: an agreement of 0.97 is then known to within about 0.012."""


def sample_listing(
    job: JobSpec,
    source: Source,
    model: ResolvedModel,
    refs: Iterable[ImageRef],
    num_listed: int,
    *,
    size: int = SAMPLE_SIZE,
    decode: Decode = threads,
) -> Pixels:
    """At most `size` of a listing's images, evenly spread, decoded as the job decodes them, NHWC.

    `decode` makes the workers that load them.

    Raises:
        NoImagesError: not one of them decodes.
    """
    wanted = {number * num_listed // size for number in range(size)}
    return load_sample(
        (ref for number, ref in enumerate(refs) if number in wanted),
        loader_of(job, source, model.preprocess),
        crop=model.preprocess.crop,
        num_workers=auto(job.loader.workers, usable_cores()),
        decode=decode,
    )


def sample_input(job: JobSpec, model: ResolvedModel, *, size: int = SAMPLE_SIZE) -> Pixels:
    """The same sample for a command that freezes no listing; the input is listed in memory.

    Raises:
        NoImagesError: the input holds no image, or not one of the sample decodes.
    """
    source = open_source(job.input, allow_outside_links=job.loader.allow_outside_links)
    require_images(source)
    refs = [ImageRef(index, path) for index, path in enumerate(list_paths(source))]
    return sample_listing(job, source, model, refs, len(refs), size=size)


def load_sample(
    refs: Iterable[ImageRef],
    load: Load,
    *,
    crop: tuple[int, int],
    num_workers: int,
    decode: Decode = threads,
) -> Pixels:
    """The images of `refs` that decode, as one uint8 array NHWC.

    Raises:
        NoImagesError: not one of them decodes.
    """
    listed = list(refs)
    with Prefetcher(
        iter(listed),
        decode(load, num_workers),
        batch_shape=(max(1, len(listed)), *crop, 3),
        num_slots=1,
    ) as batches:
        batch = batches.next_batch()
    good = [] if batch is None else [row for row, one in enumerate(batch.loaded) if not one.failure]
    if batch is None or not good:
        raise NoImagesError(
            f"input: not one of the {len(listed)} images sampled can be decoded, so nothing can "
            "be compared on them; a run at precision fp32 records the cause of each"
        )
    return batch.pixels_NHWC[good]


def require_agreement(check: PrecisionCheck, job: JobSpec) -> None:
    """Refuse a precision whose answers are not those of fp32 often enough.

    Raises:
        PrecisionRefused: below `min_agreement`.
    """
    if check.top1_agreement < job.min_agreement:
        raise PrecisionRefused(
            f"precision: at {job.precision} the top class is that of fp32 on only "
            f"{check.top1_agreement:.1%} of {check.num_images} of the job's images, and "
            f"min_agreement is {job.min_agreement:.1%} (largest difference of a score: "
            f"{check.max_score_difference:.2f}); use precision fp32, or lower min_agreement"
        )


def compare_precisions(
    reduced: Callable[[Pixels], Scores],
    full: Callable[[Pixels], Scores],
    pixels_NHWC: Pixels,
    batch_size: int,
    *,
    is_probability: bool,
) -> PrecisionCheck:
    """Run both classifiers over the sample and compare them; images with NaN scores disagree."""
    num_images = len(pixels_NHWC)
    num_agreeing = 0
    largest = 0.0
    for batch_NHWC in _padded_batches(pixels_NHWC, batch_size):
        count = min(batch_size, num_images)
        num_images -= count
        reduced_NK, full_NK = (classify(batch_NHWC)[:count] for classify in (reduced, full))
        finite_N = np.isfinite(reduced_NK).all(axis=1) & np.isfinite(full_NK).all(axis=1)
        same_N = reduced_NK.argmax(axis=1) == full_NK.argmax(axis=1)
        num_agreeing += int((finite_N & same_N).sum())
        reduced_NK, full_NK = reduced_NK[finite_N], full_NK[finite_N]
        if not is_probability:
            reduced_NK, full_NK = softmax(reduced_NK), softmax(full_NK)
        largest = max(largest, float(np.abs(reduced_NK - full_NK).max(initial=0)))
    return PrecisionCheck(
        len(pixels_NHWC), round(num_agreeing / len(pixels_NHWC), 4), round(largest, 6)
    )


def remembered(
    what_answers: object, device: str, sample_NHWC: Pixels, compare: Callable[[], PrecisionCheck]
) -> PrecisionCheck:
    """The result of `compare`, kept for the next run with the same sessions and pixels.

    Comparing costs seconds at every start of a job otherwise, also when it resumes. The session
    itself is compared with its reference answers at every start all the same.
    """
    key = digest_of((what_answers, device, sample_NHWC.shape, sha256(sample_NHWC.data).hexdigest()))
    path = cache_folder().parent / "agreement" / f"{key[:24]}.json"
    with suppress(OSError, ValueError, TypeError):  # none yet, or of another version
        return PrecisionCheck(**orjson.loads(path.read_bytes()))
    check = compare()
    temporary = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a cache that can only be read: the next run compares again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(orjson.dumps(asdict(check)))
        os.replace(temporary, path)
    return check


def _padded_batches(pixels_NHWC: Pixels, size: int) -> Iterator[Pixels]:
    for start in range(0, len(pixels_NHWC), size):
        batch_NHWC = np.zeros((size, *pixels_NHWC.shape[1:]), np.uint8)
        rows = pixels_NHWC[start : start + size]
        batch_NHWC[: len(rows)] = rows
        yield batch_NHWC
