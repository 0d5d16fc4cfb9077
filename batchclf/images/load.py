"""One listed image, read and decoded into its slot."""

from dataclasses import dataclass

from batchclf.images.decode import Decoder
from batchclf.images.source import MAX_FILE_BYTES, Source, read_image_file
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels, Preprocess
from batchclf.spec.job import JobSpec


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads a job's images; plain data, so that it can be sent to other processes."""

    root: bytes
    """The folder that paths are relative to."""
    confined: bool
    """Whether links that lead out of it are refused."""
    decoder: Decoder
    max_bytes: int = MAX_FILE_BYTES

    def __call__(self, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        """Read and decode one image; a failure leaves its slot zero."""
        data = read_image_file(
            self.root, ref.path, confined=self.confined, max_bytes=self.max_bytes
        )
        if isinstance(data, Failure):
            slot_HWC[:] = 0
            return Loaded(failure=data)
        return self.decoder(data, ref.path, slot_HWC)


def loader_of(job: JobSpec, source: Source, preprocess: Preprocess) -> Loader:
    """What loads a job's images."""
    decoder = Decoder(
        preprocess,
        mode=job.loader.decode,
        exif_transpose=bool(job.model.preprocess and job.model.preprocess.exif_transpose),
        max_pixels=job.loader.max_pixels,
        strict=job.loader.strict,
    )
    return Loader(source.root, source.confined, decoder, job.loader.max_bytes)
