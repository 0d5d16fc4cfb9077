"""The whole flow of a job, from its spec to its output folder. Read this file first.

run_job:         prove the provider → get the model → freeze the listing → refuse another job's
                 output → open the sessions and check their answers → classify
classify_shard:  listing → prefetched batches → streams of inference → records, in order
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import starmap
from typing import Any, Protocol

from batchclf import STARTED
from batchclf.devices import Opened, open_devices, settle_provider
from batchclf.errors import BatchclfError, ErrorLimitPassed, NoImagesError, UsageError
from batchclf.images.prefetch import Prefetcher
from batchclf.images.processes import open_decoding
from batchclf.images.source import Source, open_source, require_images
from batchclf.interrupt import StopRequest
from batchclf.job import JobSpec, auto
from batchclf.machine import cpu_seconds, peak_rss_mb
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.plan import Plan, fitting_batch_size, freeze, limited, make_loader, make_plan
from batchclf.results.records import ImageRef, Shard
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import (
    Done,
    RecordWriter,
    RunFiles,
    append_stats,
    discard,
    failed_refs,
    only_writer,
    read_listing,
    read_run,
    replace_failed,
)
from batchclf.resume import (
    fingerprint,
    finished_summary,
    kept_status,
    require_same_converted,
    resume,
    run_facts,
    summary_facts,
)
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.ranking import rank
from batchclf.runtime.streams import Rank, Streams
from batchclf.sample import sample_listing
from batchclf.validate import require_separate_output

INTERVAL_S = 10.0
TICK_S = 1.0


class Reporter(Protocol):
    """Where progress and log lines go."""

    def log(self, text: str) -> None: ...

    def begin(self, num_images: int, num_done: int) -> None: ...

    def update(self, num_images: int, num_errors: int) -> None: ...


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line asks of one run, beyond the job itself."""

    shard: Shard = field(default_factory=Shard)
    overwrite: bool = False
    retry_failed: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished job: its files and its summary line."""

    files: RunFiles
    summary: Mapping[str, Any]
    was_complete: bool
    """Whether an earlier run had already finished it."""


def run_job(
    job: JobSpec, options: RunOptions, *, reporter: Reporter, stop: StopRequest
) -> RunResult:
    """Run a job to its end, or resume it.

    Raises:
        BatchclfError: with the exit code and what to do; the output stays resumable.
    """
    require_separate_output(job)
    files = RunFiles(job.output, options.shard)
    is_complete = not options.overwrite and (read_run(files) or {}).get("status") == "complete"
    settle = cache(partial(settle_provider, job, reporter.log))
    if not is_complete:  # else nothing will run, and the provider may be gone
        settle()
    with only_writer(files):
        previous = None if options.overwrite else read_run(files)
        source = _source(job, is_complete=is_complete)
        model = resolve_model(
            job.model, batch_size=job.batch_size, open_reference=open_reference, log=reporter.log
        )
        opened = None
        if options.overwrite:
            # Nothing is thrown away before what replaces it was seen to run.
            opened = _open(job, options, source, model, settle(), reporter)
            discard(files)
        list_s = freeze(source, files, options.limit, reporter.log)
        plan = make_plan(job, source, files, model, reporter.log)
        wanted = fingerprint(plan, options.limit)
        done = resume(plan, previous, wanted, reporter.log)
        retried = _failed(plan, done) if options.retry_failed else Counter[str]()
        stats = StatsCollector(cpu_seconds, peak_rss_mb, list_s=list_s)
        stats.resume(done.num_ok, done.errors_by_code - retried)
        _check_error_limit(plan, stats)
        finished = finished_summary(files) if done.num_images == plan.num_images else None
        if finished is not None and not retried:
            reporter.log(f"already complete: {plan.num_images:,} images in {files.predictions}")
            return RunResult(files, finished, was_complete=True)
        if opened is None:
            sample = partial(
                sample_listing, job, source, model, read_listing(files), plan.num_listed
            )
            opened = open_devices(job, model, plan.batch_size, sample, settle(), reporter.log)
            require_same_converted(previous, done, opened)
        run = run_facts(plan, opened, wanted)
        if previous is not None:  # listed then, not now
            run["num_left_out"] = previous.get("num_left_out")
        with kept_status(files, run):
            if retried:
                _retry_failed(plan, opened, stats, reporter=reporter, stop=stop)
            else:
                refs = read_listing(files, plan.first + done.num_images, plan.last)
                with RecordWriter(files.predictions, done.num_bytes, stats.add_write) as writer:
                    classify_shard(plan, opened, refs, writer, stats, reporter=reporter, stop=stop)
            summary = append_stats(files, "summary", stats.snapshot(), summary_facts(plan, opened))
        return RunResult(files, summary, was_complete=False)


def _open(
    job: JobSpec,
    options: RunOptions,
    source: Source,
    model: ResolvedModel,
    fallback: str | None,
    reporter: Reporter,
) -> Opened:
    """Open a job's sessions before its listing is frozen; the input is only counted, or sampled."""

    def refs() -> Iterator[ImageRef]:
        return starmap(ImageRef, enumerate(limited(source.paths(), options.limit)))

    num_listed = sum(1 for _ in refs())
    first, last = options.shard.bounds(num_listed)
    return open_devices(
        job,
        model,
        fitting_batch_size(job, model, last - first),
        lambda: sample_listing(job, source, model, refs(), num_listed),
        fallback,
        reporter.log,
    )


