"""The steps of a visit, each run by gpu.py in a process of its own, which may hang or crash.

Says `{"begin": NAME}` on stdout before a row, and `{"row": {"name": NAME, ...}}` after it. What a
row fails with is its `error`; where the device is lost with it, the process ends, and the next one
goes on with the rows after it.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchclf.errors import BatchclfError
from batchclf.runtime.faults import is_device_lost
from batchclf.runtime.sessions import ORT_ERRORS
from tests.benchmarks.gpu_bench import Bench, Rows
from tests.benchmarks.gpu_checks import bundles, correctness, look
from tests.benchmarks.gpu_speeds import copies, decode, end_to_end, throughput

ROW_ERRORS: tuple[type[Exception], ...] = (
    *(BatchclfError, OSError, subprocess.SubprocessError, AssertionError),
    *(AttributeError, LookupError, TypeError),
    *ORT_ERRORS,
)
"""What a row may fail with, and the next one not; faults of these scripts are among them, since
nobody can mend one during a visit."""
STEPS: dict[str, Callable[[Bench], Rows]] = {
    one.__name__: one
    for one in (look, bundles, correctness, copies, throughput, decode, end_to_end)
}


def say(**what: Any) -> None:
    """A line for gpu.py."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """Measure the rows of one step that are not done, until its time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--bundle", nargs="*", required=True)
    parser.add_argument("--batch-sizes", nargs="+", type=int, required=True)
    parser.add_argument("--num-images", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--row-s", type=float, required=True)
    parser.add_argument("--ends-at", type=float, required=True)
    parser.add_argument("--done", nargs="*", required=True)
    bench = Bench(parser.parse_args())
    for name, measure_row in STEPS[bench.arguments.step](bench):
        if name in bench.arguments.done:
            continue
        if time.monotonic() > bench.ends_at:
            say(row={"name": name, "error": "no time is left for it"})
            continue
        say(begin=name)
        try:
            say(row={"name": name, **measure_row()})
        except ROW_ERRORS as error:
            say(row={"name": name, "error": f"{type(error).__name__}: {error}"})
            if is_device_lost(error):
                raise


if __name__ == "__main__":
    main()
