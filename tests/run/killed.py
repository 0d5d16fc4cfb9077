"""`python -m tests.run.killed JOB OUT COMMAND`: kill a run at each of its calls on OUT in turn.

COMMAND is overwrite, extend or retry, on a finished output. After each kill, the same command, or
plain `run` where that is to do as well, must leave what an undisturbed one leaves. Each run is a
process of its own, forked before any thread was started. Prints one JSON line per kill.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from batchclf.spec.options import RunOptions
from tests.tiny import run_here

COMMANDS = {
    "overwrite": RunOptions(overwrite=True),
    "extend": RunOptions(extend=True),
    "retry": RunOptions(retry_failed=True),
}
CALLS = ("write", "ftruncate", "replace", "unlink")
"""What changes a folder; a kill between two others leaves the same."""


def kill_at(number: int, folder: Path) -> Iterator[int]:
    """Let the `number`-th call of CALLS on a folder kill this process; gives the count so far."""
    count = [0]

    def killing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(target: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            if Path(path).is_relative_to(folder):
                count[0] += 1
                if count[0] == number:
                    if name == "write":  # torn
                        call(target, rest[0][: len(rest[0]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(target, *rest)

        return called

    for name in CALLS:
        setattr(os, name, killing(getattr(os, name), name))
    while True:
        yield count[0]


def forked(work: Callable[[], object]) -> int:
    """Do something in another process: its wait status."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(job: Path, out: Path, command: str) -> None:
    options = COMMANDS[command]
    before = out.with_name("before")
    shutil.copytree(out, before)
    expected: list[bytes] = []
    number = 0
    while True:
        shutil.rmtree(out)
        shutil.copytree(before, out)

        def disturbed(number: int = number) -> None:
            counts = kill_at(number, out)
            next(counts)
            run_here(job, options)

        killed = forked(disturbed) != 0
        if killed:
            # Whatever was begun is finished by the same command, and an --overwrite by any.
            again = RunOptions() if command == "overwrite" else options
            assert forked(partial(run_here, job, again)) == 0, number
        lines = (out / "predictions.jsonl").read_bytes().splitlines()
        status = json.loads((out / "run.json").read_bytes())["status"]
        left = sorted(path.name for path in out.iterdir() if path.suffix == ".tmp")
        if number == 0:
            assert not killed
            expected = lines
        told = {"number": number, "same": lines == expected, "status": status, "left": left}
        print(json.dumps({**told, "killed": killed}), flush=True)
        if number and not killed:
            return
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
