"""Small pictures of a few of a job's images, decoded where a bad one harms nobody else.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from PIL import Image

from batchclf.images.decode import Decoder
from batchclf.images.decode_pool import Workers, open_decoding
from batchclf.images.load import Loader
from batchclf.images.memory import default_limit
from batchclf.images.prefetch import Memory
from batchclf.images.source import AnySource
from batchclf.images.store import open_store
from batchclf.results.records import Failure, ImageRef, Pixels, Preprocess
from batchclf.spec.job import JobSpec

_AT_ONCE = 8
_QUALITY = 80


@dataclass(frozen=True, slots=True)
class Limits:
    """What the pictures may take together; images beyond it have none."""

    max_bytes: int
    max_seconds: float
    edge: int = 128
    """Rows, and columns, of each."""


def thumbnails(
    job: JobSpec, source: AnySource, refs: Sequence[ImageRef], limits: Limits
) -> Iterator[tuple[ImageRef, bytes | Failure]]:
    """A JPEG of the middle of each image, or why there is none, until a limit is reached.

    Raises:
        EnvironmentFailed: the input has gone, or no process is to be had.
    """
    ends_at = time.monotonic() + limits.max_seconds
    shape = (_AT_ONCE, limits.edge, limits.edge, 3)
    loader = _loader(job, source, limits.edge)
    workers = Workers(1, limits.max_seconds / 4, partial(_require_time, ends_at))
    left = limits.max_bytes
    opened = open_decoding(loader, "processes", workers, Memory(1, shape))
    with suppress(_TimeIsUp), opened as decoding:
        (load,), (pixels_NHWC,) = decoding.workers, decoding.batches
        for first in range(0, len(refs), _AT_ONCE):
            some = refs[first : first + _AT_ONCE]
            rows_NHWC = pixels_NHWC[: len(some)]
            loaded = load(some, rows_NHWC)
            for ref, one, pixels_HWC in zip(some, loaded, rows_NHWC, strict=True):
                found = one.failure or _encoded(pixels_HWC)
                left -= len(found) if isinstance(found, bytes) else 0
                if left < 0:
                    return
                yield ref, found
            _require_time(ends_at)


class _TimeIsUp(Exception):
    """Ends the waiting for images, however many of them hang."""


def _require_time(ends_at: float) -> None:
    if time.monotonic() > ends_at:
        raise _TimeIsUp


def _loader(job: JobSpec, source: AnySource, edge: int) -> Loader:
    limit = job.loader.max_memory
    decoder = Decoder(
        Preprocess(edge, (edge, edge), "bilinear", None, None),
        mode="fast",
        exif_transpose=True,
        max_pixels=job.loader.max_pixels,
        sixteen_bit=job.loader.sixteen_bit,
        max_memory=default_limit() if limit == "auto" else limit,
    )
    return Loader(open_store(source), decoder, job.loader.max_bytes)


def _encoded(pixels_HWC: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
