"""The whole flow of a job, from its spec to its output folder. Read this file first.

run_job:         prove the provider → get the model → freeze the listing → refuse another job's
                 output → open the sessions and check their answers → classify
classify_shard:  listing → prefetched batches → streams of inference → records, in order
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from itertools import islice, starmap
from typing import Any

import batchclf
from batchclf.devices import Opened, open_devices, settle_provider
from batchclf.errors import (
    BatchclfError,
    DeviceLost,
    ErrorLimitPassed,
    Interrupted,
    NoImagesError,
    OutOfMemory,
    ProviderError,
    UsageError,
)
from batchclf.images.prefetch import Decoding, Load, Prefetcher, Quarantine, noted, threads
from batchclf.images.processes import open_decoding, try_alone
from batchclf.images.source import Source, open_source, require_images
from batchclf.interrupt import StopRequest
from batchclf.job import JobSpec, auto
from batchclf.machine import cpu_seconds, peak_rss_mb
from batchclf.models.resolve import Log, ResolvedModel, resolve_model
from batchclf.plan import Plan, fitting_batch_size, freeze, limited, make_loader, make_plan
from batchclf.request import Recovery, RunOptions, RunResult
from batchclf.results.files import RunFiles
from batchclf.results.lines import Done, find_done
from batchclf.results.listing import new_paths, read_listing
from batchclf.results.records import Failure, ImageRef, Pixels
from batchclf.results.state import RunState, kept_status, read_run
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import (
    RecordWriter,
    append_stats,
    discard,
    failed_refs,
    mend_stats,
    replace_failed,
)
from batchclf.resume import (
    durable_of,
    fingerprint,
    finished_summary,
    require_extendable,
    require_same_converted,
    resume,
    run_facts,
    summary_facts,
)
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.faults import is_device_lost, is_out_of_memory
from batchclf.runtime.ranking import rank
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.runtime.streams import Rank, Streams
from batchclf.sample import sample_listing

INTERVAL_S = 10.0
SYNC_S = 5.0
"""Seconds of work that a power loss can cost."""
TICK_S = 1.0
_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError, ProviderError)
"""What a lack of memory or a lost device may come as."""


class Reporter:
    """Where progress and log lines go, and what is told to whoever watches over this process.

    This one says nothing.
    """

    def log(self, text: str) -> None:
        """One line for people."""

    def begin(self, num_images: int, num_done: int) -> None:
        """Classifying begins: how many images there are, and how many have a record."""

    def update(self, num_images: int, num_errors: int) -> None:
        """How many images have a record by now, and how many of those are errors."""

    def decoding(self, worker: int, index: int | None) -> None:
        """A worker thread begins an image, by index in the listing; None: it has none."""

    def beat(self) -> None:
        """All is well, though no image is finished: one takes long, but not too long."""

    def found_guilty(self, index: int, failure: Failure) -> None:
        """An image crashes or hangs whoever decodes it."""

    def before_write(self) -> None:
        """Records are about to be written; returns when the output is surely this process's."""


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
    retried = _failed(plan, done, options.codes) if options.retry_failed else Counter[str]()
    stats = StatsCollector(cpu_seconds, peak_rss_mb, list_s=begun.list_s)
    stats.resume(done.num_ok, done.errors_by_code - retried)
    _go_on_counting(stats, recovery)
    _check_error_limit(plan, stats)
    finished = finished_summary(plan.files) if done.num_images == plan.num_images else None
    if finished is not None and not retried:
        if options.retry_failed:
            _tell_that_none_is_retried(done, options.codes, reporter.log)
        reporter.log(f"already complete: {plan.num_images:,} images in {plan.files.predictions}")
        _tell_of_new_files(plan, options, reporter.log)
        return RunResult(plan.files, finished, was_complete=True)
    opened = begun.opened
    if opened is None:
        with _explained(plan.model, plan.batch_size):
            opened = open_devices(
                job,
                plan.model,
                plan.batch_size,
                lambda: _sample(
                    job,
                    plan.source,
                    plan.model,
                    read_listing(plan.files),
                    plan.num_listed,
                    plan.quarantined,
                    reporter,
                ),
                settle(),
                reporter.log,
            )
        require_same_converted(begun.previous, done, opened)
    facts = run_facts(plan, opened, begun.fingerprint, begun.previous, done)
    with kept_status(plan.files, facts) as state:
        mend_stats(plan.files)
        classify = partial(classify_shard, plan, opened, stats=stats, reporter=reporter, stop=stop)
        if retried:
            _retry(plan, retried.keys(), classify, stats, recovery, reporter)
        else:
            _go_on(plan, begun, classify, stats, state, reporter)
        if begun.was_listed:
            _tell_of_new_files(plan, options, reporter.log)
        summary = append_stats(plan.files, "summary", stats.snapshot(), summary_facts(plan, opened))
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
    is_complete = previous is not None and previous.get("status") == "complete"
    if not is_complete:  # else nothing may be left to run, and the provider may be gone
        settle()
    source = _source(job, is_complete=is_complete)
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=reporter.log
    )
    opened = None
    if options.overwrite:
        # Nothing is thrown away before what replaces it was seen to run.
        listed = partial(_would_be_listed, source, options.limit)
        recovery = _try_suspects(job, source, model, recovery, listed(), reporter)
        opened = _open(job, options, source, model, recovery, listed, settle(), reporter)
        discard(files)
    was_listed = files.listing.exists()
    if was_listed and options.extend:  # nothing is added to another job's listing
        plan = make_plan(job, source, files, model, recovery, log=lambda text: None)
        require_extendable(plan, previous, fingerprint(plan, options.limit))
    list_s = freeze(source, files, options.limit, reporter.log, extend=options.extend)
    recovery = _try_suspects(job, source, model, recovery, read_listing(files), reporter)
    plan = make_plan(job, source, files, model, recovery, reporter.log)
    wanted = fingerprint(plan, options.limit)
    done = resume(plan, previous, wanted, reporter.log)
    return _Begun(plan, previous, wanted, done, was_listed, list_s, opened)


