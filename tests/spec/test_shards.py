"""Which shard a process is, as asked for or as the scheduler that started it says."""

from collections.abc import Mapping

import pytest

from batchclf.errors import UsageError
from batchclf.results.records import Shard
from batchclf.spec.shards import choose_shard

KUBERNETES = {"JOB_COMPLETION_INDEX": "3"}
SLURM = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "10",
    "SLURM_ARRAY_TASK_STEP": "3",
}
CLOUD_RUN = {"CLOUD_RUN_TASK_INDEX": "3", "CLOUD_RUN_TASK_COUNT": "16"}
AWS = {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "2"}
TORCH = {"RANK": "1", "WORLD_SIZE": "2"}


def test_the_whole_job_is_one_shard_where_nothing_says_otherwise() -> None:
    assert choose_shard(None, {"PATH": "/bin", "SLURM_JOB_ID": "1"}).shard == Shard()


@pytest.mark.parametrize(
    ("environment", "asked", "shard"),
    [
        (CLOUD_RUN, None, Shard(3, 16)),
        (CLOUD_RUN, "auto/16", Shard(3, 16)),
        (AWS, None, Shard(0, 2)),
        (TORCH, None, Shard(1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None, Shard(0, 1)),
        (KUBERNETES, "auto/16", Shard(3, 16)),
        (SLURM, None, Shard(2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, None, Shard(0, 8)),
        (KUBERNETES | CLOUD_RUN, None, Shard(3, 16)),
    ],
)
def test_a_scheduler_says_which_shard_it_is_and_that_is_told(
    environment: Mapping[str, str], asked: str | None, shard: Shard
) -> None:
    if asked is None and "JOB_COMPLETION_INDEX" in environment:
        asked = "auto/16"
    chosen = choose_shard(asked, environment)
    assert chosen.shard == shard
    assert chosen.why is not None
    assert chosen.why.startswith(f"shard {shard.index}/{shard.count}, as ")
    name, value = next(iter(environment.items()))
    assert f"{name}={value}" in chosen.why


def test_what_is_asked_for_counts_more_than_what_a_scheduler_says() -> None:
    chosen = choose_shard("1/4", CLOUD_RUN)
    assert (chosen.shard, chosen.why) == (Shard(1, 4), None)


@pytest.mark.parametrize(
    ("environment", "asked", "said"),
    [
        ({}, "auto/16", "no variable of a scheduler says which shard this is"),
        (KUBERNETES, None, "but not of how many: give --shard auto/N"),
        (CLOUD_RUN, "auto/8", "auto/8, but Cloud Run says that there are 16"),
        (CLOUD_RUN | TORCH, None, "two schedulers say different things"),
        (SLURM | {"SLURM_ARRAY_TASK_COUNT": "3"}, None, "leaves numbers out"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None, "no shard 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, None, "RANK='-1' is no number"),
        (KUBERNETES, "auto/3", "no shard 3 of 3"),
    ],
)
def test_what_is_not_told_or_contradicts_itself_is_refused(
    environment: Mapping[str, str], asked: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match="--shard: ") as caught:
        choose_shard(asked, environment)
    assert said in str(caught.value)


@pytest.mark.parametrize("asked", ["3", "3/3", "-1/3", "a/b", "auto/0", "0/100000", "1/2/3"])
def test_what_is_no_shard_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="write I/N with I from 0 to N-1"):
        choose_shard(asked, CLOUD_RUN)