def _source(job: JobSpec, *, is_complete: bool) -> Source:
    """The job's input; a complete job no longer needs it to be there."""
    try:
        source = open_source(job.input, allow_outside_links=job.loader.allow_outside_links)
        require_images(source)
    except NoImagesError:
        if not is_complete:
            raise
        return Source(os.fsencode(job.input), confined=True, paths=lambda: iter(()))
    return source


def classify_shard(
    plan: Plan,
    opened: Opened,
    refs: Iterator[ImageRef],
    writer: RecordWriter,
    stats: StatsCollector,
    *,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Classify `refs`, what is left of a shard, writing records in the order of the listing.

    Raises:
        ErrorLimitPassed: after the batch that passed `errors.max`.
        Interrupted: after a signal, with everything in flight committed.
    """
    num_streams = len(opened.classifiers)
    num_slots = num_streams + auto(plan.job.loader.prefetch, max(2, num_streams)) + 1
    batch_shape = (plan.batch_size, *plan.model.preprocess.crop, 3)
    reporter.begin(plan.num_images, stats.num_images)
    next_interval = time.monotonic() + INTERVAL_S
    with (
        stop.drained_by_caller(),
        open_decoding(
            make_loader(plan.job, plan.source, plan.model),
            plan.backend,
            plan.num_workers,
            num_slots=num_slots,
            batch_shape=batch_shape,
            allocate=opened.allocate,
        ) as decoding,
        Prefetcher(refs, decoding, num_slots=num_slots, batch_shape=batch_shape) as batches,
        Streams(batches.next_batch, opened.classifiers, _ranking(plan), stats.add_batch) as streams,
        _stopping(batches),
    ):
        stats.start(time.perf_counter() - STARTED, num_streams)
        stats.count_cpu(decoding.cpu_seconds)
        for result in streams.results(TICK_S):
            if result is not None:
                batch, records = result
                writer.write(records)
                stats.add_records(records)
                batches.release(batch)
                _check_error_limit(plan, stats)
            if stop.signal_number is not None:
                batches.stop()
            if time.monotonic() >= next_interval:
                next_interval += INTERVAL_S
                writer.sync()
                append_stats(plan.files, "interval", stats.snapshot(), {})
            reporter.update(stats.num_images, stats.num_errors)
    if stats.num_images < plan.num_images:
        stop.raise_if_requested()
        raise BatchclfError(  # cannot happen; an incomplete output must never exit 0
            f"{stats.num_images:,} of {plan.num_images:,} records written; run again to resume"
        )


def _ranking(plan: Plan) -> Rank:
    """Scores to the predictions that the job asks for."""
    return partial(
        rank,
        labels=plan.model.labels,
        top_k=plan.job.top_k,
        is_probability=plan.model.bundle.meta.scores == "probabilities",
    )


# ---- trying again, and stopping ------------------------------------------------------------------


def _failed(plan: Plan, done: Done) -> Counter[str]:
    """How many records of which error `--retry-failed` would try again.

    Raises:
        UsageError: the job is not finished.
    """
    if done.num_images < plan.num_images:
        raise UsageError(
            f"--retry-failed: {done.num_images:,} of {plan.num_images:,} images have a record; "
            "finish the job first, by running it without --retry-failed"
        )
    return done.errors_by_code


def _retry_failed(
    plan: Plan, opened: Opened, stats: StatsCollector, *, reporter: Reporter, stop: StopRequest
) -> None:
    """Classify the failed images again, then put the new records in the old ones' places."""
    listed = partial(read_listing, plan.files, plan.first, plan.last)
    retry = plan.files.retry
    with RecordWriter(retry, 0, stats.add_write) as writer:
        refs = failed_refs(plan.files.predictions, listed())
        classify_shard(plan, opened, refs, writer, stats, reporter=reporter, stop=stop)
    replace_failed(plan.files.predictions, retry)


@contextmanager
def _stopping(batches: Prefetcher) -> Iterator[None]:
    """However the block ends, hand out no further batch, so that the streams end too."""
    try:
        yield
    finally:
        batches.stop()


def _check_error_limit(plan: Plan, stats: StatsCollector) -> None:
    limit = plan.job.errors.max
    if limit is None:
        return
    allowed = limit if isinstance(limit, int) else float(limit.rstrip("%")) / 100 * plan.num_images
    if stats.num_errors > allowed:
        raise ErrorLimitPassed(
            f"{stats.num_errors:,} of {stats.num_images:,} images failed; errors.max is {limit}. "
            f"The reasons are in {plan.files.predictions}; raise errors.max to resume"
        )
