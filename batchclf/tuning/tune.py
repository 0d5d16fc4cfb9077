"""The fastest settings of a job, found by running its pipeline on a sample of its own images.

First what decoding and inference reach alone, which bounds what they reach together; then the
whole pipeline at the combinations whose bound is highest; then the best few again, in turns.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from batchclf.errors import UsageError
from batchclf.images.load import loader_of
from batchclf.images.store import open_input
from batchclf.models.resolve import Log, resolve_model
from batchclf.results.files import replace_file
from batchclf.results.records import refs_of
from batchclf.run.output import hold_output, local_output
from batchclf.runtime.classifier import open_reference
from batchclf.sessions.open import settle_provider
from batchclf.sessions.sample import Sample, evenly_spread, spread
from batchclf.spec.job import JobSpec
from batchclf.system.interrupt import StopRequest
from batchclf.tuning.budget import Clock, TuneOptions
from batchclf.tuning.measure import Bench
from batchclf.tuning.records import Tuned, as_facts, as_line
from batchclf.tuning.sessions import Sessions
from batchclf.tuning.stages import Tuning

SAMPLE_SIZE = 256
"""Images of the sample, where the job has them; up to twice as many are taken."""
_NEWLINE = orjson.OPT_APPEND_NEWLINE
LISTING_SHARE = 0.15
"""Share of the budget by whose end listing stops; the sample is then of what was listed."""


def tune_job(job: JobSpec, options: TuneOptions, *, log: Log, stop: StopRequest) -> Tuned:
    """Measure, choose, and write tune.jsonl and tune.png into the job's output folder.

    Raises:
        BatchclfError: as in a run; what was measured until then is in tune.jsonl.
        UsageError: what draws the plot is missing, or the budget is too short for any trial.
    """
    clock = Clock(options.budget_s)
    _require_matplotlib()
    output = local_output(job)
    fallback = None
    for precision in dict.fromkeys((job.precision, *options.precisions)):
        fallback = settle_provider(job.model_copy(update={"precision": precision}), log)
    store = open_input(job)
    with hold_output(job), _journal(output / "tune.jsonl") as lines:
        model = resolve_model(
            job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
        )
        clock.prepared()
        refs, num_listed, is_whole = spread(
            store.entries(), SAMPLE_SIZE, lambda: clock.left_s(LISTING_SHARE) <= 0
        )
        if not is_whole:
            log(f"the sample is of the first {num_listed:,} images: no time to list more")
        with tempfile.TemporaryDirectory(dir=output, prefix=".tune-") as folder:
            bench = Bench(job, store.source, model, refs, num_listed, Path(folder), stop, log)
            # Where the listing was whole, the sample is a run's: int8 then is converted once.
            sampled = refs_of(store.entries()) if is_whole else refs
            num_sampled = num_listed if is_whole else len(refs)
            loader = loader_of(job, store.source, model.preprocess)
            sample = Sample(job, loader, evenly_spread(sampled, num_sampled))
            sessions = Sessions(bench, sample, fallback)
            tuned = Tuning(
                bench, sessions, options, clock, lambda record: lines.append(as_line(record))
            ).run()
        lines.append({"type": "best", **as_facts(tuned.best), "keys": tuned.keys})
        from batchclf.tuning.plot import draw  # late: matplotlib starts slowly

        replace_file(output / "tune.png", draw(tuned))
    return tuned


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "tune: matplotlib, which draws tune.png, is not installed: pip install 'batchclf[tune]'"
        )


@contextmanager
def _journal(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Lines that replace the file at once, however the block ends; without any it stays."""
    lines: list[dict[str, Any]] = []
    try:
        yield lines
    finally:
        if lines:
            replace_file(path, b"".join(orjson.dumps(one, option=_NEWLINE) for one in lines))
