"""A look at a few of a job's images before anything is classified: bytes, formats, sizes."""

import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from batchclf.images.decode import Decoder
from batchclf.images.formats import DECODED, content_format
from batchclf.images.source import AnySource
from batchclf.images.store import open_store
from batchclf.results.records import Failure, ImageRef, Preprocess
from batchclf.spec.job import JobSpec

OTHER = "no image format known"


@dataclass(frozen=True, slots=True)
class Glance:
    """What was seen of a sample."""

    num_images: int
    """That were read."""
    num_unreadable: int
    num_bytes: int
    """Of those that were read, together."""
    formats: Mapping[str, int]
    """As the first bytes say, the most frequent first."""
    largest_pixels: int
    """Width times height of the largest whose header says it."""
    num_too_large: int
    """Of more pixels than `loader.max_pixels`."""

    @property
    def mean_bytes(self) -> float:
        return self.num_bytes / self.num_images if self.num_images else 0.0


def glance(job: JobSpec, source: AnySource, refs: Sequence[ImageRef], seconds: float) -> Glance:
    """Read images of a job, as many as there is time for; none is decoded.

    Raises:
        EnvironmentFailed: the input has gone.
    """
    ends_at = time.monotonic() + seconds
    store = open_store(source)
    Decoder(Preprocess(1, (1, 1), "bilinear", None, None))  # sets Pillow's limit of pixels
    formats: Counter[str] = Counter()
    num_unreadable = num_bytes = largest = num_too_large = 0
    for ref in refs:
        data = store.read(ref, job.loader.max_bytes)
        if isinstance(data, Failure):
            num_unreadable += 1
        else:
            num_bytes += len(data)
            formats[content_format(data) or OTHER] += 1
            num_pixels = _num_pixels(data)
            largest = max(largest, num_pixels)
            num_too_large += num_pixels > job.loader.max_pixels
        if time.monotonic() > ends_at:
            break
    return Glance(
        num_images=formats.total(),
        num_unreadable=num_unreadable,
        num_bytes=num_bytes,
        formats=dict(formats.most_common()),
        largest_pixels=largest,
        num_too_large=num_too_large,
    )


def _num_pixels(data: bytes) -> int:
    """As the header says; 0 where it says nothing that Pillow reads."""
    try:
        width, height = Image.open(io.BytesIO(data), formats=DECODED).size
    except Exception:  # noqa: BLE001 - a bad header raises anything; `run` records what is wrong
        return 0
    return width * height
