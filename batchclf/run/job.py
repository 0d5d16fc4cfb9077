"""The whole flow of a job, from its spec to its output folder. Read this file first.

run_job:         prove the provider → get the model → freeze the listing → refuse another job's
                 output → open the sessions and check their answers → classify
classify_shard:  listing → prefetched batches → streams of inference → records, in order
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from itertools import starmap
from typing import Any

import batchclf
from batchclf.errors import (
    BatchclfError,
    EnvironmentFailed,
    ErrorLimitPassed,
    Interrupted,
    NoImagesError,
    UsageError,
)
from batchclf.images.prefetch import Decoding, Load, Prefetcher, Quarantine, noted, threads
from batchclf.images.processes import open_decoding
from batchclf.images.source import Source, open_source
from batchclf.images.store import list_paths, require_images
from batchclf.models.resolve import Log, resolve_model
from batchclf.results.files import RunFiles, remove
from batchclf.results.lines import Done
from batchclf.results.listing import count_listing, new_paths, read_listing, serves_others
from batchclf.results.records import ImageRef, Pixels
from batchclf.results.run_record import RunState, kept_status, read_run
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import (
    RecordWriter,
    append_stats,
    discard,
    mend_stats,
    sync_records,
)
from batchclf.run.plan import Plan, freeze, limited, make_plan
from batchclf.run.recovery import explained, go_on_counting, try_suspects
from batchclf.run.reporter import Reporter
from batchclf.run.request import Recovery, RunOptions, RunResult
from batchclf.run.resume import (
    converted_digest,
    durable_of,
    fingerprint,
    finished_summary,
    is_finished,
    is_same_retry,
    require_extendable,
    require_same_converted,
    require_same_listing,
    resume,
    run_facts,
    summary_facts,
)
from batchclf.run.retry import Classify, retry, retryable, tell_that_none_is_retried
from batchclf.runtime.classifier import WithinMemory, open_reference
from batchclf.runtime.ranking import rank
from batchclf.runtime.streams import Rank, Streams
from batchclf.sessions.open import Opened, open_devices, settle_provider
from batchclf.sessions.sample import sample_listing
from batchclf.spec.job import JobSpec, auto
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_seconds, peak_rss_mb

INTERVAL_S = 10.0
SYNC_S = 5.0
"""Seconds between syncs; a power loss costs as much work, or a batch that takes longer."""
TICK_S = 1.0


def run_job(
    job: JobSpec,
    options: RunOptions,
    *,
    reporter: Reporter,
    stop: StopRequest,
    recovery: Recovery | None = None,
) -> RunResult:
    """Run a job to its end, or resume it. The caller holds the output (results/lock.py).

    Raises:
        BatchclfError: with the exit code and what to do; the output stays resumable.
    """
    recovery = recovery or Recovery()
    settle = cache(partial(settle_provider, job, reporter.log))
    begun = _begin(job, options, recovery, settle, reporter)
    plan, done = begun.plan, begun.done
    retried = retryable(plan, done, options.codes) if options.retry_failed else Counter[str]()
    stats = StatsCollector(cpu_seconds, peak_rss_mb, list_s=begun.list_s)
    stats.resume(done.num_ok, done.errors_by_code - retried)
    go_on_counting(stats, recovery)
    _check_error_limit(plan, stats)
    finished = finished_summary(plan.files) if done.num_images == plan.num_images else None
    if finished is not None and not retried:
        if options.retry_failed:
            tell_that_none_is_retried(done, options.codes, reporter.log)
        reporter.log(f"already complete: {plan.num_images:,} images in {plan.files.predictions}")
        _tell_of_new_files(plan, options, reporter.log)
        return RunResult(plan.files, finished, was_complete=True)
    opened = begun.opened
    if opened is None:
        used = converted_digest(begun.previous)
        opened = _open(plan, partial(read_listing, plan.files), settle(), reporter, used)
        require_same_converted(begun.previous, done, opened)
    facts = run_facts(plan, opened, begun.fingerprint, begun.previous, done, retried.keys())
    reporter.before_write()
    if retried:
        sync_records(plan.files.predictions)
    with kept_status(plan.files, facts) as state:
        mend_stats(plan.files)
        classify = partial(classify_shard, plan, opened, stats=stats, reporter=reporter, stop=stop)
        if retried:
            is_resumed = recovery.beginning is not None or is_same_retry(begun.previous, facts)
            retry(
                plan,
                retried.keys(),
                classify,
                stats,
                state,
                recovery,
                reporter,
                is_resumed=is_resumed,
            )
        else:
            _go_on(plan, begun, classify, stats, state, reporter)
        summary = append_stats(plan.files, "summary", stats.snapshot(), summary_facts(plan, opened))
    if begun.was_listed:
        _tell_of_new_files(plan, options, reporter.log)
    return RunResult(plan.files, summary, was_complete=False)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A job whose output was found to be its own: what is to be done, and what is done."""

    plan: Plan
    previous: Mapping[str, Any] | None
    """What run.json said."""
    fingerprint: Mapping[str, object]
    done: Done
    was_listed: bool
    list_s: float
    opened: Opened | None


