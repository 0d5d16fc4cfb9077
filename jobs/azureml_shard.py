"""The entry script of azureml_parallel.yaml: runs the shards that a mini-batch names."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

asked = argparse.Namespace()


def init() -> None:
    """Read what the job says; Azure ML calls it once in each process, with arguments of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.parse_known_args(namespace=asked)


def run(mini_batch: Sequence[str]) -> list[str]:
    """Run each shard to its end, or go on with it: `00003-of-00256` is --shard 3/256.

    One that does not complete raises an error, and Azure ML gives its mini-batch to another node.
    """
    for name in mini_batch:
        index, _, count = Path(name).name.partition("-of-")
        shard = f"{int(index)}/{int(count)}"
        command = [sys.executable, "-m", "batchclf", "run", asked.job, "--shard", shard]
        command += ["-i", asked.input, "-o", asked.output]
        subprocess.run(command, check=True)  # noqa: S603 - of what the job itself says
    return [Path(name).name for name in mini_batch]
