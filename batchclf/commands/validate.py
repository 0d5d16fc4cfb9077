"""Check a job without running it: precision, provider, output, images, model."""

from dataclasses import dataclass

from batchclf.commands.survey import survey
from batchclf.images.resize import require_pillow
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
    found = survey(job, log)
    model = check_model(job.model)
    flavours = ", ".join(f"{name} {version}" for name, version in installed_flavours().items())
    return Checked(
        num_images=found.num_images,
        num_left_out=found.num_left_out,
        left_out=found.left_out,
        provider=f"{provider.execution_provider} of {flavours}",
        model=model,
    )