def _begin(
    job: JobSpec,
    options: RunOptions,
    recovery: Recovery,
    settle: Callable[[], str | None],
    reporter: Reporter,
) -> _Begun:
    files = RunFiles(job.output, options.shard)
    previous = None if options.overwrite else read_run(files)
    is_complete = is_finished(previous)
    if not is_complete:  # else nothing may be left to run, and the provider may be gone
        settle()
    source = _source(job, is_complete=is_complete)
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=reporter.log
    )
    planned = partial(make_plan, job, source, files)
    opened = None
    if options.overwrite:
        # Nothing is thrown away before what replaces it was seen to run.
        if is_shared := serves_others(files):
            reporter.log("--overwrite: other shards use the listing, so it stays as it is")

        def listed() -> Iterator[ImageRef]:
            """The entries that the new listing will have."""
            if is_shared:
                return read_listing(files)
            return _would_be_listed(source, options.limit)

        recovery = try_suspects(job, source, model, recovery, listed(), reporter)
        plan = planned(sum(1 for _ in listed()), model, recovery, _silent)
        require_same_listing(plan, fingerprint(plan, options.limit))
        opened = _open(plan, listed, settle(), reporter)
        reporter.before_write()
        discard(files)
    was_listed = files.listing.exists()
    if was_listed and options.extend:  # nothing is added to another job's listing
        plan = planned(count_listing(files), model, recovery, _silent)
        require_extendable(plan, previous, fingerprint(plan, options.limit))
    reporter.before_write()
    list_s, num_left_out = freeze(source, files, options.limit, reporter.log, extend=options.extend)
    recovery = try_suspects(job, source, model, recovery, read_listing(files), reporter)
    plan = planned(count_listing(files), model, recovery, reporter.log)
    plan = replace(plan, num_left_out=num_left_out)
    wanted = fingerprint(plan, options.limit)
    done = resume(plan, previous, wanted, reporter.log)
    return _Begun(plan, previous, wanted, done, was_listed, list_s, opened)


def _open(
    plan: Plan,
    listed: Callable[[], Iterator[ImageRef]],
    fallback: str | None,
    reporter: Reporter,
    used: str | None = None,
) -> Opened:
    """Open a job's sessions; a sample is of the images `listed`, watched while decoded.

    `used`: digest of the converted model that made the records so far.
    """

    def decode(load: Load, num_workers: int) -> Decoding:
        return noted(threads(Quarantine(load, plan.quarantined), num_workers), reporter.decoding)

    def sample() -> Pixels:
        return sample_listing(
            plan.job, plan.source, plan.model, listed(), plan.num_listed, decode=decode
        )

    with explained(plan.model, plan.batch_size):
        return open_devices(
            plan.job, plan.model, plan.batch_size, sample, fallback, reporter.log, used
        )


def _silent(text: str) -> None:
    """For a plan that is made again."""


def _would_be_listed(source: Source, limit: int | None) -> Iterator[ImageRef]:
    """The entries of a listing that is still to be frozen."""
    return starmap(ImageRef, enumerate(limited(list_paths(source), limit)))


def _source(job: JobSpec, *, is_complete: bool) -> Source:
    """The job's input; a complete job no longer needs it to be there."""
    try:
        source = open_source(job.input, allow_outside_links=job.loader.allow_outside_links)
        require_images(source)
    except NoImagesError:
        if not is_complete:
            raise
        return Source(job.input, "folder", os.fsencode(job.input), confined=True)
    return source


