"""Disturbs jobs, and checks that each image still gets exactly one record.

    python -m tests.faults kill --seed 1 --count 300 [--duration 600]

Prints a short table and, as the last line, one JSON object; exit code 1 when a check fails.
Scenarios that mount file systems need root, and mount them in a namespace of their own.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.conftest import ROOT
from tests.faults import bad_input, calls, disks, kill, listing, power, processes, signals
from tests.faults.report import Options, Report


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of disturbance."""

    run: Callable[[Options], Report]
    count: int
    """How often unless told otherwise."""
    mounts: bool = False
    num_lanes: int = 2


ALL = 1_000_000
"""Of the scenarios that go through a list: to its end."""

PHOTOS = ROOT / "samples" / "photos"
SCENARIOS = {
    "kill": Scenario(kill.kill_group, 300),
    "kill-parent": Scenario(kill.kill_parent, 50),
    "kill-worker": Scenario(kill.kill_worker, 50),
    "syscalls-kill": Scenario(calls.kill_at_calls, ALL, num_lanes=calls.NUM_LANES),
    "syscalls-fail": Scenario(calls.fail_calls, ALL, num_lanes=calls.NUM_LANES),
    "small-disk": Scenario(disks.small_disk, 50, mounts=True),
    "power-loss": Scenario(power.power_loss, 100, mounts=True, num_lanes=3),
    "signals": Scenario(signals.signals, 200),
    "pid-1": Scenario(signals.as_pid_1, 40),
    "poison": Scenario(bad_input.poison, 100),
    "mutations": Scenario(bad_input.mutations, 20_000, num_lanes=1),
    "bad-share": Scenario(partial(bad_input.bad_share, source=PHOTOS), 5, num_lanes=1),
    "stall": Scenario(processes.stall, 20),
    "listing": Scenario(listing.listing, 200),
    "locks": Scenario(processes.locks, 5, num_lanes=1),
}


def main() -> None:
    """Run one scenario."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="how many disturbances")
    parser.add_argument("--duration", type=float, default=3600.0, help="begin none after so many s")
    parser.add_argument("--lanes", type=int, help="jobs at a time")
    asked = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # jobs would ignore it, as this does under nohup
    scenario = SCENARIOS[asked.scenario]
    if scenario.mounts and "BATCHCLF_FAULTS_NAMESPACE" not in os.environ:
        os.environ["BATCHCLF_FAULTS_NAMESPACE"] = "1"
        own = ["unshare", "--mount", sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        os.execvp(own[0], own)
    with tempfile.TemporaryDirectory(prefix="batchclf-faults-") as folder:
        count = asked.count or scenario.count
        lanes = asked.lanes or scenario.num_lanes
        options = Options(Path(folder), asked.seed, count, asked.duration, lanes)
        report = scenario.run(options)
    report.print()
    sys.exit(report.exit_code)


if __name__ == "__main__":
    main()
