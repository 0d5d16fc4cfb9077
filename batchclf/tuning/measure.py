"""The measurements: decoding alone, inference alone, and the whole pipeline, each for seconds.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batchclf.errors import NoImagesError
from batchclf.images.ahead import reading_ahead
from batchclf.images.decode_pool import Workers, open_decoding
from batchclf.images.load import loader_of
from batchclf.images.prefetch import Memory, Prefetcher
from batchclf.images.source import AnySource
from batchclf.models.resolve import Log, ResolvedModel
from batchclf.results.files import RunFiles
from batchclf.results.lines import Lines
from batchclf.results.records import DecodeMode, ImageRef, Pixels
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import RecordWriter
from batchclf.run.classify import Work, classify
from batchclf.run.plan import Plan, Task, backend_of
from batchclf.run.reporter import Reporter
from batchclf.runtime.timing import Throughput, measure_throughput
from batchclf.sessions.open import Opened
from batchclf.spec.job import ErrorsSpec, JobSpec
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb
from batchclf.tuning.records import DecodeLimit, Prediction, Settings, Trial

DECODE_BATCH = 16
NUM_KEPT = 64
"""Decoded images kept to infer on."""
ROUNDS = 2
"""Batches of each stream that a steady state must last, if its time allows."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured: a job, its model, and a sample of its images."""

    job: JobSpec
    source: AnySource
    model: ResolvedModel
    refs: Sequence[ImageRef]
    num_listed: int
    """Images of the job, as far as they were listed."""
    folder: Path
    """Where the records of trials go; its disk is part of what is measured."""
    stop: StopRequest
    log: Log


def job_with(job: JobSpec, settings: Settings) -> JobSpec:
    """The job at other settings; a bad image must not end a trial."""
    session = settings.session
    return job.model_copy(
        update={
            "precision": session.precision,
            "batch_size": session.batch_size,
            "loader": job.loader.model_copy(
                update={"workers": settings.workers, "decode": settings.decode}
            ),
            "runtime": job.runtime.model_copy(
                update={
                    "streams": session.streams,
                    "threads": session.threads,
                    "part": session.part,
                }
            ),
            "errors": ErrorsSpec(),
        }
    )


# ---- decoding ------------------------------------------------------------------------------------


def first_pass(bench: Bench, workers: int, max_s: float) -> tuple[DecodeLimit, Pixels]:
    """Decode the sample once, from its beginning as far as `max_s` seconds go.

    Returns:
        The figures, and some of the pixels, NHWC.

    Raises:
        NoImagesError: none of them can be decoded.
    """
    slot_HWC = np.zeros((*bench.model.preprocess.crop, 3), np.uint8)
    load = loader_of(bench.job, bench.source, bench.model.preprocess)
    load(bench.refs[0], slot_HWC)  # imports decoders
    kept: list[Pixels] = []
    num_images = num_errors = 0
    with _decoding(bench, bench.refs, bench.job.loader.decode, workers) as (batches, cpu_used):
        started, cpu_started = time.perf_counter(), cpu_used()
        while (batch := batches.next_batch()) is not None:
            good = [row for row, one in enumerate(batch.loaded) if one.failure is None]
            num_errors += len(batch.loaded) - len(good)
            if sum(map(len, kept)) < NUM_KEPT:
                kept.append(batch.pixels_NHWC[good])
            num_images += len(batch.refs)
            batches.release(batch)
            if time.perf_counter() - started >= max_s:
                break
        wall_s, cpu_s = time.perf_counter() - started, cpu_used() - cpu_started
    if num_errors == num_images:
        raise NoImagesError(
            f"input: not one of the {num_images} images sampled can be decoded; "
            "a run records the cause of each"
        )
    figures = DecodeLimit(
        bench.job.loader.decode,
        workers,
        is_first_pass=True,
        num_images=num_images,
        num_errors=num_errors,
        images_per_s=num_images / wall_s,
        cpu_ms_per_image=1000 * cpu_s / num_images,
    )
    return figures, np.concatenate(kept)


def measure_decoding(bench: Bench, decode: DecodeMode, workers: int, seconds: float) -> DecodeLimit:
    """Decode the sample over and over for `seconds`, after a first batch."""
    num_images = num_errors = 0
    with _decoding(bench, itertools.cycle(bench.refs), decode, workers) as (batches, cpu_used):
        batch = batches.next_batch()
        assert batch is not None
        started, cpu_started = time.perf_counter(), cpu_used()
        while True:
            batches.release(batch)
            batch = batches.next_batch()
            assert batch is not None
            num_images += len(batch.refs)
            num_errors += sum(one.failure is not None for one in batch.loaded)
            if time.perf_counter() - started >= seconds:
                break
        wall_s, cpu_s = time.perf_counter() - started, cpu_used() - cpu_started
    return DecodeLimit(
        decode,
        workers,
        is_first_pass=False,
        num_images=num_images,
        num_errors=num_errors,
        images_per_s=num_images / wall_s,
        cpu_ms_per_image=1000 * cpu_s / num_images,
    )


