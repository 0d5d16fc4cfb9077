"""Figures of a run while it runs: counts, stage times, batch latencies, the bottleneck."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from batchclf.results.lines import Lines
from batchclf.results.run_record import How

BUCKETS_PER_E = 100
"""Resolution of the latency histogram: neighbouring buckets differ by 1%."""
SETTLED = 3
"""Batches per stream from which a job's first batch, for which all wait, no longer matters."""
WAITING = 0.25
"""Share of the streams' time from which pixels are what they lack.

On a CPU, which decoding and inference share, both cost as much CPU time near 0.3, measured with
MobileNetV2 and photos of 0.1 to 12 megapixels on 2 cores: the one that costs more is then named.
"""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Wall seconds per stage.

    `decode_wait` and `infer` are summed over the streams, `write` over the processes that make
    lines.
    """

    list: float = 0.0
    decode_wait: float = 0.0
    infer: float = 0.0
    write: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """The figures of a run so far, or of a whole run: the `interval` and `summary` lines."""

    num_images: int
    """Images with a record by now, those of earlier runs of the job included, as the next three."""
    num_new: int
    """Images recorded by this run; all times, rates and memory below are of this run."""
    num_ok: int
    num_errors: int
    errors_by_code: Mapping[str, int]
    wall_s: float
    startup_s: float
    images_per_s: float
    stage_s: StageSeconds
    batch_ms: Mapping[str, float]
    """p50, p95 and p99 of inference."""
    bottleneck: str
    """decode, infer or write."""
    bottleneck_why: str
    cpu_s: float
    peak_rss_mb: float


@dataclass(frozen=True, kw_only=True)
class Summary(How, RunStats):
    """The last line of a finished run's stats.jsonl: its figures, and how and on what it ran."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}  # `type`


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """What is seen of a run while it goes on."""

    figures: RunStats
    batch_size: int
    queue_depth: int | None
    """Decoded batches that wait for inference; None: other processes have the queue."""


