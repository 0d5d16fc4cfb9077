"""How fast does a classifier answer? Latency of one call, and images per second of several.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchclf.results.records import Pixels

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""uint8 pixels NHWC to scores NK."""
NUM_WARM_UP = 2
MIN_CALLS = 3
MAX_CALLS = 30
BUDGET_S = 4.0
"""Seconds after which one measurement ends, once it has its least number of calls."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one call with a batch of `batch_size`."""

    batch_size: int
    median_ms: float
    p95_ms: float


def filled_batches(pixels_NHWC: Pixels, size: int) -> Iterator[Pixels]:
    """Batches of exactly `size`, the last one filled up with the first images."""
    for start in range(0, len(pixels_NHWC), size):
        yield np.take(pixels_NHWC, range(start, start + size), axis=0, mode="wrap")


def measure_latency(run: Run, batch_NHWC: np.ndarray[Any, Any]) -> Latency:
    """Time single calls, one after the other, after a warm-up."""
    for _ in range(NUM_WARM_UP):
        run(batch_NHWC)
    times_ms: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while len(times_ms) < MIN_CALLS or (len(times_ms) < MAX_CALLS and time.perf_counter() < end):
        started = time.perf_counter()
        run(batch_NHWC)
        times_ms.append(1000 * (time.perf_counter() - started))
    median, p95 = np.percentile(times_ms, [50, 95])
    return Latency(len(batch_NHWC), round(float(median), 2), round(float(p95), 2))


def measure_throughput(runs: Sequence[Run], batch_NHWC: np.ndarray[Any, Any]) -> float:
    """Images per second with one thread per function, all calling with the same batch."""
    counts = [0] * len(runs)
    started = time.perf_counter()

    def work(number: int) -> None:
        while counts[number] < MIN_CALLS or (
            counts[number] < MAX_CALLS and time.perf_counter() - started < BUDGET_S
        ):
            runs[number](batch_NHWC)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(sum(counts) * len(batch_NHWC) / (time.perf_counter() - started), 1)
