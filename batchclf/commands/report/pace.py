"""How fast a job was over its time, told from stats.jsonl."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from batchclf.results.files import RunFiles, read_lines
from batchclf.results.stats import are_of_one_run

MAX_STEPS = 400
"""That are kept; when there are more, neighbours become one."""
STAGES = ("decode_wait", "infer", "write")


@dataclass(frozen=True, slots=True)
class Step:
    """Some seconds of a job."""

    seconds: float
    num_images: int
    stage_s: tuple[float, ...]
    """Of each of `STAGES`."""

    def __add__(self, other: "Step") -> "Step":
        stages = zip(self.stage_s, other.stage_s, strict=True)
        return Step(
            self.seconds + other.seconds,
            self.num_images + other.num_images,
            tuple(own + theirs for own, theirs in stages),
        )

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.seconds

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the stages' seconds, that of each stage."""
        total = sum(self.stage_s)
        return tuple(one / total if total else 0.0 for one in self.stage_s)


@dataclass(frozen=True, slots=True)
class Pace:
    """The steps of one shard, one after the other over all of its runs."""

    name: str
    """I/N; empty: of a job without shards."""
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """That it ran for, without start-up."""
        return sum(step.seconds for step in self.steps)

    @property
    def images_per_s(self) -> float:
        """Over all of them."""
        return sum(step.num_images for step in self.steps) / self.seconds


def pace_of(files: RunFiles) -> Pace:
    """The steps that a shard's stats.jsonl tells.

    Raises:
        EnvironmentFailed: it cannot be read.
    """
    steps: list[Step] = []
    for step in _steps(files):
        steps.append(step)
        if len(steps) > 2 * MAX_STEPS:
            # They are odd in number: the last has no neighbour yet.
            pairs = zip(steps[::2], steps[1::2], strict=False)
            steps = [*(one + other for one, other in pairs), step]
    shard = files.shard
    return Pace("" if shard.count == 1 else f"{shard.index}/{shard.count}", tuple(steps))


def _steps(files: RunFiles) -> Iterator[Step]:
    nothing: dict[str, Any] = {"wall_s": 0.0, "num_new": 0, "stage_s": {}}
    for before, line in pairwise((nothing, *_figures(files))):
        step = _between(before if are_of_one_run(before, line) else nothing, line)
        if step.seconds > 0:
            yield step


def _between(before: Mapping[str, Any], line: Mapping[str, Any]) -> Step:
    stages = []
    for name in STAGES:
        now_s, earlier_s = line["stage_s"][name], before["stage_s"].get(name, 0.0)
        # A new process of the same run counts its stages from nothing.
        stages.append(now_s - earlier_s if now_s >= earlier_s else now_s)
    return Step(
        line["wall_s"] - before["wall_s"], line["num_new"] - before["num_new"], tuple(stages)
    )


def _figures(files: RunFiles) -> Iterator[dict[str, Any]]:
    for line in read_lines(files.stats):
        try:
            found = orjson.loads(line)
        except orjson.JSONDecodeError:  # torn by a power loss, or being written
            continue
        if isinstance(found, dict) and found.get("type") in ("interval", "summary"):
            yield found
