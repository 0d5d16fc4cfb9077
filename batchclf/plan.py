"""What a run is going to do: the model opened, the listing frozen, the machine divided up."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from batchclf.images.decode import Decoder
from batchclf.images.prefetch import Load
from batchclf.images.source import Source, read_image_file
from batchclf.job import JobSpec
from batchclf.machine import usable_cores
from batchclf.models.resolve import ResolvedModel, confirm_batch_size, resolve_model
from batchclf.results.records import ActiveProvider, Failure, ImageRef, Loaded, Pixels
from batchclf.results.writer import (
    RunFiles,
    count_listing,
    discard_abandoned_listing,
    freeze_listing,
)
from batchclf.runtime.classifier import OnnxClassifier, open_classifier, open_reference
from batchclf.runtime.providers import require_provider

MAX_AUTO_STREAMS = 8

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `classify_shard` needs: what is open, and how the machine is used."""

    job: JobSpec
    source: Source
    files: RunFiles
    first: int
    last: int
    model: ResolvedModel
    classifiers: Sequence[OnnxClassifier]
    batch_size: int
    num_workers: int
    num_slots: int

    @property
    def num_images(self) -> int:
        return self.last - self.first

    @property
    def provider(self) -> ActiveProvider:
        return self.classifiers[0].active


def open_model(job: JobSpec, log: Log) -> tuple[ResolvedModel, list[OnnxClassifier]]:
    """The model, and a classifier per stream.

    Single-threaded streams share one session, each `Run` on its caller's thread; with more threads
    a session's pool serves one stream.
    """
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    cores = usable_cores()
    num_streams = _auto(job.runtime.streams, min(cores, MAX_AUTO_STREAMS))
    threads = _auto(job.runtime.threads, max(1, cores // num_streams))
    num_sessions = 1 if threads == 1 else num_streams
    sessions = [
        open_classifier(
            model.bundle.model_path,
            require_provider(job.provider.name),
            threads=threads,
            device_type=job.provider.device_type,
            options=job.provider.options,
        )
        for _ in range(num_sessions)
    ]
    return model, [sessions[number % num_sessions] for number in range(num_streams)]


def make_plan(
    job: JobSpec,
    source: Source,
    files: RunFiles,
    model: ResolvedModel,
    classifiers: Sequence[OnnxClassifier],
    log: Log,
) -> Plan:
    """Divide the frozen listing and the machine up, and check the model at the batch size.

    Raises:
        ModelError: at this batch size the model gives other answers.
    """
    first, last = files.shard.bounds(count_listing(files))
    fixed = model.bundle.meta.fixed_batch
    if fixed is not None and fixed != job.batch_size:
        log(f"batch_size: the model takes only batches of {fixed}, not {job.batch_size}")
    # A short job does not fill a batch; a smaller one saves inferring its padding.
    batch_size = fixed or max(1, min(job.batch_size, last - first))
    confirm_batch_size(model.bundle, batch_size, classifiers[0])
    return Plan(
        job=job,
        source=source,
        files=files,
        first=first,
        last=last,
        model=model,
        classifiers=classifiers,
        batch_size=batch_size,
        num_workers=_auto(job.loader.workers, usable_cores()),
        num_slots=len(classifiers) + _auto(job.loader.prefetch, max(2, len(classifiers))) + 1,
    )


def _auto(value: int | str, default: int) -> int:
    return value if isinstance(value, int) else default


def freeze(source: Source, files: RunFiles, limit: int | None, log: Log) -> float:
    """List the input once per job; returns the seconds it took."""
    started = time.perf_counter()
    discard_abandoned_listing(files)
    if files.listing.exists():
        return 0.0
    freeze_listing(files, _limited(source.paths(), limit))
    if source.num_left_out:
        log(f"input: left out {source.num_left_out:,} hidden or repeated entries")
    return time.perf_counter() - started


def _limited(paths: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        if limit is not None and number >= limit:
            return
        yield path


def make_loader(plan: Plan) -> Load:
    """What reads and decodes one listed image into its slot."""
    job = plan.job
    decoder = Decoder(
        plan.model.preprocess,
        mode=job.loader.decode,
        exif_transpose=bool(job.model.preprocess and job.model.preprocess.exif_transpose),
        max_pixels=job.loader.max_pixels,
    )
    root, confined = plan.source.root, plan.source.confined

    def load(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        data = read_image_file(root, ref.path, confined=confined)
        if isinstance(data, Failure):
            slot_HWC[:] = 0
            return Loaded(failure=data)
        return decoder(data, ref.path, slot_HWC)

    return load
