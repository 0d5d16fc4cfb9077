"""A run made ready: its sessions opened and proven, its figures begun, its record written up."""

from collections import Counter
from dataclasses import astuple, dataclass, replace

from batchclf.images.lists import NUM_TRIED
from batchclf.models.variants import needed_variant, resolve_variant
from batchclf.results.listing import Listing
from batchclf.results.run_record import RunRecord
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import sync_records
from batchclf.run.blame import explained, try_suspects
from batchclf.run.classify import Work, check_error_limit
from batchclf.run.crew import Order
from batchclf.run.decide import Append, Replace
from batchclf.run.facts import finished, gone_on, is_same_retry, record_of, retried
from batchclf.run.feeders import Feeders, shares_of
from batchclf.run.identity import fingerprint_of
from batchclf.run.landmarks import Witness
from batchclf.run.look import Found
from batchclf.run.plan import Plan, Task, make_plan
from batchclf.run.recovery import Recovery
from batchclf.run.request import Run
from batchclf.run.resume import converted_digest, require_same_converted
from batchclf.sessions.open import Wanted, conversion_of, may_need_sample, open_devices
from batchclf.sessions.sample import Sample, evenly_spread
from batchclf.system.machine import cpu_seconds, peak_rss_mb


@dataclass(frozen=True, slots=True)
class Ready:
    """What a run begins with."""

    record: RunRecord
    """What run.json is to say."""
    stats: StatsCollector
    work: Work | None
    """None: all records are there, and only the last word is missing."""
    previous: RunRecord | None
    goes_on_retrying: bool = False
    """Whether the new records of failed images that are there are of this very attempt."""

    def close(self) -> None:
        """End what was opened for it."""
        if self.work is not None:
            self.work.close()


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that has claimed its output."""

    run: Run
    listing: Listing
    ready: Ready


def make_ready(found: Found, listing: Listing, todo: Append | Replace) -> Ready:
    """Open what the job runs on, for what is to be done.

    Raises:
        ErrorLimitPassed: the errors that are there are too many.
        BatchclfError: the provider, the model or the sample does not do.
    """
    run = found.run
    num_images = found.num_images(listing)
    stats = StatsCollector(cpu_seconds, peak_rss_mb)
    stats.resume(todo.done.num_ok, todo.done.errors_by_code - _codes(todo))
    go_on_counting(stats, run.recovery)
    check_error_limit(run.job, stats, num_images)
    previous = found.record
    if previous is not None and todo.done.num_images == num_images and not _codes(todo):
        return Ready(finished(previous, todo.done), stats, None, previous)
    if isinstance(todo, Replace):  # run.json will say that all records are durable
        run.reporter.before_write()
        sync_records(run.files.predictions, todo.done.num_bytes)
    task = Task(run.job, found.store().source, found.model, num_images)
    run = try_suspects(run, task, listing.refs())
    plan = make_plan(run, task)
    work = _open(found, plan, listing, stats)
    try:
        return _recorded(found, listing, todo, work)
    except BaseException:
        work.close()
        raise


def _recorded(found: Found, listing: Listing, todo: Append | Replace, work: Work) -> Ready:
    """What run.json is to say of a run whose sessions are open.

    Raises:
        ResumeRefused: the records that are there are of another converted model.
    """
    previous, recovery = found.record, found.run.recovery
    require_same_converted(previous, todo.done, work.opened.bundle)
    num_images = work.plan.task.num_images
    record = record_of(work, fingerprint_of(found.identity, listing, num_images), listing)
    if isinstance(todo, Replace):
        assert previous is not None, "there are records"
        record = retried(record, previous, todo.done, todo.codes)
        is_same = recovery.beginning is not None or is_same_retry(previous, record)
        return Ready(record, work.stats, work, previous, goes_on_retrying=is_same)
    if previous is not None:
        record = gone_on(record, previous, todo.done)
    return Ready(record, work.stats, work, previous)


def go_on_counting(stats: StatsCollector, recovery: Recovery) -> None:
    """Let figures be those of the whole run, where it began in another process."""
    if recovery.beginning is not None:
        stats.started(*astuple(recovery.beginning))


def _codes(todo: Append | Replace) -> Counter[str]:
    return todo.codes if isinstance(todo, Replace) else Counter()


def _open(found: Found, plan: Plan, listing: Listing, stats: StatsCollector) -> Work:
    """Open a job's sessions; the images of a sample are watched while they are decoded.

    Those of several GPUs are opened in processes of their own.
    """
    run, task = found.run, plan.task
    refs = evenly_spread(listing.refs(), listing.num_images)
    wanted = Wanted(
        job=task.job,
        model=task.model,
        batch_size=plan.batch_size,
        sample=Sample(task.job, plan.loader, refs, run.reporter.watch),
        log=run.reporter.log,
        used=converted_digest(found.record),
    )
    if run.hire is not None:
        crew = run.hire(_order(found, wanted, listing, task.num_images))
        stats.count_members(crew.figures)
        return Work(plan, crew.opened, stats, run.reporter, run.stop, crew=crew)
    fallback = found.settle()
    if fallback is None and (shares := shares_of(plan, refs, wanted.used)):
        feeders = Feeders(shares, run.reporter)
        return Work(plan, feeders.opened, stats, run.reporter, run.stop, feeders)
    with explained(task, plan.batch_size):
        opened = open_devices(wanted, fallback)
    return Work(plan, opened, stats, run.reporter, run.stop)


def _order(found: Found, wanted: Wanted, listing: Listing, num_images: int) -> Order:
    """What a crew is told; a model at another precision is made here, once for all."""
    run, job, bundle, variant = found.run, wanted.job, wanted.model.bundle, None
    if (precision := needed_variant(job.provider.name, job.precision)) is not None:
        variant = (precision, resolve_variant(bundle, precision, conversion_of(wanted)))
    return Order(
        job=job,
        model=wanted.model,
        variant=variant,
        listing=replace(listing, path=run.files.listing),
        num_images=num_images,
        first=tuple(listing.entries(0, NUM_TRIED)),
        sample=tuple(wanted.sample.listed) if may_need_sample(job) else (),
        files=run.files,
        log=run.reporter.log,
        beat=run.reporter.beat,
        stop=run.stop,
        witness=Witness(found.store(), listing, run.files),
    )
