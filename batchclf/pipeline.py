"""The whole flow of a job, from its spec to its output folder. Read this file first.

run_job:         freeze the listing → get the model → refuse another job's output → classify
classify_shard:  listing → prefetched batches → streams of inference → records, in order
"""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

import orjson

from batchclf import __version__
from batchclf.errors import (
    BatchclfError,
    ErrorLimitPassed,
    Interrupted,
    ResumeRefused,
)
from batchclf.images.decode import Decoder
from batchclf.images.prefetch import Load, Prefetcher
from batchclf.images.source import Source, open_source, read_image_file, require_images
from batchclf.interrupt import StopRequest
from batchclf.job import JobSpec
from batchclf.machine import cpu_seconds, peak_rss_mb, usable_cores
from batchclf.models.bundle import digest_of
from batchclf.models.resolve import ResolvedModel, confirm_batch_size, resolve_model
from batchclf.results.records import (
    ActiveProvider,
    Failure,
    ImageRef,
    Loaded,
    Pixels,
    Shard,
)
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import (
    Done,
    RecordWriter,
    RunFiles,
    append_stats,
    count_listing,
    discard,
    find_done,
    freeze_listing,
    only_writer,
    read_listing,
    read_run,
    write_run,
)
from batchclf.runtime.classifier import OnnxClassifier, open_classifier, open_reference
from batchclf.runtime.providers import installed_flavours, require_precision, require_provider
from batchclf.runtime.ranking import rank
from batchclf.runtime.streams import Streams
from batchclf.validate import require_separate_output

