"""Check a job without running it: precision, provider, output, images, model."""

from dataclasses import dataclass

from batchclf.images.resize import require_pillow
from batchclf.images.store import open_input
from batchclf.models.resolve import Log, check_model
from batchclf.run.output import require_separate_output
from batchclf.runtime.providers import PROVIDERS, installed_flavours
from batchclf.sessions.open import settle_provider
from batchclf.spec.job import JobSpec


@dataclass(frozen=True, slots=True)
class Checked:
    """What a valid job would do."""

    num_images: int
    num_left_out: int
    left_out: str
    """The same in words: how much of which kind."""
    provider: str
    model: str


def check_job(job: JobSpec, log: Log) -> Checked:
    """Everything that can be told before running.

    Raises:
        BatchclfError: the first problem, with the exit code that `run` would end with.
    """
    require_separate_output(job)
    require_pillow(job.loader.decode)
    fallback = settle_provider(job, log)
    provider = PROVIDERS["cpu" if fallback is not None else job.provider.name]
    store = open_input(job)
    for remark in store.source.remarks():
        log(remark)
    model = check_model(job.model)
    entries = store.entries(log)
    num_images = sum(1 for _ in entries)
    flavours = ", ".join(f"{name} {version}" for name, version in installed_flavours().items())
    return Checked(
        num_images=num_images,
        num_left_out=entries.num_left_out,
        left_out=str(entries.left_out),
        provider=f"{provider.execution_provider} of {flavours}",
        model=model,
    )
