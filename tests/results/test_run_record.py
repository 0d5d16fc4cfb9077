"""run.json while a job runs: what it says of its status, and of what survives a power loss."""

import errno
import os
import signal
from pathlib import Path

import pytest

from batchclf.errors import EnvironmentFailed, Interrupted, WorkerFailed
from batchclf.results.files import RunFiles
from batchclf.results.run_record import Durable, kept_status, mark_ended, read_run, write_run
from batchclf.system.machine import boot_id

STOPPED = Interrupted(signal.SIGTERM, "run it again")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


def status_of(files: RunFiles) -> object:
    return (read_run(files) or {})["status"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (STOPPED, "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (EnvironmentFailed("the disk is full"), "failed"),
        (ZeroDivisionError("a bug"), "failed"),
    ],
)
def test_the_status_tells_how_a_run_ended(
    files: RunFiles, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), kept_status(files, {"fact": 1}):  # noqa: PT012
        assert status_of(files) == "running"
        raise error
    run = read_run(files) or {}
    assert (run["status"], run["fact"]) == (status, 1)
    assert run["error"] == (str(error) or "KeyboardInterrupt")


def test_the_status_is_complete_only_after_all_work(files: RunFiles) -> None:
    with kept_status(files, {}) as state:
        state.note_durable(100, 7)
        run = read_run(files) or {}
        assert (run["status"], run["durable"]["num_images"]) == ("running", 7)
    run = read_run(files) or {}
    assert run["status"] == "complete"
    assert Durable(**run["durable"]) == Durable(100, 7, boot_id())


def test_what_says_complete_is_never_belied_by_an_error(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are durable by then; a folder that cannot be synced may cost the word alone."""

    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")

    with kept_status(files, {}) as state:
        state.note_durable(100, 7)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(EnvironmentFailed, match=r"run\.json"):
            state.note_durable(200, 9)
    assert status_of(files) == "complete"


def test_a_disk_that_fails_the_status_as_well_does_not_hide_the_cause(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ZeroDivisionError) as failed, kept_status(files, {}):  # noqa: PT012
        monkeypatch.setattr(os, "fsync", fail)
        raise ZeroDivisionError
    assert "run.json" in failed.value.__notes__[0]
    assert status_of(files) == "running"


@pytest.mark.parametrize(
    ("before", "error", "after"),
    [
        ("running", STOPPED, "interrupted"),
        ("running", WorkerFailed("died"), "failed"),
        ("complete", STOPPED, "complete"),
        ("failed", STOPPED, "failed"),
    ],
)
def test_another_process_may_say_how_a_run_ended_that_no_longer_can(
    files: RunFiles, before: str, error: Interrupted | WorkerFailed, after: str
) -> None:
    write_run(files, {"status": before, "fact": 1})
    mark_ended(files, error)
    run = read_run(files) or {}
    assert (run["status"], run["fact"]) == (after, 1)


def test_nothing_is_said_where_nothing_had_begun(files: RunFiles) -> None:
    mark_ended(files, STOPPED)
    assert read_run(files) is None


@pytest.mark.parametrize(
    ("noted", "is_of_this_boot"), [(boot_id(), True), ("before", False), ("", False)]
)
def test_what_was_written_later_is_relied_on_only_while_the_machine_stays_up(
    noted: str, is_of_this_boot: bool
) -> None:
    assert Durable(100, 7, noted).is_of_this_boot is is_of_this_boot
