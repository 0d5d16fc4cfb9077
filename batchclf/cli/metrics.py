"""A run's figures for Prometheus: `--metrics-port`."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from batchclf import __version__
from batchclf.errors import EnvironmentFailed, UsageError

if TYPE_CHECKING:
    from batchclf.engines.display import RunDisplay
    from batchclf.results.stats import Live

MB = 1_000_000
HERE = "127.0.0.1"


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `PORT` or `HOST:PORT`; without a host, this machine only.

    Raises:
        UsageError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise UsageError(
            f"--metrics-port: found {text!r}; give a port from 1 to 65535, such as 9464, which "
            "this machine alone can reach, or HOST:PORT, such as 0.0.0.0:9464, for others to reach "
            "it"
        )
    return host.strip("[]") or HERE, int(port)


class Metrics:
    """A `RunDisplay` that shows all to another one, and to whoever scrapes; a context manager."""

    def __init__(self, shown: "RunDisplay", address: tuple[str, int], gpus: Sequence[int]) -> None:
        """`gpus`: the numbers of the NVIDIA GPUs that the job runs on.

        Raises:
            EnvironmentFailed: the host or port is not to be had.
        """
        self._shown = shown
        self._run = _Run(gpus)
        registry = CollectorRegistry()
        registry.register(self._run)
        host, port = address
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, UnicodeError) as error:  # a host that is no name
            why = getattr(error, "strerror", None) or error
            raise EnvironmentFailed(
                f"--metrics-port: {host}:{port} cannot be listened on: {why}; give another host or "
                "port"
            ) from error
        self.port: int = self._server.server_port

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def log(self, text: str) -> None:
        """As of the other."""
        self._shown.log(text)

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """As of the other."""
        self._run.num_images = num_images
        self._shown.begin(num_images, num_done, num_errors)

    def update(self, num_images: int, num_errors: int) -> None:
        """As of the other."""
        self._shown.update(num_images, num_errors)

    def live(self, live: "Live") -> None:
        """As of the other; from now on, a scrape shows this."""
        self._run.live = live
        self._shown.live(live)


class _Run(Collector):
    """What a scrape shows: the figures that the run told last, all of one moment."""

    def __init__(self, gpus: Sequence[int]) -> None:
        self.num_images: int | None = None
        self.live: Live | None = None
        self._gpus = _Gpus.opened(gpus)

    def collect(self) -> Iterator[Metric]:
        """All metrics there are by now."""
        yield _gauge("info", "What this is.", 1, version=__version__)
        if self.num_images is not None:
            yield _gauge("job_images", "Images of the job, or of the shard.", self.num_images)
        if self.live is not None:
            yield from _counts(self.live)
            yield from _gauges(self.live)
        if self._gpus is not None:
            memory = GaugeMetricFamily(
                "batchclf_device_memory_bytes", "Memory in use on a GPU.", labels=["device"]
            )
            for device, num_bytes in self._gpus.used():
                memory.add_metric([device], num_bytes)
            yield memory


def _counts(live: "Live") -> Iterator[Metric]:
    """What only grows."""
    found = live.figures
    images = CounterMetricFamily(
        "batchclf_images", "Images with a record, earlier runs included.", labels=["status"]
    )
    images.add_metric(["ok"], found.num_ok)
    images.add_metric(["error"], found.num_errors)
    yield images
    errors = CounterMetricFamily("batchclf_errors", "Images that failed.", labels=["code"])
    for code, count in found.errors_by_code.items():
        errors.add_metric([code], count)
    yield errors
    stages = CounterMetricFamily(
        "batchclf_stage_seconds",
        "Seconds of each stage; decode_wait and infer are summed over the streams.",
        labels=["stage"],
    )
    for stage in ("list", "decode_wait", "infer", "write"):
        stages.add_metric([stage], getattr(found.stage_s, stage))
    yield stages
    yield CounterMetricFamily("batchclf_cpu_seconds", "CPU seconds used.", value=found.cpu_s)


def _gauges(live: "Live") -> Iterator[Metric]:
    """What goes up and down."""
    found = live.figures
    yield _gauge("images_per_second", "Since this run began.", found.images_per_s)
    yield _gauge("batch_size", "Images that are handed over together.", live.batch_size)
    if live.queue_depth is not None:
        yield _gauge(
            "queue_depth_batches", "Decoded batches that wait for inference.", live.queue_depth
        )
    times = GaugeMetricFamily(
        "batchclf_batch_seconds", "Inference of a batch.", labels=["quantile"]
    )
    for name, milliseconds in found.batch_ms.items():
        times.add_metric([f"0.{name.removeprefix('p')}"], milliseconds / 1000)
    yield times
    yield _gauge("peak_memory_bytes", "The most memory used at once.", found.peak_rss_mb * MB)


def _gauge(name: str, told: str, value: float, **labels: str) -> Metric:
    found = GaugeMetricFamily(f"batchclf_{name}", told, labels=list(labels))
    found.add_metric(list(labels.values()), value)
    return found


@dataclass(frozen=True, slots=True)
class _Gpus:
    """GPUs whose memory NVIDIA's management library tells."""

    nvml: Any
    handles: Sequence[tuple[str, Any]]

    @classmethod
    def opened(cls, numbers: Sequence[int]) -> "_Gpus | None":
        """Those with these numbers, as CUDA counts; None: there are none, or nothing tells."""
        if not numbers:
            return None
        import pynvml

        handles = []
        with suppress(pynvml.NVMLError):  # a stand-in, or a driver without it: no metric then
            pynvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = [one.strip() for one in visible.split(",") if one.strip()]
            for number in numbers:
                name = names[number] if number < len(names) else str(number)
                handle = (
                    pynvml.nvmlDeviceGetHandleByIndex(int(name))
                    if name.isdecimal()
                    else pynvml.nvmlDeviceGetHandleByUUID(name)
                )
                handles.append((str(number), handle))
        return cls(pynvml, handles) if handles else None

    def used(self) -> Iterator[tuple[str, int]]:
        """The number of each, and the bytes in use on it, whoever uses them."""
        for number, handle in self.handles:
            with suppress(self.nvml.NVMLError):
                yield number, self.nvml.nvmlDeviceGetMemoryInfo(handle).used
