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
    provider = _provider(job, log)
    found = survey(job, log)
    model = check_model(job.model)
    return Checked(
        num_images=found.num_images,
        num_left_out=found.num_left_out,
        left_out=found.left_out,
        provider=provider,
        model=model,
    )


def _provider(job: JobSpec, log: Log) -> str:
    """What the job runs on, in words; with engine ray, that is not this machine."""
    if job.engine.name == "ray":
        return f"{job.provider.name}, which each worker proves on its node before the job begins"
    require_pillow(job.loader.decode)
    fallback = settle_provider(job, log)
    provider = PROVIDERS["cpu" if fallback is not None else job.provider.name]
    flavours = ", ".join(f"{name} {version}" for name, version in installed_flavours().items())
    return f"{provider.execution_provider} of {flavours}"
