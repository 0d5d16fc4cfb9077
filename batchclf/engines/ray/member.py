"""The Ray actor: one worker on one node. Imports nothing before its version was asked for."""

import io
import os
import platform
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchclf import __version__

if TYPE_CHECKING:
    from batchclf.engines.ray.station import Look, Station
    from batchclf.results.parts import Committed
    from batchclf.results.stats import RunStats
    from batchclf.run.duty import Attempt, Doubt, Landmark
    from batchclf.sessions.open import Opened
    from batchclf.spec.job import JobSpec

TOKEN = "token"  # noqa: S105 - a file's name
ARRIVE_S = 5.0
"""What one machine writes may take so long to be seen by another."""


@dataclass(frozen=True, slots=True)
class Errand:
    """What a worker is sent out with: plain data."""

    job: "JobSpec"
    listing: Any
    num_images: int
    first: Any
    sample: Any
    drafts: Path
    """A folder that the driver made, with a token in it."""
    token: str
    answer: str
    """The name of what the worker leaves there."""
    digest: str
    """Of what the bundle's files are packed in."""
    num_cpus: float
    num_gpus: float
    landmarks: "tuple[Landmark, ...]"
    """Images that the driver saw."""


class Member:
    """One worker; several threads may ask it to do things at once."""

    def __init__(self) -> None:
        self._station: Station | None = None
        self._gauges: dict[str, Any] = {}

    def hello(self) -> dict[str, str]:
        """What runs here."""
        return {"batchclf": __version__, "Python": platform.python_version()}

    def open(self, errand: Errand, packed: bytes) -> "tuple[Opened, int]":
        """Open the job's sessions here, and prove them; what they are, and how many streams.

        Raises:
            BatchclfError: the job cannot run here.
        """
        from batchclf.engines.ray.station import Station
        from batchclf.models.bundle import open_bundle
        from batchclf.models.resolve import ResolvedModel
        from batchclf.run.duty import Duty

        _show_token(errand)
        bundle = open_bundle(_unpacked(packed, errand.digest))
        model = ResolvedModel(bundle, bundle.meta.labels, bundle.meta.preprocess)
        job = _suited(errand.job, errand.num_cpus, errand.num_gpus)
        self._station = Station(
            Duty(
                job=job,
                model=model,
                listing=errand.listing,
                num_images=errand.num_images,
                first=errand.first,
                sample=errand.sample,
                landmarks=errand.landmarks,
            )
        )
        return self._station.opened()

    def do(self, attempt: "Attempt") -> "tuple[Committed | Doubt | None, Look | None]":
        """Classify a range, as `Station.do`. And how it does.

        Raises:
            BatchclfError: what ended the worker.
        """
        assert self._station is not None
        return self._station.do(attempt), self.look()

    def look(self) -> "Look | None":
        """How it does; None: it is not open yet."""
        if self._station is None:
            return None
        look = self._station.look()
        if look.figures is not None:
            self._tell(look.figures)
        return look

    def _tell(self, figures: "RunStats") -> None:
        """Through Ray's own exporter."""
        from ray.util.metrics import Gauge

        for name, value in (
            ("images", figures.num_images),
            ("errors", figures.num_errors),
            ("images_per_s", figures.images_per_s),
        ):
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"batchclf_{name}", "Of this worker.")
            self._gauges[name].set(value)

    def stop(self) -> None:
        """Have what is in flight committed, and all else given up."""
        if self._station is not None:
            self._station.stop()


def _show_token(errand: Errand) -> None:
    """Read the driver's token here, and write one that the driver reads.

    Raises:
        EnvironmentFailed: this is not the storage that the driver writes to.
    """
    from batchclf.errors import EnvironmentFailed

    ends_at = time.monotonic() + ARRIVE_S
    while True:
        try:
            found = (errand.drafts / TOKEN).read_text()
            if found == errand.token:
                (errand.drafts / f"{TOKEN}.{errand.answer}").write_text(found)
                return
            why = "another file is there"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > ends_at:
            break
        time.sleep(0.2)
    raise EnvironmentFailed(
        f"output: {errand.drafts.parent}: is not the folder that the driver writes to ({why}); "
        "engine ray needs an output, and an input, on storage that all nodes reach by one path"
    )


def _unpacked(packed: bytes, digest: str) -> Path:
    """The bundle's files on this node, unpacked once for all of its workers.

    Raises:
        EnvironmentFailed: the cache cannot be written.
    """
    import tempfile

    from batchclf.errors import EnvironmentFailed
    from batchclf.models.bundle import private_folder
    from batchclf.system.cache import VARIABLE, cache_root

    folder = cache_root() / "sent" / digest[:32]
    try:
        private_folder(folder.parent)
        if not os.path.exists(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                    archive.extractall(Path(temporary) / "bundle", filter="data")
                try:
                    os.rename(Path(temporary) / "bundle", folder)
                except OSError:
                    if not os.path.exists(folder):  # else another worker was faster
                        raise
    except OSError as error:
        raise EnvironmentFailed(
            f"{folder}: the model cannot be unpacked: {error.strerror or error}; set {VARIABLE} to "
            "a folder with room"
        ) from error
    return folder


def _suited(job: "JobSpec", num_cpus: float, num_gpus: float) -> "JobSpec":
    """The job, using no more of this node than Ray gave it."""
    from batchclf.sessions.open import DEVICE_STREAMS, MAX_CPU_STREAMS
    from batchclf.spec.job import auto, runs_on_cpu

    cores = max(1, int(num_cpus))
    usual = min(cores, MAX_CPU_STREAMS) if runs_on_cpu(job.provider) else DEVICE_STREAMS
    streams = auto(job.runtime.streams, usual)
    threads = auto(job.runtime.threads, max(1, cores // streams))
    runtime = job.runtime.model_copy(update={"streams": streams, "threads": threads})
    workers = auto(job.loader.workers, cores)
    provider = job.provider
    if provider.name == "cuda" and num_gpus > 1:
        provider = provider.model_copy(update={"devices": tuple(range(int(num_gpus)))})
    return job.model_copy(
        update={
            "runtime": runtime,
            "loader": job.loader.model_copy(update={"workers": workers}),
            "provider": provider,
        }
    )