@contextmanager
def _decoding(
    bench: Bench, refs: Iterable[ImageRef], decode: DecodeMode, workers: int
) -> Iterator[tuple[Prefetcher, Callable[[], float]]]:
    """Batches of the images, and the CPU seconds that decoding uses."""
    loader = bench.job.loader.model_copy(update={"decode": decode})
    job = bench.job.model_copy(update={"loader": loader})
    load = loader_of(job, bench.source, bench.model.preprocess)
    pool = Workers(workers, loader.max_seconds, hand_over=lambda worker, refs: load.fetched(refs))
    num_batches = 2 + math.ceil(4 * workers / DECODE_BATCH)  # processes take some rows at a time
    memory = Memory(num_batches, (DECODE_BATCH, *bench.model.preprocess.crop, 3))
    with (
        open_decoding(load, backend_of(job, workers), pool, memory) as decoding,
        reading_ahead(load.read_far, iter(refs), decoding) as (ahead, fed),
        Prefetcher(ahead, fed) as batches,
    ):
        yield batches, lambda: cpu_seconds() + decoding.cpu_seconds()


# ---- inference -----------------------------------------------------------------------------------


def measure_inference(
    opened: Opened, pixels_NHWC: Pixels, batch_size: int, seconds: float
) -> Throughput:
    """All streams at once, each for `seconds` after a first call.

    Raises:
        Exception: what a classifier raised.
    """
    batch_NHWC = opened.memory.allocate((batch_size, *pixels_NHWC.shape[1:]))
    np.take(pixels_NHWC, range(batch_size), axis=0, mode="wrap", out=batch_NHWC)
    return measure_throughput(
        opened.classifiers, batch_NHWC, num_warm_up=1, min_calls=1, budget_s=seconds
    )


# ---- the whole -----------------------------------------------------------------------------------


class _EnoughError(Exception):
    """The steady state was seen long enough."""


class _Window(RecordWriter):
    """A writer that sees the steady state: from the first batch of the last stream, in rounds.

    Beginning and end are left out: streams then have nothing to do, or decoding has.
    """

    def __init__(
        self, path: Path, stats: StatsCollector, num_streams: int, seconds: float, max_s: float
    ) -> None:
        super().__init__(path, 0, stats.add_write)
        self._stats = stats
        self._num_streams = num_streams
        self._seconds = seconds
        self._end = time.perf_counter() + max_s
        self._num_batches = 0
        self._first: tuple[float, float] | None = None
        self.num_images = 0
        self.wall_s = 0.0
        self.cpu_s = 0.0

    def write(self, lines: Lines) -> None:
        super().write(lines)
        self._num_batches += 1
        now, cpu_now = time.perf_counter(), self._stats.cpu_seconds()
        if self._first is not None:
            self.num_images += lines.num_images
        if self._num_batches % self._num_streams:
            return  # streams answer in bursts, one batch each
        if self._first is None:
            self._first = now, cpu_now
            return
        self.wall_s, self.cpu_s = now - self._first[0], cpu_now - self._first[1]
        has_rounds = self._num_batches >= (1 + ROUNDS) * self._num_streams
        if (has_rounds and self.wall_s >= self._seconds) or now > self._end:
            raise _EnoughError

    def tick(self) -> None:
        """A trial is too short to sync."""


def run_trial(
    bench: Bench, opened: Opened, predicted: Prediction, seconds: float, max_s: float
) -> Trial:
    """Run the pipeline itself over the sample, again and again, for `seconds` of steady state.

    After `max_s` seconds it ends with the next round of batches.

    Raises:
        Interrupted: after a signal.
        Exception: what the pipeline raised.
    """
    settings = predicted.settings
    stats = StatsCollector(cpu_seconds, peak_rss_mb)
    files = RunFiles(bench.folder)
    plan = Plan(
        Task(job_with(bench.job, settings), bench.source, bench.model, num_images=sys.maxsize),
        batch_size=settings.session.batch_size,
        num_workers=settings.workers,
        backend=backend_of(bench.job, settings.workers),
    )
    num_streams = len(opened.classifiers)
    window = _Window(files.predictions, stats, num_streams, seconds, max_s)
    refs = itertools.cycle(bench.refs)
    with window, suppress(_EnoughError):
        classify(Work(plan, opened, stats, Reporter(), bench.stop), refs, window)
    bench.stop.raise_if_requested()
    found = stats.snapshot()
    rate = window.num_images / window.wall_s
    return Trial(
        predicted,
        too_large=False,
        num_images=window.num_images,
        wall_s=window.wall_s,
        images_per_s=rate,
        efficiency=rate / predicted.limit_images_per_s,
        cpu_ms_per_image=1000 * window.cpu_s / window.num_images,
        batch_ms={key: found.batch_ms[key] for key in ("p50", "p95")},
        bottleneck=found.bottleneck,
    )


def estimated_s(predicted: Prediction, seconds: float) -> float:
    """Seconds that a trial will take, at least: its rounds may take longer than `seconds`."""
    session = predicted.settings.session
    num_images = (1.5 + ROUNDS) * session.streams * session.batch_size
    return seconds + num_images / predicted.limit_images_per_s
