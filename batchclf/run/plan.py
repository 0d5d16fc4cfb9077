"""What is to be classified (`Task`), and how this process does it (`Plan`); both are plain data."""

from dataclasses import dataclass, field, replace

from batchclf.images.load import Loader, loader_of
from batchclf.images.source import AnySource
from batchclf.models.resolve import ResolvedModel
from batchclf.results.records import DecodeBackend, Quarantined
from batchclf.run.request import Run
from batchclf.spec.job import JobSpec, auto, runs_on_cpu
from batchclf.system.machine import usable_cores

MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Task:
    """So many images of an input, to be classified with a model as a job says."""

    job: JobSpec
    source: AnySource
    model: ResolvedModel
    num_images: int
    """With those that have a record already."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A task in the portions, and with the workers, that suit this machine."""

    task: Task
    batch_size: int
    num_workers: int
    backend: DecodeBackend
    quarantined: Quarantined = field(default_factory=dict)

    @property
    def loader(self) -> Loader:
        """What loads the task's images, but for those that are quarantined."""
        task = self.task
        loader = loader_of(task.job, task.source, task.model.preprocess)
        return replace(loader, quarantined=self.quarantined)


def make_plan(run: Run, task: Task) -> Plan:
    """Divide a task up, as far as what went wrong before allows."""
    job = task.job
    fixed = task.model.bundle.meta.fixed_batch
    if fixed is not None and fixed != job.batch_size:
        run.reporter.log(
            f"batch_size: the model takes only batches of {fixed}, not {job.batch_size}"
        )
    num_workers = auto(job.loader.workers, usable_cores())
    fitting = fitting_batch_size(job, task.model, task.num_images)
    return Plan(
        task=task,
        batch_size=min(fitting, run.recovery.max_batch_size),
        num_workers=num_workers,
        backend="processes" if run.recovery.isolate else backend_of(job, num_workers),
        quarantined=run.recovery.quarantined,
    )


def fitting_batch_size(job: JobSpec, model: ResolvedModel, num_images: int) -> int:
    """The model's own batch size, or the job's; a short job saves inferring its padding."""
    return model.bundle.meta.fixed_batch or max(1, min(job.batch_size, num_images))


def backend_of(job: JobSpec, num_workers: int) -> DecodeBackend:
    """What the job's decode workers are.

    auto: processes where more than MAX_THREADS workers feed an accelerator. Threads share one
    interpreter, which handles about 3,000 images a second however many there are, and up to 4 of
    them do as well as processes (tests/benchmarks/overhead.py). On a CPU, inference takes most of
    the cores' time, and threads are enough.
    """
    if job.loader.backend != "auto":
        return job.loader.backend
    return "processes" if num_workers > MAX_THREADS and not runs_on_cpu(job.provider) else "threads"
