"""Shards that are killed, run again and merged: the bytes of one run.

python -m tests.faults.merged_shards [ROUNDS]
"""

import os
import random
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from batchclf.commands.merge import merge_shards
from tests.engines.common import started
from tests.tiny import link_digits, run_here, write_tiny_job


def check(folder: Path, num_shards: int, num_killed: int, num_images: int, seed: int) -> None:
    """Start all shards at once, kill some when they have written something, run these again."""
    folder.mkdir()
    images = link_digits(folder / "in", num_images)
    (folder / "whole").mkdir()
    run_here(write_tiny_job(folder / "whole", input=str(images)))
    job = write_tiny_job(folder, input=str(images))
    shards = [f"{index}/{num_shards}" for index in range(num_shards)]
    killed = random.Random(seed).sample(range(num_shards), num_killed)
    with ExitStack() as stack:
        runs = [stack.enter_context(started(job, "--shard", shard)) for shard in shards]
        for index in killed:
            name = f"predictions-{index:05d}-of-{num_shards:05d}.jsonl"
            runs[index].wait_until((folder / "out" / name).exists)
            os.killpg(runs[index].process.pid, signal.SIGKILL)
        for index, run in enumerate(runs):
            assert run.end() == 0 or index in killed, run.stderr
        again = [stack.enter_context(started(job, "--shard", shards[one])) for one in killed]
        for run in again:
            assert run.end() == 0, run.stderr
    merge_shards(folder / "out")
    found = (folder / "out" / "predictions.jsonl").read_bytes()
    assert found == (folder / "whole" / "out" / "predictions.jsonl").read_bytes()


def main() -> None:
    """Rounds of 16 shards, three of which are killed."""
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder) / "0", num_shards=16, num_killed=3, num_images=1600, seed=seed)
        print(f"round {seed + 1}: the bytes of one run", flush=True)


if __name__ == "__main__":
    main()