def classify_shard(
    plan: Plan,
    opened: Opened,
    refs: Iterator[ImageRef],
    writer: RecordWriter,
    *,
    stats: StatsCollector,
    reporter: Reporter,
    stop: StopRequest,
    synced: Callable[[], None] = lambda: None,
) -> None:
    """Classify `refs`, what is left of a shard, writing records in the order of the listing.

    `synced` is called whenever all that was written survives a power loss.

    Raises:
        ErrorLimitPassed: after the batch that passed `errors.max`.
        Interrupted: after a signal, with everything in flight committed.
        OutOfMemory: for a batch of this size.
        DeviceLost: the device does not answer any more; another process may find that it does.
    """
    classifiers = [WithinMemory(one, reporter.log) for one in opened.classifiers]
    num_streams = len(classifiers)
    reporter.begin(plan.num_images, stats.num_images)
    next_interval = time.monotonic() + INTERVAL_S
    next_sync = time.monotonic() + SYNC_S
    with (
        explained(plan.model, plan.batch_size),
        stop.drained_by_caller(),
        _prefetched(plan, opened, refs, reporter) as (decoding, batches),
        Streams(batches.next_batch, classifiers, _ranking(plan), stats.add_batch) as streams,
        _stopping(batches),
    ):
        stats.start(time.perf_counter() - batchclf.STARTED, num_streams)
        stats.count_cpu(decoding.cpu_seconds)
        for result in streams.results(TICK_S):
            reporter.before_write()
            if result is not None:
                batch, records = result
                writer.write(records)
                stats.add_records(records)
                batches.release(batch)
                _check_error_limit(plan, stats)
            if stop.signal_number is not None:
                batches.stop()
            if time.monotonic() >= next_sync:
                writer.sync()
                synced()
                next_sync = time.monotonic() + SYNC_S
            if time.monotonic() >= next_interval:
                next_interval += INTERVAL_S
                append_stats(plan.files, "interval", stats.snapshot(), {})
            reporter.update(stats.num_images, stats.num_errors)
    if stats.num_images < plan.num_images:
        stop.raise_if_requested()
        raise BatchclfError(  # cannot happen; an incomplete output must never exit 0
            f"{stats.num_images:,} of {plan.num_images:,} records written; run again to resume"
        )


@contextmanager
def _prefetched(
    plan: Plan, opened: Opened, refs: Iterator[ImageRef], reporter: Reporter
) -> Iterator[tuple[Decoding, Prefetcher]]:
    """Batches of `refs`, and what decodes them."""
    num_streams = len(opened.classifiers)
    num_slots = num_streams + auto(plan.job.loader.prefetch, max(2, num_streams)) + 1
    batch_shape = (plan.batch_size, *plan.model.preprocess.crop, 3)
    with open_decoding(
        plan.load,
        plan.backend,
        plan.num_workers,
        num_slots=num_slots,
        batch_shape=batch_shape,
        allocate=opened.allocate,
        max_seconds=plan.job.loader.max_seconds,
        beat=reporter.beat,
    ) as decoding:
        # Processes mind themselves what their images do to them.
        watched = noted(decoding, reporter.decoding) if plan.backend == "threads" else decoding
        with Prefetcher(refs, watched, num_slots=num_slots, batch_shape=batch_shape) as batches:
            yield decoding, batches


def _ranking(plan: Plan) -> Rank:
    """Scores to the predictions that the job asks for."""
    return partial(
        rank,
        labels=plan.model.labels,
        top_k=plan.job.top_k,
        is_probability=plan.model.bundle.meta.scores == "probabilities",
    )


def _go_on(
    plan: Plan,
    begun: _Begun,
    classify: Classify,
    stats: StatsCollector,
    state: RunState,
    reporter: Reporter,
) -> None:
    """Classify what has no record yet, noting what is durable."""
    done = begun.done
    durable = durable_of(begun.previous)
    remove(plan.files.retry)  # of an attempt that was given up
    refs = read_listing(plan.files, plan.first + done.num_images, plan.last)
    reporter.before_write()
    with RecordWriter(
        plan.files.predictions, done.num_bytes, stats.add_write, durable.num_bytes
    ) as writer:

        def synced() -> None:
            state.note_durable(writer.num_bytes, stats.num_images)

        def commit() -> None:
            writer.sync()
            reporter.before_write()
            synced()

        commit()
        try:
            classify(refs, writer, synced=synced)
        except (Interrupted, ErrorLimitPassed):
            commit()
            raise
        commit()


# ---- telling, and stopping -----------------------------------------------------------------------


def _tell_of_new_files(plan: Plan, options: RunOptions, log: Log) -> None:
    """Say how many files appeared since the listing was frozen; --limit left files out on purpose.

    With shards, each would have to list the whole input.
    """
    if options.limit is not None or options.shard.count > 1:
        return
    try:
        num_new = sum(1 for _ in new_paths(plan.files, list_paths(plan.source)))
    except (EnvironmentFailed, UsageError) as error:  # a finished job stays finished
        log(f"whether files appeared since the input was listed cannot be told: {error}")
        return
    if num_new:
        log(
            f"input: {num_new:,} files appeared since it was listed; they are not part of this "
            "job; --extend adds them"
        )


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
    allowed: int | Fraction = 0
    if isinstance(limit, int):
        allowed = limit
    else:  # not as a float: 29% of 100 would be fewer than 29
        allowed = Fraction(limit.rstrip("%")) / 100 * plan.num_images
    if stats.num_errors > allowed:
        raise ErrorLimitPassed(
            f"{stats.num_errors:,} of {stats.num_images:,} images failed; errors.max is {limit}. "
            f"The reasons are in {plan.files.predictions}; raise errors.max to resume"
        )