def _open(
    job: JobSpec,
    options: RunOptions,
    source: Source,
    model: ResolvedModel,
    recovery: Recovery,
    listed: Callable[[], Iterator[ImageRef]],
    fallback: str | None,
    reporter: Reporter,
) -> Opened:
    """Open a job's sessions before its listing is frozen; the input is only counted, or sampled."""
    num_listed = sum(1 for _ in listed())
    first, last = options.shard.bounds(num_listed)
    batch_size = min(fitting_batch_size(job, model, last - first), recovery.max_batch_size)
    with _explained(model, batch_size):
        return open_devices(
            job,
            model,
            batch_size,
            lambda: _sample(
                job, source, model, listed(), num_listed, recovery.quarantined, reporter
            ),
            fallback,
            reporter.log,
        )


def _would_be_listed(source: Source, limit: int | None) -> Iterator[ImageRef]:
    """The entries of a listing that is still to be frozen."""
    return starmap(ImageRef, enumerate(limited(source.paths(), limit)))


def _try_suspects(
    job: JobSpec,
    source: Source,
    model: ResolvedModel,
    recovery: Recovery,
    refs: Iterable[ImageRef],
    reporter: Reporter,
) -> Recovery:
    """Try alone what was being decoded when a process died or hung; the guilty are quarantined."""
    if not recovery.suspects:
        return recovery
    load = Quarantine(make_loader(job, source, model), recovery.quarantined)
    shape_HWC = (*model.preprocess.crop, 3)
    guilty: dict[int, Failure] = {}
    for ref in islice(refs, max(recovery.suspects) + 1):
        if ref.index not in recovery.suspects:
            continue
        failure = try_alone(load, ref, shape_HWC, job.loader.max_seconds)
        if failure is None:
            reporter.log(f"{os.fsdecode(ref.path)}: tried alone, does no harm")
            continue
        reporter.log(f"{os.fsdecode(ref.path)}: recorded as {failure.code}: {failure.message}")
        reporter.found_guilty(ref.index, failure)
        guilty[ref.index] = failure
    return replace(recovery, suspects=(), quarantined={**recovery.quarantined, **guilty})


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
    num_streams = len(opened.classifiers)
    num_slots = num_streams + auto(plan.job.loader.prefetch, max(2, num_streams)) + 1
    batch_shape = (plan.batch_size, *plan.model.preprocess.crop, 3)
    reporter.begin(plan.num_images, stats.num_images)
    next_interval = time.monotonic() + INTERVAL_S
    next_sync = time.monotonic() + SYNC_S
    with (
        _explained(plan.model, plan.batch_size),
        stop.drained_by_caller(),
        open_decoding(
            plan.load,
            plan.backend,
            plan.num_workers,
            num_slots=num_slots,
            batch_shape=batch_shape,
            allocate=opened.allocate,
            max_seconds=plan.job.loader.max_seconds,
            beat=reporter.beat,
        ) as decoding,
        Prefetcher(
            refs,
            # Processes mind themselves what their images do to them.
            noted(decoding, reporter.decoding) if plan.backend == "threads" else decoding,
            num_slots=num_slots,
            batch_shape=batch_shape,
        ) as batches,
        Streams(batches.next_batch, opened.classifiers, _ranking(plan), stats.add_batch) as streams,
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


def _ranking(plan: Plan) -> Rank:
    """Scores to the predictions that the job asks for."""
    return partial(
        rank,
        labels=plan.model.labels,
        top_k=plan.job.top_k,
        is_probability=plan.model.bundle.meta.scores == "probabilities",
    )


Classify = Callable[..., None]
"""classify_shard, bound to what stays the same in a run."""


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
    refs = read_listing(plan.files, plan.first + done.num_images, plan.last)
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


# ---- trying again, and stopping ------------------------------------------------------------------


def _failed(plan: Plan, done: Done, codes: frozenset[str] | None) -> Counter[str]:
    """How many records of which error `--retry-failed` would try again.

    Raises:
        UsageError: the job is not finished.
    """
    if done.num_images < plan.num_images:
        raise UsageError(
            f"--retry-failed: {done.num_images:,} of {plan.num_images:,} images have a record; "
            "finish the job first, by running it without --retry-failed"
        )
    found = done.errors_by_code
    return found if codes is None else Counter({code: found[code] for code in codes & found.keys()})


def _retry(
    plan: Plan,
    codes: Collection[str],
    classify: Classify,
    stats: StatsCollector,
    recovery: Recovery,
    reporter: Reporter,
) -> None:
    """Classify the failed images again, then put the new records in the old ones' places."""
    refs = partial(failed_refs, plan.files.predictions)
    listed = partial(read_listing, plan.files, plan.first, plan.last)
    retry = plan.files.retry
    tried = Done()
    if recovery.is_restart:  # the same command, after its process died
        tried = find_done(retry, (ref.path for ref in refs(listed(), codes)))
    stats.resume(tried.num_ok, tried.errors_by_code)
    _go_on_counting(stats, recovery)
    with RecordWriter(retry, tried.num_bytes, stats.add_write) as writer:
        classify(islice(refs(listed(), codes), tried.num_images, None), writer)
    reporter.before_write()
    replace_failed(plan.files.predictions, retry, codes)


def _go_on_counting(stats: StatsCollector, recovery: Recovery) -> None:
    """Let figures be those of the whole run, where it began in another process."""
    if recovery.beginning is not None:
        stats.started(*astuple(recovery.beginning))


def _tell_that_none_is_retried(done: Done, codes: Collection[str] | None, log: Log) -> None:
    there = ", ".join(f"{count:,} {code}" for code, count in sorted(done.errors_by_code.items()))
    which = "" if codes is None else f" with the code {' or '.join(sorted(codes))}"
    log(f"--retry-failed: no error{which}, so nothing is tried again (found: {there or 'none'})")


def _sample(
    job: JobSpec,
    source: Source,
    model: ResolvedModel,
    refs: Iterable[ImageRef],
    num_listed: int,
    quarantined: Mapping[int, Failure],
    reporter: Reporter,
) -> Pixels:
    """A sample of the images listed, watched while they are decoded as the others will be."""

    def decode(load: Load, num_workers: int) -> Decoding:
        return noted(threads(Quarantine(load, quarantined), num_workers), reporter.decoding)

    return sample_listing(job, source, model, refs, num_listed, decode=decode)


def _tell_of_new_files(plan: Plan, options: RunOptions, log: Log) -> None:
    """Say how many files appeared since the listing was frozen; --limit left files out on purpose.

    With shards, each would have to list the whole input.
    """
    if options.limit is not None or options.shard.count > 1:
        return
    num_new = sum(1 for _ in new_paths(plan.files, plan.source.paths()))
    if num_new:
        log(
            f"input: {num_new:,} files appeared since it was listed; they are not part of this "
            "job; --extend adds them"
        )


@contextmanager
def _explained(model: ResolvedModel, batch_size: int) -> Iterator[None]:
    """ONNX Runtime's errors for a lack of memory and for a lost device, as what they are.

    Raises:
        OutOfMemory: memory did not suffice for a batch.
        DeviceLost: this process cannot use its device any more.
    """
    try:
        yield
    except _FAILURES as error:
        if is_out_of_memory(error):
            can_be_smaller = batch_size > 1 and model.bundle.meta.fixed_batch is None
            raise OutOfMemory(batch_size, str(error), can_be_smaller=can_be_smaller) from error
        if is_device_lost(error):
            raise DeviceLost(str(error)) from error
        raise


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
