"""One writer per output: the lock of one machine, and the lease that other machines see."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchclf.errors import EnvironmentFailed, ResumeRefused
from batchclf.results import lock
from batchclf.results.files import RunFiles
from batchclf.results.lock import LEASE_S, Lease, only_writer
from batchclf.system.machine import boot_id
from tests.engines.common import fault

ELSEWHERE = {"host": "node-17", "boot_id": "another-machine", "pid": 4711}
OTHER_BOOT = {"host": socket.gethostname(), "boot_id": "another-boot"}
UPTIME_S = 15.0
HERE = {"host": socket.gethostname(), "boot_id": boot_id()}


FAILING_DISK = """
touch = os.utime

def touch_or_fail(path):
    if (FOLDER / "broken").exists():
        raise OSError(5, "Input/output error")
    touch(path)

os.utime = touch_or_fail
"""


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems answer."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine runs since a moment ago."""
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: UPTIME_S}.__getitem__)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a second."""
    for name, value in (("LEASE_S", 1.0), ("RENEW_S", 0.05), ("SETTLE_S", 0.05)):
        monkeypatch.setattr(lock, name, value)


def leave_lease(files: RunFiles, age_s: float, **holder: Any) -> None:
    """A lease of somebody's, last renewed so long ago."""
    facts = {"host": "", "pid": 1, "since": "2026-01-01T00:00:00", "token": "0", **holder}
    files.lease.write_text(json.dumps(facts))
    then = time.time() - age_s
    os.utime(files.lease, (then, then))


def holds(lease: Lease, files: RunFiles) -> bool:
    lease.check()
    return bool(json.loads(files.lease.read_bytes())["pid"] == os.getpid())


# ---- whose it is ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("just_started")
@pytest.mark.parametrize(
    ("holder", "age_s"),
    [(ELSEWHERE, LEASE_S + 1), (OTHER_BOOT, UPTIME_S + 5), (OTHER_BOOT, LEASE_S + 1), (HERE, 0)],
    ids=["of a machine that is gone", "before a restart", "of a twin gone", "of a dead process"],
)
def test_a_lease_that_nobody_can_be_behind_is_taken_over(
    files: RunFiles, holder: dict[str, Any], age_s: float
) -> None:
    leave_lease(files, age_s, **holder)
    with only_writer(files) as lease:
        assert holds(lease, files)
    assert not files.lease.exists()


def test_a_lease_that_another_machine_renews_is_respected_and_its_holder_named(
    files: RunFiles,
) -> None:
    leave_lease(files, LEASE_S - 10, **ELSEWHERE)
    before = files.lease.read_bytes()
    with pytest.raises(ResumeRefused, match="pid 4711 on host node-17") as refused:  # noqa: SIM117
        with only_writer(files):
            pass
    assert refused.value.exit_code == 2
    assert files.lease.read_bytes() == before
    assert sorted(os.listdir(files.folder)) == [".lease.json", ".lock"]


@pytest.mark.usefixtures("just_started")
def test_a_lease_that_a_machine_of_the_same_name_renews_is_respected(files: RunFiles) -> None:
    leave_lease(files, UPTIME_S - 5, **OTHER_BOOT)
    before = files.lease.read_bytes()
    with pytest.raises(ResumeRefused, match="pid 1 on host"), only_writer(files):
        pass
    assert files.lease.read_bytes() == before


def test_a_torn_lease_is_nobodys(files: RunFiles) -> None:
    files.lease.write_bytes(b'{"host": "node-17", "boo')
    with only_writer(files) as lease:
        assert holds(lease, files)


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(("age_s", "is_free"), [(LEASE_S - 10, False), (LEASE_S + 1, True)])
def test_without_locks_the_lease_alone_decides(
    files: RunFiles, age_s: float, is_free: bool
) -> None:
    leave_lease(files, age_s, **HERE)
    if is_free:
        with only_writer(files) as lease:
            assert holds(lease, files)
        return
    with pytest.raises(ResumeRefused, match="pid 1 on host"), only_writer(files):
        pass


# ---- while it is held ----------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
def test_a_lease_is_kept_fresh(files: RunFiles) -> None:
    renewals = threading.Semaphore(0)
    with only_writer(files, renewals.release) as lease:
        first = files.lease.stat().st_mtime_ns
        for _ in range(3):
            assert renewals.acquire(timeout=10)
        assert files.lease.stat().st_mtime_ns > first
        assert holds(lease, files)


def failure_of(lease: Lease) -> Exception:
    """What ends the claim, once it is noticed."""
    for _ in range(1000):
        try:
            lease.check()
        except (ResumeRefused, EnvironmentFailed) as error:
            return error
        time.sleep(0.01)
    pytest.fail("it is not noticed")


@pytest.mark.usefixtures("hasty")
def test_a_lease_that_was_taken_away_is_noticed_and_left_to_its_new_holder(
    files: RunFiles,
) -> None:
    renewed: list[float] = []
    with only_writer(files, lambda: renewed.append(time.monotonic())) as lease:
        leave_lease(files, 0, **ELSEWHERE)
        assert isinstance(failure_of(lease), ResumeRefused)
        num_renewed = len(renewed)
        time.sleep(0.2)
        assert len(renewed) == num_renewed
    assert json.loads(files.lease.read_bytes())["host"] == "node-17"


@pytest.mark.usefixtures("hasty")
def test_a_folder_that_is_removed_is_the_environments_failure(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "out")
    with only_writer(files) as lease:
        for entry in files.folder.iterdir():
            entry.unlink()
        files.folder.rmdir()
        error = failure_of(lease)
    assert isinstance(error, EnvironmentFailed)
    assert "No such file or directory" in str(error)


@pytest.mark.usefixtures("hasty")
def test_a_lease_that_cannot_be_renewed_is_given_up_after_its_time(
    files: RunFiles, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("fault")
    for name, value in fault(folder, FAILING_DISK).items():
        monkeypatch.setenv(name, value)
    with only_writer(files) as lease:
        (folder / "fault" / "broken").touch()
        time.sleep(0.3)
        lease.check()
        error = failure_of(lease)
    assert isinstance(error, EnvironmentFailed)
    assert "Input/output error" in str(error)


# ---- what is left --------------------------------------------------------------------------------


def entries(folder: Path) -> Iterator[str]:
    return (entry.name for entry in folder.rglob("*"))


def test_a_folder_made_for_nothing_is_removed_again(tmp_path: Path) -> None:
    with only_writer(RunFiles(tmp_path / "runs" / "out")):
        pass
    assert list(entries(tmp_path)) == ["runs"]


def test_an_output_is_let_go_of_after_an_error_too(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), only_writer(files):  # noqa: PT012
        files.predictions.write_text("")
        assert files.lease.exists()
        raise ZeroDivisionError
    assert set(entries(tmp_path)) == {"out", ".lock", "predictions.jsonl"}


def test_a_folder_with_results_stays(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "out")
    with only_writer(files):
        files.predictions.write_text("")
    assert set(entries(tmp_path)) == {"out", ".lock", "predictions.jsonl"}


def test_a_lock_on_a_file_that_has_just_been_removed_is_none(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may remove it with the folder, while another is about to get it."""
    lock_now = fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock_now)
        files.lock.unlink()
        lock_now(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with only_writer(files), pytest.raises(ResumeRefused), only_writer(files):
        pass


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "out")
    files.folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    files.lock.symlink_to(elsewhere)
    with pytest.raises(EnvironmentFailed), only_writer(files):
        pass
    assert not elsewhere.exists()