def are_of_one_run(before: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether two lines of stats.jsonl that follow each other are figures of one run.

    A run that was interrupted early is followed by one whose figures may all be higher.
    """
    return (
        before.get("startup_s") == line.get("startup_s")
        and before["wall_s"] <= line["wall_s"]
        and before["num_new"] <= line["num_new"]
    )


_Figures = TypeVar("_Figures", bound=RunStats)


def together(runs: Sequence[_Figures]) -> _Figures:
    """Figures of runs side by side, such as shards, as those of one: as long as the longest."""
    slowest = max(runs, key=lambda one: one.wall_s)
    codes: Counter[str] = Counter()
    for one in runs:
        codes.update(one.errors_by_code)
    stages = {
        one.name: round(sum(getattr(run.stage_s, one.name) for run in runs), 4)
        for one in fields(StageSeconds)
    }
    return replace(
        slowest,
        num_images=sum(one.num_images for one in runs),
        num_new=sum(one.num_new for one in runs),
        num_ok=sum(one.num_ok for one in runs),
        num_errors=sum(one.num_errors for one in runs),
        errors_by_code=dict(codes.most_common()),
        images_per_s=round(sum(one.images_per_s for one in runs), 2),
        startup_s=max(one.startup_s for one in runs),
        stage_s=StageSeconds(**stages),
        batch_ms={
            name: max(one.batch_ms.get(name, 0.0) for one in runs) for name in slowest.batch_ms
        },
        cpu_s=round(sum(one.cpu_s for one in runs), 2),
        peak_rss_mb=max(one.peak_rss_mb for one in runs),
    )


class Histogram:
    """Durations in logarithmic buckets: percentiles within 1%, in memory that does not grow."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(math.log(max(seconds, 1e-9)) * BUCKETS_PER_E)] += 1

    def percentile_ms(self, percent: float) -> float:
        """The duration in milliseconds that `percent` of all do not exceed; 0 when empty."""
        wanted = self._counts.total() * percent / 100
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return round(1000 * math.exp(bucket / BUCKETS_PER_E), 3)
        return 0.0


class StatsCollector:
    """Collects while a job runs; `snapshot` gives the figures so far. Streams may add at once."""

    def __init__(
        self,
        cpu_seconds: Callable[[], float],
        peak_rss_mb: Callable[[], float],
    ) -> None:
        self._cpu_seconds = cpu_seconds
        self._cpu_elsewhere: Callable[[], float] = lambda: 0.0
        self._queue_depth: Callable[[], int] | None = None
        self._peak_rss_mb = peak_rss_mb
        self._members: Callable[[], Mapping[str, RunStats]] = dict
        self._startup_s = 0.0
        self._list_s = 0.0
        self._started = math.nan
        self._lock = threading.Lock()
        self._errors_by_code: Counter[str] = Counter()
        self._num_images = 0
        self._num_new = 0
        self._decode_wait_s = 0.0
        self._infer_s = 0.0
        self._write_s = 0.0
        self._elsewhere_s = 0.0
        self._num_elsewhere = 1
        self._num_batches = 0
        self._num_streams = 1
        self._batches = Histogram()

    @property
    def num_images(self) -> int:
        """Images with a record, those of earlier runs of the job included."""
        return self._num_images

    @property
    def num_errors(self) -> int:
        return self._errors_by_code.total()

    def start(self, startup_s: float, num_streams: int = 1) -> None:
        """Begin to count this run's time, after `startup_s` seconds of start-up."""
        self._num_streams = num_streams
        if math.isnan(self._started):
            self._started = time.perf_counter()
            self._startup_s = startup_s

    def started(self, began: float, startup_s: float, num_done: int) -> None:
        """Count on from when this run began in another process, with `num_done` records there.

        Counts, wall time and rates then are of the whole run; stages, batches, CPU time and memory
        are of this process.
        """
        self._started = began
        self._startup_s = startup_s
        self._num_new = self._num_images - num_done

    def listed(self, list_s: float) -> None:
        """Count the time that listing the input took, within start-up."""
        self._list_s = list_s

    def count_cpu(self, cpu_seconds: Callable[[], float]) -> None:
        """Count the CPU seconds of other processes that work for this run, too."""
        self._cpu_elsewhere = cpu_seconds

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Where to ask how many decoded batches wait for inference."""
        self._queue_depth = depth

    def live(self, batch_size: int) -> Live:
        """What is to be seen just now."""
        depth = None if self._queue_depth is None else self._queue_depth()
        return Live(figures=self.snapshot(), batch_size=batch_size, queue_depth=depth)

    def cpu_seconds(self) -> float:
        """CPU seconds used so far, by this process and those that work for it."""
        return self._cpu_seconds() + self._cpu_elsewhere()

    def resume(self, num_ok: int, errors_by_code: Mapping[str, int]) -> None:
        """Count what an earlier run of the job has written."""
        self._errors_by_code.update(errors_by_code)
        self._num_images += num_ok + sum(errors_by_code.values())

    def add_batch(self, decode_wait_s: float, infer_s: float) -> None:
        """Count one batch of a stream: how long it waited for pixels, how long inference took."""
        with self._lock:
            self._decode_wait_s += decode_wait_s
            self._infer_s += infer_s
            self._num_batches += 1
            self._batches.add(infer_s)

    def add_write(self, seconds: float) -> None:
        """Count time spent on making and writing lines, or on waiting for the disk to have them."""
        self._write_s += seconds

    def add_lines_elsewhere(self, seconds: float, num_processes: int) -> None:
        """Count time that one of so many other processes spent on making lines."""
        self._elsewhere_s += seconds
        self._num_elsewhere = num_processes

    def add_part(self, num_ok: int, errors_by_code: Mapping[str, int]) -> None:
        """Count records that others have written for this run."""
        self.resume(num_ok, errors_by_code)
        self._num_new += num_ok + sum(errors_by_code.values())

    def count_members(self, members: Callable[[], Mapping[str, RunStats]]) -> None:
        """Let times, rates of batches and memory be those of others, by their names, as well."""
        self._members = members

    def members(self) -> Mapping[str, RunStats]:
        """The figures of these others."""
        return self._members()

    def add_lines(self, lines: Lines) -> None:
        """Count records written."""
        self.add_part(lines.num_ok, lines.errors_by_code)

    def snapshot(self) -> RunStats:
        """The figures so far. `wall_s` and `images_per_s` are of this run, without start-up."""
        wall_s = time.perf_counter() - self._started
        num_errors = self._errors_by_code.total()
        with self._lock:
            stages = StageSeconds(
                list=round(self._list_s, 4),
                decode_wait=round(self._decode_wait_s, 4),
                infer=round(self._infer_s, 4),
                write=round(self._write_s + self._elsewhere_s, 4),
            )
            batch_ms = {f"p{p}": self._batches.percentile_ms(p) for p in (50, 95, 99)}
        bottleneck, bottleneck_why = self._bottleneck(stages, wall_s)
        own = RunStats(
            num_images=self._num_images,
            num_new=self._num_new,
            num_ok=self._num_images - num_errors,
            num_errors=num_errors,
            errors_by_code=dict(sorted(self._errors_by_code.items())),
            wall_s=round(wall_s, 3),
            startup_s=round(self._startup_s, 3),
            images_per_s=round(self._num_new / wall_s, 2) if wall_s > 0 else 0.0,
            stage_s=stages,
            batch_ms=batch_ms,
            bottleneck=bottleneck,
            bottleneck_why=bottleneck_why,
            cpu_s=round(self.cpu_seconds(), 2),
            peak_rss_mb=round(self._peak_rss_mb(), 1),
        )
        if not (members := list(self._members().values())):
            return own
        found = together(members)
        return replace(
            own,
            stage_s=replace(found.stage_s, list=own.stage_s.list),
            batch_ms=found.batch_ms,
            bottleneck=found.bottleneck,
            bottleneck_why=found.bottleneck_why,
            cpu_s=round(own.cpu_s + found.cpu_s, 2),
            peak_rss_mb=max(own.peak_rss_mb, found.peak_rss_mb),
        )

    def _bottleneck(self, stages: StageSeconds, wall_s: float) -> tuple[str, str]:
        """The stage that the others wait for, of decode, infer and write, and how that was told.

        All stages work at once, so only the slowest never waits. Where that is writing, nobody
        gives batches back, and the streams wait as well: hence it comes first.
        """
        streams_s = stages.decode_wait + stages.infer
        if streams_s == 0:
            return "decode", "no batch was inferred"
        if self._num_batches < SETTLED * self._num_streams:
            return self._longest(stages)
        writing = self._writing_s / wall_s
        inferring = stages.infer / self._num_streams / wall_s
        waiting = stages.decode_wait / streams_s
        if writing > max(0.5, inferring):
            return "write", f"writing took {writing:.0%} of the wall time"
        if waiting > WAITING:
            return "decode", f"streams waited for pixels {waiting:.0%} of the time"
        return "infer", f"streams waited for pixels only {waiting:.0%} of the time"

    @property
    def _writing_s(self) -> float:
        """Of this process, or of one of the others, which make lines meanwhile."""
        return max(self._write_s, self._elsewhere_s / self._num_elsewhere)

    def _longest(self, stages: StageSeconds) -> tuple[str, str]:
        """The same of a job whose stages came one after the other, more or less."""
        num_working = min(self._num_batches, self._num_streams)
        seconds = {
            "decode": stages.decode_wait / num_working,
            "infer": stages.infer / num_working,
            "write": self._writing_s,
        }
        longest = max(seconds, key=lambda stage: seconds[stage])
        return longest, (
            f"too short to tell for sure, {self._num_batches} batches on {self._num_streams} "
            "streams; " + ", ".join(f"{stage} {value:.3f} s" for stage, value in seconds.items())
        )
