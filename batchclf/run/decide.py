"""What a run has to do: nothing, records to append, or failures to replace."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from batchclf.errors import UsageError
from batchclf.models.resolve import Log
from batchclf.results.lines import Done
from batchclf.results.listing import Listing
from batchclf.results.stats import Summary
from batchclf.results.writer import last_summary
from batchclf.run.look import Found
from batchclf.run.resume import Kept, resume


@dataclass(frozen=True, slots=True)
class Nothing:
    """An earlier run has finished the job."""

    summary: Summary


@dataclass(frozen=True, slots=True)
class Append:
    """The images behind those that are done."""

    kept: Kept

    @property
    def done(self) -> Done:
        """All records that are kept."""
        return self.kept.done


@dataclass(frozen=True, slots=True)
class Replace:
    """The images whose records are errors with one of these codes."""

    done: Done
    codes: Counter[str]
    """And how many of each there are."""


Todo = Nothing | Append | Replace


def decide(found: Found, listing: Listing) -> Todo:
    """What is to be done about the images of a listing.

    Raises:
        UsageError: --retry-failed of a job that is not finished.
        ResumeRefused: records that no run.json tells of.
        EnvironmentFailed: what is there cannot be read.
    """
    run, record = found.run, found.record
    options, log = run.options, run.reporter.log
    run.reporter.before_write()
    kept = Kept(Done()) if options.overwrite else resume(run.files, record, listing, log)
    done = kept.done
    num_left = found.num_images(listing) - done.num_images
    if options.retry_failed:
        if codes := _retryable(kept, num_left, options.codes):
            return Replace(done, codes)
        _tell_that_none_is_retried(done, options.codes, log)
    is_whole = num_left == 0 and not kept.parts
    if is_whole and record is not None and record.status == "complete":
        summary = last_summary(run.files)
        if summary is not None:
            return Nothing(summary)
    return Append(kept)


def _retryable(kept: Kept, num_left: int, codes: frozenset[str] | None) -> Counter[str]:
    """How many records of which error `--retry-failed` would try again."""
    num_images = kept.done.num_images + num_left
    if num_left := num_left + sum(part.num_images for part in kept.parts):
        raise UsageError(
            f"--retry-failed: {num_images - num_left:,} of {num_images:,} images have a record; "
            "finish the job first, by running it without --retry-failed"
        )
    there = kept.done.errors_by_code
    return there if codes is None else Counter({code: there[code] for code in codes & there.keys()})


def _tell_that_none_is_retried(done: Done, codes: Collection[str] | None, log: Log) -> None:
    """Say that there is no error to try again, and which there are."""
    there = ", ".join(f"{count:,} {code}" for code, count in sorted(done.errors_by_code.items()))
    which = "" if codes is None else f" with the code {' or '.join(sorted(codes))}"
    log(f"--retry-failed: no error{which}, so nothing is tried again (found: {there or 'none'})")
