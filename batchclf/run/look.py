"""What a job's output holds and whose it is; and its listing, or a draft of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

from batchclf.images.lists import NUM_TRIED
from batchclf.images.resize import require_pillow
from batchclf.images.source import source_of
from batchclf.images.store import Store, open_input, open_store
from batchclf.models.resolve import Log, ResolvedModel, resolve_model
from batchclf.results.identity import Identity
from batchclf.results.listing import FileIdentity, Listing, drafted, file_of, open_listing
from batchclf.results.run_record import RunRecord, read_run
from batchclf.results.writer import remove_leftovers
from batchclf.run.identity import (
    identity_of,
    is_larger,
    others_of,
    require_same_job,
    require_same_listing,
)
from batchclf.run.reporter import Reporter
from batchclf.run.request import Run
from batchclf.run.resume import require_told
from batchclf.runtime.classifier import open_reference
from batchclf.sessions.open import settle_job
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest


@dataclass(frozen=True, slots=True)
class Found:
    """A job's model, and what its output holds, which was found to be its own."""

    run: Run
    model: ResolvedModel
    identity: Identity
    record: RunRecord | None
    """What run.json said; None also with --overwrite."""
    listing: Listing | None
    """The one in its place, unless --overwrite throws it away."""
    thrown_away: FileIdentity | None
    """The file of a listing that --overwrite throws away."""
    others: Mapping[str, RunRecord]
    """Run records of other shards, by the names of their files."""
    settle: Callable[[], str | None]
    """Prove the provider, once: why the CPU takes its place, where the job allows that."""
    store: Callable[[], Store]
    """Open the input, once; a finished job does not need it to be there.

    Raises:
        NoImagesError: it holds no image, or is not there.
    """

    @property
    def records(self) -> Mapping[str, RunRecord]:
        """All run records of the job in its output, by the names of their files."""
        own = {} if self.record is None else {self.run.files.run.name: self.record}
        return {**own, **self.others}

    def bounds(self, listing: Listing) -> tuple[int, int]:
        """The first image of this shard, and the first behind it."""
        return self.run.options.shard.bounds(listing.num_images)

    def num_images(self, listing: Listing) -> int:
        """The images of this shard."""
        first, last = self.bounds(listing)
        return last - first


def look(run: Run) -> Found:
    """Resolve the model, and refuse an output that holds anything of another job.

    Raises:
        ResumeRefused: naming the file and what differs.
        ProviderError: the provider does not work here, and there may be work for it.
        UsageError: exact pixels are not to be had from what is installed as Pillow.
        BatchclfError: the model cannot be had, a file cannot be read.
    """
    job, files, options = run.job, run.files, run.options
    record = None if options.overwrite else read_run(files)
    settle = cache(partial(settle_job, job, run.reporter.log))
    store = cache(partial(_open_store, run))
    if record is None or not record.is_finished:  # else they may be gone
        if run.hire is None:
            require_pillow(job.loader.decode)
            settle()
        store()
    found = _found(run, _model(job, run.reporter.log), record, settle, store)
    _require_own(found)
    run.reporter.before_write()
    remove_leftovers(files, is_complete=record is not None and record.status == "complete")
    return found


def num_recorded(job: JobSpec, options: RunOptions, log: Log) -> int:
    """How many images have a record that a run would keep, and surely so; nothing is changed.

    Raises:
        BatchclfError: as `look`, but for what concerns the provider or the input.
    """
    run = Run(job, options, Reporter(), StopRequest())
    record = None if options.overwrite else read_run(run.files)
    found = _found(run, _model(job, log), record, lambda: None, partial(_open_store, run))
    _require_own(found)
    if record is not None:
        return record.num_images if record.status == "complete" else record.durable.num_images
    if not options.overwrite:
        require_told(run.files)
    return 0


def _model(job: JobSpec, log: Log) -> ResolvedModel:
    return resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )


def _found(
    run: Run,
    model: ResolvedModel,
    record: RunRecord | None,
    settle: Callable[[], str | None],
    store: Callable[[], Store],
) -> Found:
    """What is there, whosever it is."""
    files, options = run.files, run.options
    others = others_of(files, starts_anew=options.overwrite)
    is_thrown_away = options.overwrite and not others
    listing = None if is_thrown_away else open_listing(files)
    if options.overwrite and listing is not None:
        run.reporter.log("--overwrite: other shards use the listing, so it stays as it is")
    identity = identity_of(run.job, model, options.limit)
    if record is not None:  # the listing stays as it is, with another setting as well
        links = record.fingerprint.allow_outside_links
        identity = replace(identity, allow_outside_links=links)
    return Found(
        run=run,
        model=model,
        identity=identity,
        record=record,
        listing=listing,
        thrown_away=file_of(files) if is_thrown_away else None,
        others=others,
        settle=settle,
        store=store,
    )


def _open_store(run: Run) -> Store:
    """Open a job's input, as far as it is to be listed or to be read as it was."""
    listing = None if run.options.overwrite else open_listing(run.files)
    if listing is None:
        return open_input(run.job)
    store = open_store(source_of(run.job))
    first = list(listing.entries(0, NUM_TRIED))
    store.require_listed(first)
    if not run.options.extend:  # archives may have grown: what was listed before, may be done
        store.require_unchanged(first)
    return store


def _require_own(found: Found) -> None:
    """Refuse whatever is of another job: the listing, the shard's own records, other shards'."""
    files, listing, identity = found.run.files, found.listing, found.identity
    if _grows(found):
        assert listing is not None
        identity = replace(identity, limit=listing.job.limit)
    if listing is not None:
        require_same_job(files, identity, {files.listing.name: listing.job})
        require_same_listing(files, listing, found.records)
    for name, record in found.records.items():
        was: Identity = record.fingerprint
        if listing is not None:  # it may have been extended by a run that died before it said so
            was = replace(was, limit=identity.limit)
        require_same_job(files, identity, {name: was})


def _grows(found: Found) -> bool:
    """Whether --limit now lets the whole job have more images than its listing was made with."""
    if found.listing is None or found.others or found.run.options.shard.count > 1:
        return False
    return is_larger(found.run.options.limit, found.listing.job.limit)


@contextmanager
def listed(found: Found) -> Iterator[Listing]:
    """The job's listing: the one in its place, or a draft of a new or an extended one.

    Raises:
        NoImagesError: an input that has to be listed holds no image, or is not there.
        EnvironmentFailed: the input cannot be listed, or the draft not be written.
    """
    run, listing = found.run, found.listing
    is_extended = run.options.extend or _grows(found)
    if listing is not None and not is_extended:
        yield listing
        return
    store = found.store()
    if listing is not None:
        store.require_images()
    entries = store.entries(run.reporter.log)
    run.reporter.before_write()
    limit = run.options.limit
    if listing is not None and found.record is not None:
        told = [one for one in listing.extends if one == found.record.fingerprint.listing]
        listing = replace(listing, extends=tuple(told))
    with drafted(run.files, found.identity, entries, limit=limit, extends=listing) as draft:
        require_same_listing(run.files, draft, found.records)
        if listing is not None:
            num_new = draft.num_images - listing.num_images
            what = "--extend" if run.options.extend else "--limit"
            run.reporter.log(f"{what}: {num_new:,} new images in the listing")
        for remark in store.source.remarks():
            run.reporter.log(remark)
        if entries.num_left_out:
            run.reporter.log(f"input: left out: {entries.left_out}")
        yield draft
