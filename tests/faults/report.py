"""What a scenario is asked, what it found, and how that is printed."""

import itertools
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MAX_PRINTED = 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """What one scenario is asked to do."""

    folder: Path
    """Scratch space, empty at first."""
    seed: int = 1
    count: int = 10
    """How many disturbances."""
    duration_s: float = 3600.0
    """No new one begins after this."""
    num_lanes: int = 2
    """Jobs at a time."""
    is_timed: bool = True
    """Whether what takes too long is a failed check; on a busy machine it says nothing."""
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "deadline", time.monotonic() + self.duration_s)

    @property
    def environment(self) -> dict[str, str]:
        """For every job: a model cache of their own, and no threads for libraries' pools."""
        return {"BATCHCLF_CACHE_DIR": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def report(self, name: str, **figures: object) -> "Report":
        """An empty report."""
        return Report(name, dict(figures), is_timed=self.is_timed)

    def rng(self, lane: int = 0) -> random.Random:
        """Moments and choices of one lane: the same ones for the same seed."""
        return random.Random(f"{self.seed}/{lane}")

    def lanes(self, work: Callable[[int, int], None]) -> None:
        """`work(lane, count)` for each lane at once, where `count` is its part of the whole."""
        parts = [(self.count + lane) // self.num_lanes for lane in range(self.num_lanes)]
        self.each(
            filter(parts.__getitem__, range(self.num_lanes)), lambda lane: work(lane, parts[lane])
        )

    def each(self, items: Iterable[T], work: Callable[[T], None]) -> None:
        """`work(item)` for each item, `num_lanes` at a time, until the time is over."""
        with ThreadPoolExecutor(self.num_lanes) as pool:
            for done in [pool.submit(self._unless_over, work, item) for item in items]:
                done.result()

    def _unless_over(self, work: Callable[[T], None], item: T) -> None:
        if not self.is_over:
            work(item)


@dataclass(slots=True)
class Report:
    """What a scenario counted and measured, and every check that failed."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_checks: int = 0
    is_timed: bool = True
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def check(self, holds: object, problem: str) -> bool:
        """Count a check; note the problem where it does not hold."""
        with self._guard:
            self.num_checks += 1
            if not holds:
                self.problems.append(problem)
        return bool(holds)

    def number(self) -> int:
        """A number that nobody else has: for names of files."""
        return next(self._numbers)

    def check_none(self, complaints: list[str], when: str) -> bool:
        """Check that there is no complaint."""
        return self.check(not complaints, f"{when}: {'; '.join(complaints)}")

    def add(self, figure: str, value: float = 1) -> None:
        """Add to a count."""
        with self._guard:
            self.figures[figure] = self.figures.get(figure, 0) + value

    def largest(self, figure: str, value: float) -> None:
        """Keep the largest value seen."""
        with self._guard:
            self.figures[figure] = round(max(self.figures.get(figure, value), value), 3)

    def took(self, figure: str, seconds: float, at_most: float, problem: str) -> None:
        """Keep the longest time seen; check it against what is promised."""
        self.largest(figure, seconds)
        self.check(
            seconds <= at_most or not self.is_timed, f"{seconds:.1f} s, not {at_most}: {problem}"
        )

    @property
    def exit_code(self) -> int:
        """1 where a check failed, or none was made."""
        return 1 if self.problems or not self.num_checks else 0

    def print(self) -> None:
        """A table, the problems, and the same as one JSON object in the last line."""
        width = max(map(len, (*self.figures, "checks")))
        print(self.name)
        for figure, value in {**self.figures, "checks": self.num_checks}.items():
            print(f"  {figure:{width}}  {value}")
        for problem in self.problems[:MAX_PRINTED]:
            print(f"  FAILED {problem}")
        print(
            json.dumps(
                {
                    "scenario": self.name,
                    "passed": self.exit_code == 0,
                    **self.figures,
                    "num_checks": self.num_checks,
                    "num_problems": len(self.problems),
                    "problems": self.problems[:MAX_PRINTED],
                }
            )
        )


def emptied(folder: Path) -> Path:
    """The path of a folder that is not there: a job creates it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
