"""`--retry-failed`: the images whose records are errors, once more."""

from functools import partial
from itertools import islice

from batchclf.results.lines import find_done
from batchclf.results.run_record import RunState
from batchclf.results.writer import (
    RecordWriter,
    failed_refs,
    replace_failed,
    require_unchanged,
    sync_records,
)
from batchclf.run.append import SyncedSink
from batchclf.run.classify import classify
from batchclf.run.crew import collect
from batchclf.run.decide import Replace
from batchclf.run.ranges import Failed
from batchclf.run.ready import Begun, go_on_counting


def replace_failures(begun: Begun, todo: Replace, state: RunState) -> None:
    """Classify the failed images again, then put the new records in the old ones' places.

    Raises:
        BatchclfError: as `classify`; the old records stay.
    """
    files, stats, ready = begun.run.files, begun.ready.stats, begun.ready
    before_write = begun.run.reporter.before_write
    assert ready.work is not None
    first, last = files.shard.bounds(begun.listing.num_images)
    listed = partial(begun.listing.refs, first, last)
    refs = partial(failed_refs, files.predictions)
    ours = sync_records(files.predictions, todo.done.num_bytes)
    # What `claim` left there is of this very attempt.
    tried = find_done(files.retry, (ref.path for ref in refs(listed(), todo.codes)))
    stats.resume(tried.num_ok, tried.errors_by_code)
    go_on_counting(stats, begun.run.recovery)
    before_write()
    with RecordWriter(files.retry, tried.num_bytes, stats.add_write) as writer:
        left = islice(refs(listed(), todo.codes), tried.num_images, None)
        sink = SyncedSink(files, writer, stats, num_images=tried.num_images)
        if ready.work.crew is None:
            classify(ready.work, left, sink)
        else:
            ranges = Failed(left, todo.codes.total() - tried.num_images, tried.num_images)
            folders = ready.work.crew.folders.of_retry()
            folders.make_parts()
            collect(ready.work, ranges, folders, sink, ())
    before_write()
    require_unchanged(files.predictions, ours, todo.done.num_bytes)
    num_images = ready.work.plan.task.num_images
    num_bytes = replace_failed(files, todo.codes, num_images)
    state.note_retried(num_bytes, num_images)
