"""The fault harness in small, without its limits of time; `python -m tests.faults` is all of it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import BY_HAND, ROOT
from tests.faults import bad_input, calls, disks, kill, listing, power, processes, signals
from tests.faults.report import Options, Report

needs_root = pytest.mark.skipif(not disks.can_mount(), reason="only root mounts file systems")
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc compiles the shim")
needs_mkfs = pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="mkfs.ext4 is not in PATH")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def passed(
    scenario: Callable[[Options], Report], folder: Path, count: int, lanes: int = 2
) -> Report:
    """Run a scenario in small; its report."""
    report = scenario(Options(folder, seed=5, count=count, num_lanes=lanes, is_timed=False))
    assert report.problems == []
    assert report.num_checks > 0
    return report


def test_a_job_whose_group_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    report = passed(partial(kill.kill_group, num_images=3_000), tmp_path, 4)
    assert report.figures["num_kills"] == 4


def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    report = passed(partial(kill.kill_parent, num_images=3_000), tmp_path, 2)
    assert report.figures["num_kills"] == 2


def test_a_job_whose_worker_is_killed_goes_on_by_itself(tmp_path: Path) -> None:
    report = passed(partial(kill.kill_worker, num_images=3_000), tmp_path, 3)
    assert report.figures["num_kills"] == 3


@needs_gcc
@needs_strace
def test_a_kill_at_any_call_on_the_output_loses_nothing(tmp_path: Path) -> None:
    report = passed(
        partial(calls.kill_at_calls, slow_write_ms=0, names=("fresh", "resumed")), tmp_path, 6
    )
    assert report.figures["num_kills"] == 6


@needs_gcc
def test_a_call_on_the_output_that_fails_is_told_and_loses_nothing(tmp_path: Path) -> None:
    report = passed(
        partial(calls.fail_calls, slow_write_ms=0, names=("fresh", "retried")), tmp_path, 8
    )
    assert report.figures["num_failures"] == 8


@needs_root
def test_a_full_disk_is_told_and_a_larger_one_finishes_the_job(tmp_path: Path) -> None:
    sizes = [64 << 10, 256 << 10]
    report = passed(partial(disks.small_disk, num_images=1_000, sizes=sizes), tmp_path, 4)
    assert report.figures["num_full"] == 4


@needs_root
@needs_gcc
@needs_mkfs
def test_what_was_called_durable_survives_a_power_loss(tmp_path: Path) -> None:
    report = passed(
        partial(power.power_loss, num_images=320, slow_write_ms=350), tmp_path, 4, lanes=3
    )
    assert report.figures["num_lost"] == 0
    assert report.figures["num_lost_control"] > 0


@BY_HAND
def test_a_signal_stops_a_job_at_any_moment(tmp_path: Path) -> None:
    report = passed(partial(signals.signals, num_images=1_000), tmp_path, 4)
    assert report.figures["num_sigterms"] == 4


@needs_root
def test_a_signal_stops_a_job_that_is_the_first_process(tmp_path: Path) -> None:
    passed(partial(signals.as_pid_1, num_images=1_000), tmp_path, 2)


@BY_HAND
def test_a_worker_that_stands_still_is_replaced(tmp_path: Path) -> None:
    report = passed(partial(processes.stall, num_images=3_000), tmp_path, 1)
    assert report.figures["num_stops"] == 1


@BY_HAND
def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    report = passed(partial(processes.locks, num_images=48_000), tmp_path, 1)
    assert report.figures["num_taken_over"] == 1


@BY_HAND
@needs_gcc
def test_shards_that_start_at_once_are_one_job(tmp_path: Path) -> None:
    report = passed(partial(listing.listing, num_images=300, max_shards=3), tmp_path, 4)
    assert (report.figures["num_lost"], report.figures["num_foreign"]) == (0, 0)


def test_poison_costs_its_own_records(tmp_path: Path) -> None:
    kinds = ("segfault", "hang", "bomb")
    report = passed(
        partial(bad_input.poison, num_images=300, kinds=kinds, max_seconds=2.5), tmp_path, 3
    )
    assert report.figures["num_right_codes"] == 6


def test_damaged_images_get_one_record_each(tmp_path: Path) -> None:
    passed(bad_input.mutations, tmp_path, 300)


def test_bad_files_change_nothing_for_the_others(tmp_path: Path) -> None:
    source = ROOT / "samples" / "digits"
    passed(partial(bad_input.bad_share, source=source, num_good=400), tmp_path, 1)


def test_the_command_prints_json_and_ends_with_1_where_a_check_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "signals", "--count", "1", "--duration", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # nothing was checked in no time
    assert '"passed": false' in done.stdout.splitlines()[-1]
