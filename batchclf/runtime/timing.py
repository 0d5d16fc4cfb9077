"""How fast does a classifier answer? Latency of one call, and images per second of several.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from batchclf.results.records import Pixels

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""uint8 pixels NHWC to scores NK."""
Timed = Callable[[np.ndarray[Any, Any]], object]
"""The same, or what makes something else of the pixels."""
NUM_WARM_UP = 2
MIN_CALLS = 3
MAX_CALLS = 30
BUDGET_S = 2.0
"""Seconds after which one measurement ends, once it has its least number of calls."""
ROUNDS = 5
CALL_S = 0.01
"""Seconds that a rival is called for in one round, at least once."""
Rival = TypeVar("Rival")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one call with a batch of `batch_size`."""

    batch_size: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of several functions at once; CPU time is that of all threads of this process."""

    images_per_s: float
    cpu_ms_per_image: float


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


def measure_throughput(
    runs: Sequence[Timed],
    batch_NHWC: np.ndarray[Any, Any],
    *,
    num_warm_up: int = NUM_WARM_UP,
    min_calls: int = MIN_CALLS,
    budget_s: float = BUDGET_S,
) -> Throughput:
    """One thread per function, all calling with the same batch; their rates are added up.

    Each is called `num_warm_up` times, then at least `min_calls` times, until `budget_s` is over.

    Raises:
        Exception: what a function raised.
    """

    def work(run: Timed) -> tuple[int, float]:
        started, count = time.perf_counter(), 0
        while count < min_calls or time.perf_counter() - started < budget_s:
            run(batch_NHWC)
            count += 1
        return count, count / (time.perf_counter() - started)

    with ThreadPoolExecutor(len(runs)) as pool:
        for _ in range(num_warm_up):
            list(pool.map(lambda run: run(batch_NHWC), runs))
        cpu_started = time.process_time()
        found = list(pool.map(work, runs))
        cpu_s = time.process_time() - cpu_started
    num_images = sum(count for count, _ in found) * len(batch_NHWC)
    calls_per_s = sum(rate for _, rate in found)
    return Throughput(calls_per_s * len(batch_NHWC), 1000 * cpu_s / num_images)


def least_costs_ms(
    rivals: Mapping[Rival, tuple[Sequence[Run], np.ndarray[Any, Any]]],
    ends_at: float,
    *,
    by_cpu: bool,
) -> dict[Rival, float]:
    """Milliseconds per image of several that take turns, each in its best round.

    That counts since whatever else the machine does only slows a round.

    Args:
        rivals: the functions to call at once, and the batch for each of them.
        ends_at: as of `time.perf_counter`; no further round begins then, but there is one.
        by_cpu: compare CPU time, of which other work on the machine takes less notice, but which is
            no measure where the threads of one call wait for each other; else wall time.

    Raises:
        Exception: what a function raised.
    """
    costs_ms = dict.fromkeys(rivals, math.inf)
    for number in range(ROUNDS):
        for rival, (runs, batch_NHWC) in rivals.items():
            found = measure_throughput(
                runs, batch_NHWC, num_warm_up=int(number == 0), min_calls=1, budget_s=CALL_S
            )
            cost_ms = found.cpu_ms_per_image if by_cpu else 1000 / found.images_per_s
            costs_ms[rival] = min(costs_ms[rival], cost_ms)
        if time.perf_counter() >= ends_at:
            break
    return costs_ms
