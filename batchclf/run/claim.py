"""How a run comes to hold its output: the listing in its place, and run.json says so."""

from batchclf.errors import ResumeRefused
from batchclf.results.files import remove
from batchclf.results.listing import Listing, place, take_away
from batchclf.results.run_record import write_run
from batchclf.results.writer import discard
from batchclf.run.identity import others_of, require_same_job
from batchclf.run.look import Found
from batchclf.run.ready import Ready


def claim(found: Found, listing: Listing, ready: Ready) -> Listing | None:
    """Put a listing in its place, throw away what --overwrite does, and say so in run.json.

    Of shards that begin at once, the first to place a listing decides what job they are of.

    Returns:
        The listing in its place; None: another shard was first, with another listing of this job.

    Raises:
        ResumeRefused: another shard placed that of another job, or began while this one did.
        EnvironmentFailed: the output cannot be written.
    """
    run, files = found.run, found.run.files
    run.reporter.before_write()
    if run.options.overwrite:
        _throw_away(found)
    if not ready.goes_on_retrying:
        remove(files.retry)  # of an attempt that was given up
    if listing.path != files.listing:
        placed = place(files, listing)
        require_same_job(files, found.identity, {files.listing.name: placed.job})
        if placed.extent != listing.extent:
            return None
        listing = placed
    write_run(files, ready.record)
    if not listing.is_in_place(files):
        if found.record is None:
            remove(files.run)
        else:
            write_run(files, found.record)
        raise _crossed(found)
    return listing


def _throw_away(found: Found) -> None:
    """Remove what an earlier run left, unless others have begun with it since."""
    files = found.run.files
    if others_of(files, starts_anew=True).keys() != found.others.keys():
        raise _crossed(found)
    if found.listing is None and not take_away(files, found.thrown_away):
        raise _crossed(found)
    discard(files)


def _crossed(found: Found) -> ResumeRefused:
    return ResumeRefused(
        f"output: {found.run.files.folder}: another run began, or threw the listing away, while "
        "this one did; run the same command again"
    )
