"""What a job's output holds and whose it is; its listing, and how a run comes to hold both."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

from batchclf.errors import ResumeRefused
from batchclf.images.source import Source, open_source
from batchclf.images.store import list_paths, require_images
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.results.files import remove
from batchclf.results.identity import Identity
from batchclf.results.listing import Listing, drafted, open_listing, place
from batchclf.results.run_record import RunRecord, read_run, write_run
from batchclf.results.writer import discard, remove_leftovers
from batchclf.run.identity import (
    identity_of,
    is_larger,
    others_of,
    require_alone,
    require_same_job,
    require_same_listing,
)
from batchclf.run.request import Run
from batchclf.runtime.classifier import open_reference
from batchclf.sessions.open import settle_provider


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
    others: Mapping[str, RunRecord]
    """Run records of other shards, by the names of their files."""
    settle: Callable[[], str | None]
    """Prove the provider, once: why the CPU takes its place, where the job allows that."""
    source: Callable[[], Source]
    """Open the input, once; a finished job does not need it to be there.

    Raises:
        NoImagesError: it holds no image, or is not there.
    """

    def num_images(self, listing: Listing) -> int:
        """The images of this shard."""
        first, last = self.run.options.shard.bounds(listing.num_images)
        return last - first


class Outrun(Exception):
    """Another shard put its listing in its place first, and it is not the same."""


def look(run: Run) -> Found:
    """Resolve the model, and refuse an output that holds anything of another job.

    Raises:
        ResumeRefused: naming the file and what differs.
        ProviderError: the provider does not work here, and there may be work for it.
        BatchclfError: the model cannot be had, a file cannot be read.
    """
    job, files, options = run.job, run.files, run.options
    record = None if options.overwrite else read_run(files)
    settle = cache(partial(settle_provider, job, run.reporter.log))
    if record is None or not record.is_finished:  # else it may be gone, as may the input
        settle()
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=run.reporter.log
    )
    others = others_of(files)
    listing = None if options.overwrite and not others else open_listing(files)
    if options.overwrite and listing is not None:
        run.reporter.log("--overwrite: other shards use the listing, so it stays as it is")
    identity = identity_of(job, model, options.limit)
    if record is not None:  # the listing stays as it is, with another setting as well
        links = record.fingerprint.allow_outside_links
        identity = replace(identity, allow_outside_links=links)
    found = Found(
        run=run,
        model=model,
        identity=identity,
        record=record,
        listing=listing,
        others=others,
        settle=settle,
        source=cache(partial(_open_source, run)),
    )
    _require_own(found)
    run.reporter.before_write()
    remove_leftovers(files, is_complete=record is not None and record.status == "complete")
    return found


def _open_source(run: Run) -> Source:
    job = run.job
    source = open_source(job.input, allow_outside_links=job.loader.allow_outside_links)
    require_images(source)
    return source


def _require_own(found: Found) -> None:
    """Refuse whatever is of another job: the shard's own records, the listing, other shards'."""
    files, identity = found.run.files, found.identity
    own = {} if found.record is None else {files.run.name: found.record}
    records = {**own, **found.others}
    before: dict[str, Identity] = {name: one.fingerprint for name, one in records.items()}
    if found.listing is not None:
        before[files.listing.name] = found.listing.job
    if _grows(found):
        assert found.listing is not None
        identity = replace(identity, limit=found.listing.job.limit)
    require_same_job(files, identity, before)
    if found.listing is not None:
        require_same_listing(files, found.listing, records)


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
        UsageError: other shards divide the listing that is to be extended.
        EnvironmentFailed: the input cannot be listed, or the draft not be written.
    """
    run, listing = found.run, found.listing
    is_extended = run.options.extend or _grows(found)
    if listing is not None and not is_extended:
        yield listing
        return
    if is_extended:
        require_alone(found.others, "--extend")
    entries = list_paths(found.source())
    run.reporter.before_write()
    limit = run.options.limit
    with drafted(run.files, found.identity, entries, limit=limit, extends=listing) as draft:
        if listing is not None:
            num_new = draft.num_images - listing.num_images
            what = "--extend" if run.options.extend else "--limit"
            run.reporter.log(f"{what}: {num_new:,} new images in the listing")
        elif draft.num_left_out:
            run.reporter.log(f"input: left out {draft.num_left_out:,} hidden or repeated entries")
        yield draft


def claim(found: Found, listing: Listing, record: RunRecord) -> Listing:
    """Put a listing in its place, throw away what --overwrite does, and say so in run.json.

    Of shards that begin at once, the first to place a listing decides what job they are of.

    Raises:
        Outrun: another shard placed another listing of the same job.
        ResumeRefused: another shard placed that of another job, or threw away the one in place.
        EnvironmentFailed: the output cannot be written.
    """
    run, files = found.run, found.run.files
    run.reporter.before_write()
    if run.options.overwrite:
        discard(files, keep_listing=found.listing is not None)
    if listing.path != files.listing:
        placed = place(files, listing)
        require_same_job(files, found.identity, {files.listing.name: placed.job})
        if placed.extent != listing.extent:
            raise Outrun
        listing = placed
    write_run(files, record)
    if not listing.is_in(files.listing):
        if found.record is None:
            remove(files.run)
        else:
            write_run(files, found.record)
        raise ResumeRefused(
            f"output: {files.listing}: another run threw it away, or replaced it, while this one "
            "began; run the same command again"
        )
    return listing
