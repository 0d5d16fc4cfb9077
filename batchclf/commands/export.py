"""A job's model as a bundle in a folder of the user's, to run where torch is not installed."""

from pathlib import Path

from batchclf.models.bundle import Bundle, copy_bundle, require_place
from batchclf.models.resolve import Log, resolve_model
from batchclf.models.variants import needed_variant, resolve_variant
from batchclf.runtime.classifier import open_reference
from batchclf.runtime.providers import require_precision, require_provider
from batchclf.sessions.open import Wanted, conversion_of
from batchclf.sessions.sample import sample_input
from batchclf.spec.job import JobSpec


def export_job(job: JobSpec, folder: Path, log: Log) -> Bundle:
    """Write the job's model, and the same at the job's precision where that is another file.

    Raises:
        BatchclfError: the model cannot be built, converted or written.
    """
    require_place(folder)
    require_precision(job.provider.name, job.precision)
    require_provider("cpu")  # what the exported model is checked with
    model = resolve_model(
        job.model, batch_size=job.batch_size, open_reference=open_reference, log=log
    )
    variant = None
    if (precision := needed_variant(job.provider.name, job.precision)) is not None:
        wanted = Wanted(job, model, job.batch_size, sample_input(job, model), log)
        variant = (precision, resolve_variant(model.bundle, precision, conversion_of(wanted)))
    return copy_bundle(
        model.bundle, folder, labels=model.labels, preprocess=model.preprocess, variant=variant
    )