INTERVAL_S = 10.0
TICK_S = 1.0
MAX_AUTO_STREAMS = 8


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
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished job: its files and its summary line."""

    files: RunFiles
    summary: Mapping[str, Any]
    was_complete: bool
    """Whether an earlier run had already finished it."""


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


def run_job(
    job: JobSpec, options: RunOptions, *, reporter: Reporter, stop: StopRequest
) -> RunResult:
    """Run a job to its end, or resume it.

    Raises:
        BatchclfError: with the exit code and what to do; the output stays resumable.
    """
    started = time.perf_counter()
    require_separate_output(job)
    require_precision(job.provider.name, job.precision)
    require_provider(job.provider.name)
    files = RunFiles(job.output, options.shard)
    with only_writer(files):
        if options.overwrite:
            discard(files)
        source = open_source(job.input, allow_outside_links=job.loader.allow_outside_links)
        require_images(source)
        model, classifiers = _open_model(job, reporter)
        list_s = _freeze(source, files, options.limit, reporter)
        plan = _plan(job, source, files, model, classifiers, reporter)
        fingerprint = _fingerprint(plan, options.limit)
        previous = read_run(files)
        done = _resume(plan, previous, fingerprint, reporter)
        run = _run_facts(plan, fingerprint)
        if previous is not None:  # listed then, not now
            run["num_left_out"] = previous.get("num_left_out")
        if done.num_images == plan.num_images and (summary := _finished_summary(files)):
            reporter.log(f"already complete: {plan.num_images:,} images in {files.predictions}")
            return RunResult(files, summary, was_complete=True)
        stats = StatsCollector(
            cpu_seconds=cpu_seconds,
            peak_rss_mb=peak_rss_mb,
            startup_s=time.perf_counter() - started,
            list_s=list_s,
        )
        stats.resume(done.num_ok, done.errors_by_code)
        with _status(files, run):
            classify_shard(plan, done, stats, reporter=reporter, stop=stop)
            summary = append_stats(files, "summary", stats.snapshot(), _summary_facts(plan))
        return RunResult(files, summary, was_complete=False)


def classify_shard(
    plan: Plan, done: Done, stats: StatsCollector, *, reporter: Reporter, stop: StopRequest
) -> None:
    """Classify what is left of a shard, writing records in the order of the listing.

    Raises:
        ErrorLimitPassed: after the batch that passed `errors.max`.
        Interrupted: after a signal, with everything in flight committed.
    """
    refs = read_listing(plan.files, plan.first + done.num_images, plan.last)
    ranking = partial(
        rank,
        labels=plan.model.labels,
        top_k=plan.job.top_k,
        is_probability=plan.model.bundle.meta.scores == "probabilities",
    )
    reporter.begin(plan.num_images, done.num_images)
    next_interval = time.monotonic() + INTERVAL_S
    with (
        stop.drained_by_caller(),
        RecordWriter(plan.files.predictions, done) as writer,
        Prefetcher(
            refs,
            _loader(plan),
            batch_size=plan.batch_size,
            image_shape=(*plan.model.preprocess.crop, 3),
            num_slots=plan.num_slots,
            num_workers=plan.num_workers,
        ) as batches,
        Streams(batches.next_batch, plan.classifiers, ranking, stats.add_batch) as streams,
        _stopping(batches),
    ):
        for result in streams.results(TICK_S):
            if result is not None:
                batch, records = result
                write_started = time.perf_counter()
                writer.write(records)
                stats.add_records(records, time.perf_counter() - write_started)
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


# ---- planning ------------------------------------------------------------------------------------


def _open_model(job: JobSpec, reporter: Reporter) -> tuple[ResolvedModel, list[OnnxClassifier]]:
    """The model, and a classifier per stream.

    Single-threaded streams share one session, each `Run` on its caller's thread; with more threads
    a session's pool serves one stream.
    """
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=reporter.log
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


def _plan(
    job: JobSpec,
    source: Source,
    files: RunFiles,
    model: ResolvedModel,
    classifiers: Sequence[OnnxClassifier],
    reporter: Reporter,
) -> Plan:
    first, last = files.shard.bounds(count_listing(files))
    fixed = model.bundle.meta.fixed_batch
    if fixed is not None and fixed != job.batch_size:
        reporter.log(f"batch_size: the model takes only batches of {fixed}, not {job.batch_size}")
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


def _freeze(source: Source, files: RunFiles, limit: int | None, reporter: Reporter) -> float:
    """List the input once per job; returns the seconds it took."""
    started = time.perf_counter()
    if files.listing.exists():
        return 0.0
    freeze_listing(files, _limited(source.paths(), limit))
    if source.num_left_out:
        reporter.log(f"input: left out {source.num_left_out:,} hidden or repeated entries")
    return time.perf_counter() - started


def _limited(paths: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        if limit is not None and number >= limit:
            return
        yield path


def _loader(plan: Plan) -> Load:
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


# ---- resuming ------------------------------------------------------------------------------------


def _fingerprint(plan: Plan, limit: int | None) -> dict[str, object]:
    """What the records depend on; provider, batch size and workers are free to change."""
    job = plan.job
    exif = bool(job.model.preprocess and job.model.preprocess.exif_transpose)
    return {
        "model": plan.model.bundle.digest,
        "preprocess": asdict(plan.model.preprocess)
        | {
            "exif_transpose": exif,
            "decode": job.loader.decode,
            "max_pixels": job.loader.max_pixels,
        },
        "labels": digest_of(plan.model.labels),
        "top_k": job.top_k,
        "precision": job.precision,
        "input": str(job.input),
        "limit": limit,
        "num_images": plan.num_images,
    }


def _resume(
    plan: Plan,
    previous: Mapping[str, Any] | None,
    fingerprint: Mapping[str, object],
    reporter: Reporter,
) -> Done:
    """What of this very job is already written.

    Raises:
        ResumeRefused: the folder holds another job's records.
    """
    if previous is None:
        if plan.files.predictions.exists():
            raise ResumeRefused(
                f"output: {plan.files.predictions} is there, but no readable {plan.files.run.name} "
                "says which job wrote it; give another output, or --overwrite"
            )
        return Done()
    # Through JSON and back, as the previous fingerprint went.
    current = orjson.loads(orjson.dumps(fingerprint))
    before = previous.get("fingerprint", {})
    changed = [
        f"  {key}: was {before.get(key)!r}, is {value!r}"
        for key, value in current.items()
        if before.get(key) != value
    ]
    if changed:
        raise ResumeRefused(
            f"output: {plan.files.folder} holds results of a job that differs:\n"
            + "\n".join(changed)
            + "\n  Give another output, or --overwrite to start anew."
        )
    paths = (ref.path for ref in read_listing(plan.files, plan.first, plan.last))
    done = find_done(plan.files.predictions, paths)
    if 0 < done.num_images < plan.num_images:
        reporter.log(f"resuming after {done.num_images:,} of {plan.num_images:,} images")
    return done


def _finished_summary(files: RunFiles) -> dict[str, Any] | None:
    """The last summary line of a job that run.json calls complete."""
    run = read_run(files)
    if run is None or run.get("status") != "complete" or not files.stats.exists():
        return None
    with files.stats.open("rb") as lines:
        summaries = [line for line in lines if line.startswith(b'{"type":"summary"')]
    return orjson.loads(summaries[-1]) if summaries else None


@contextmanager
def _status(files: RunFiles, run: dict[str, object]) -> Iterator[None]:
    """Keep run.json's status true: running, then complete, interrupted or failed."""
    write_run(files, run | {"status": "running"})
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        ending = {
            "status": "interrupted" if stopped else "failed",
            "error": str(error) or type(error).__name__,
            "ended_at": _now(),
        }
        try:
            write_run(files, run | ending)
        except BatchclfError as unwritable:  # the disk that failed the job fails this as well
            error.add_note(str(unwritable))
        raise
    write_run(files, run | {"status": "complete", "ended_at": _now()})


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


# ---- facts ---------------------------------------------------------------------------------------


def _run_facts(plan: Plan, fingerprint: Mapping[str, object]) -> dict[str, object]:
    return {
        "job": plan.job.model_dump(mode="json"),
        "fingerprint": dict(fingerprint),
        "started_at": _now(),
        "num_images": plan.num_images,
        "num_left_out": plan.source.num_left_out,
        "model": {"name": plan.model.bundle.meta.name, **plan.model.bundle.meta.source},
        "num_streams": len(plan.classifiers),
        "num_workers": plan.num_workers,
        "num_slots": plan.num_slots,
        **_summary_facts(plan),
    }


def _summary_facts(plan: Plan) -> dict[str, object]:
    return {
        "batch_size": plan.batch_size,
        "provider": asdict(plan.provider),
        "precision": plan.job.precision,
        "decode": plan.job.loader.decode,
        "versions": {
            "batchclf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow")},
            **installed_flavours(),
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
