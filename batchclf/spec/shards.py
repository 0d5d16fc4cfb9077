"""Which shard of a job this process is: as asked for, or as the scheduler that started it says.

Sources: Kubernetes, indexed Jobs (JOB_COMPLETION_INDEX); Slurm, sbatch(1) --array; AWS Batch, array
jobs; Cloud Run, jobs; torch.distributed's variables, which Azure ML sets.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from batchclf.errors import UsageError
from batchclf.results.records import Shard

MAX_COUNT = 99_999
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Said:
    """What a scheduler says of this process."""

    scheduler: str
    index: int
    count: int | None
    """None: it does not tell how many there are."""
    variables: Mapping[str, str]
    """What was read."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.variables.items())


@dataclass(frozen=True, slots=True)
class Chosen:
    """A shard, and why it is that one."""

    shard: Shard
    why: str | None = None
    """Said to people; None: they asked for it."""


def choose_shard(asked: str | None, environment: Mapping[str, str]) -> Chosen:
    """The shard of `--shard I/N`, or `auto/N`; else that of the environment, else the whole job.

    Raises:
        UsageError: neither says it, or they contradict each other.
    """
    index, count = (None, None) if asked is None else _parse(asked)
    if index is not None and count is not None:
        return Chosen(Shard(index, count))
    found = list(_said(environment))
    if not found:
        if asked is None:
            return Chosen(Shard())
        raise UsageError(
            f"--shard: {asked}: no variable of a scheduler says which shard this is (Kubernetes, "
            "Slurm, AWS Batch, Cloud Run, torch.distributed); write I/N, such as 3/16"
        )
    shards = {_settled(one, count) for one in found}
    if len(shards) > 1:
        told = "; ".join(f"{one.scheduler}: {one}" for one in found)
        raise UsageError(
            f"--shard: two schedulers say different things ({told}); give --shard I/N, or "
            "--shard 0/1 for the whole job"
        )
    (shard,) = shards
    why = f"as {found[0].scheduler} says: {found[0]}"
    return Chosen(shard, f"shard {shard.index}/{shard.count}, {why}")


def _parse(text: str) -> tuple[int | None, int]:
    match = re.fullmatch(rf"(\d+|{AUTO})/(\d+)", text)
    index = None if match is None or match[1] == AUTO else int(match[1])
    if match is None or not (index or 0) < int(match[2]) <= MAX_COUNT:
        raise UsageError(
            f"--shard: found {text!r}; write I/N with I from 0 to N-1, such as 3/16, or auto/N "
            "where a scheduler says which it is"
        )
    return index, int(match[2])


def _settled(said: Said, count: int | None) -> Shard:
    """A scheduler's shard; `count`: how many the user says that there are."""
    if said.count is None and count is None:
        raise UsageError(
            f"--shard: {said.scheduler} says which shard this is ({said}), but not of how many: "
            "give --shard auto/N with their number, or --shard 0/1 for the whole job"
        )
    if None not in (said.count, count) and said.count != count:
        raise UsageError(
            f"--shard: auto/{count}, but {said.scheduler} says that there are {said.count} "
            f"({said}); give --shard I/{count} with the shard's own number"
        )
    total = count if said.count is None else said.count
    assert total is not None
    if not 0 <= said.index < total <= MAX_COUNT:
        raise UsageError(
            f"--shard: {said.scheduler} says {said}: no shard {said.index} of {total}; shards are "
            f"numbered from 0 to {total - 1}"
        )
    return Shard(said.index, total)


# ---- what schedulers say -------------------------------------------------------------------------

_PLAIN: tuple[tuple[str, str, str | None], ...] = (
    ("Kubernetes", "JOB_COMPLETION_INDEX", None),
    ("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("Cloud Run", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    ("torch.distributed", "RANK", "WORLD_SIZE"),
)
"""Name, number from 0, and how many there are."""


def _said(environment: Mapping[str, str]) -> Iterator[Said]:
    for scheduler, index, count in _PLAIN:
        names = [name for name in (index, count) if name is not None and name in environment]
        if index in names:
            numbers = _numbers(scheduler, environment, names)
            yield Said(scheduler, numbers[0], (*numbers, None)[1], _read(environment, names))
    if "SLURM_ARRAY_TASK_ID" in environment:
        yield _slurm(environment)


def _slurm(environment: Mapping[str, str]) -> Said:
    """Tasks may be numbered from any number on, and by steps; but none may be left out."""
    prefix = "SLURM_ARRAY_TASK_"
    names = [f"{prefix}{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")]
    names = [name for name in names if name in environment]
    read = _read(environment, names)
    numbers = dict(zip(names, _numbers("Slurm", environment, names), strict=True))
    own, first = numbers[f"{prefix}ID"], numbers.get(f"{prefix}MIN", 0)
    step = numbers.get(f"{prefix}STEP", 1) or 1
    count, last = numbers.get(f"{prefix}COUNT"), numbers.get(f"{prefix}MAX")
    if None not in (count, last) and (last - first) // step + 1 != count:  # type: ignore[operator]
        told = " ".join(f"{name}={value}" for name, value in read.items())
        raise UsageError(
            f"--shard: Slurm's array leaves numbers out ({told}), so which part of the listing a "
            "task is to take is not told: use --array=0-N, or --shard I/N in the script"
        )
    return Said("Slurm", (own - first) // step, count, read)


def _read(environment: Mapping[str, str], names: list[str]) -> dict[str, str]:
    return {name: environment[name] for name in names}


def _numbers(scheduler: str, environment: Mapping[str, str], names: list[str]) -> list[int]:
    for name in names:
        if not re.fullmatch(r"\d{1,9}", environment[name]):
            raise UsageError(
                f"--shard: {scheduler}: {name}={environment[name]!r} is no number; give --shard "
                "I/N, or --shard 0/1 for the whole job"
            )
    return [int(environment[name]) for name in names]
