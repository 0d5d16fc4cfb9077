"""One run of a job, from its spec to its output folder. Read this file first.

look    the model, what the output holds, and that it is this job's (look.py)
listed  the listing in its place, or a draft of it (look.py)
decide  nothing to do | append from a position | replace these failures (decide.py)
ready   the sessions, opened and proven (ready.py)
claim   the listing put in its place, and run.json says `running` (claim.py)
do      classify (classify.py), the records put in place (append.py, retry.py), the summary

Before `claim`, nothing changes in the output but hidden temporary files.
"""

import time
from contextlib import closing, suppress
from dataclasses import replace

from batchclf.errors import EnvironmentFailed
from batchclf.images.archives.listing import Listing, listing_with
from batchclf.results.files import remove_folder
from batchclf.results.run_record import kept_status
from batchclf.results.stats import Summary
from batchclf.results.writer import append_stats, mend_stats
from batchclf.run.append import append, append_members
from batchclf.run.blame import try_listing
from batchclf.run.claim import claim
from batchclf.run.decide import Append, Nothing, Replace, decide
from batchclf.run.look import listed, look
from batchclf.run.ready import Begun, make_ready
from batchclf.run.request import Run, RunResult
from batchclf.run.retry import replace_failures


def run_job(run: Run) -> RunResult:
    """Run a job to its end, or resume it. The caller holds the output (results/lock.py).

    Raises:
        BatchclfError: with the exit code and what to do; the output stays resumable.
    """
    run = try_listing(run)
    with listing_with(Listing(run.recovery.unlistable, run.reporter.listing)):
        while (result := _attempt(run)) is None:
            run.reporter.log("another shard was first to list the input: its listing is taken")
            # What it was to throw away is gone.
            run = replace(run, options=replace(run.options, overwrite=False))
    return result


def _attempt(run: Run) -> RunResult | None:
    """One run; None: another shard was first to place a listing, and that is to be gone on with."""
    found = look(run)
    started = time.perf_counter()
    with listed(found) as listing:
        list_s = time.perf_counter() - started
        todo = decide(found, listing)
        if isinstance(todo, Nothing):
            summary = todo.summary
            where = run.files.shown(run.files.predictions)
            run.reporter.log(f"already complete: {summary.num_images:,} images in {where}")
            return RunResult(run.files, found.bounds(listing)[0], summary, was_complete=True)
        with closing(make_ready(found, listing, todo)) as ready:
            ready.stats.listed(list_s)
            claimed = claim(found, listing, ready)
            if claimed is None:
                return None
            summary = do(Begun(run, claimed, ready), todo)
        return RunResult(run.files, found.bounds(listing)[0], summary, was_complete=False)


def do(begun: Begun, todo: Append | Replace) -> Summary:
    """Write the records that are to be written, and the summary; run.json tells how it ends.

    Raises:
        BatchclfError: as `run_job`.
    """
    files, ready = begun.run.files, begun.ready
    with kept_status(files, ready.record, begun.run.reporter.before_write) as state:
        mend_stats(files)
        if isinstance(todo, Replace):
            replace_failures(begun, todo, state)
        else:
            append(begun, todo, state)
        summary = Summary(**vars(ready.stats.snapshot()), **vars(state.record.how))
        append_members(files, ready.stats)
        append_stats(files, summary)
    with suppress(EnvironmentFailed):  # the job is complete; the next start removes them
        remove_folder(files.parts)
    return summary
