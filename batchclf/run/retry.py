"""`--retry-failed`: the images whose records are errors, once more."""

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from itertools import islice

from batchclf.errors import UsageError
from batchclf.models.resolve import Log
from batchclf.results.lines import Done, find_done
from batchclf.results.listing import read_listing
from batchclf.results.run_record import RunState
from batchclf.results.stats import StatsCollector
from batchclf.results.writer import RecordWriter, failed_refs, replace_failed
from batchclf.run.plan import Plan
from batchclf.run.recovery import go_on_counting
from batchclf.run.reporter import Reporter
from batchclf.run.request import Recovery

Classify = Callable[..., None]
"""classify_shard, bound to what stays the same in a run."""


def retryable(plan: Plan, done: Done, codes: frozenset[str] | None) -> Counter[str]:
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


def retry(
    plan: Plan,
    codes: Collection[str],
    classify: Classify,
    stats: StatsCollector,
    state: RunState,
    recovery: Recovery,
    reporter: Reporter,
    *,
    is_resumed: bool,
) -> None:
    """Classify the failed images again, then put the new records in the old ones' places.

    `is_resumed`: what is there of new records is of this very attempt.
    """
    refs = partial(failed_refs, plan.files.predictions)
    listed = partial(read_listing, plan.files, plan.first, plan.last)
    tried = Done()
    if is_resumed:
        tried = find_done(plan.files.retry, (ref.path for ref in refs(listed(), codes)))
    stats.resume(tried.num_ok, tried.errors_by_code)
    go_on_counting(stats, recovery)
    reporter.before_write()
    with RecordWriter(plan.files.retry, tried.num_bytes, stats.add_write) as writer:
        classify(islice(refs(listed(), codes), tried.num_images, None), writer)
    reporter.before_write()
    num_bytes = replace_failed(plan.files.predictions, plan.files.retry, codes)
    state.note_durable(num_bytes, plan.num_images)


def tell_that_none_is_retried(done: Done, codes: Collection[str] | None, log: Log) -> None:
    """Say that there is no error to try again, and which there are."""
    there = ", ".join(f"{count:,} {code}" for code, count in sorted(done.errors_by_code.items()))
    which = "" if codes is None else f" with the code {' or '.join(sorted(codes))}"
    log(f"--retry-failed: no error{which}, so nothing is tried again (found: {there or 'none'})")
