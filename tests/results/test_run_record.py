"""run.json while a job runs: what it says of its status, and of what survives a power loss."""

import errno
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from batchclf.errors import EnvironmentFailed, Interrupted, ResumeRefused, WorkerFailed
from batchclf.results.files import RunFiles
from batchclf.results.records import PrecisionCheck, Shard
from batchclf.results.run_record import (
    Durable,
    Retry,
    RunRecord,
    RunState,
    Segment,
    kept_status,
    mark_ended,
    read_run,
    write_run,
)
from batchclf.system.machine import boot_id
from tests.results.common import a_record

KEYS = {one.name: one for one in fields(RunRecord) if one.default is MISSING}
"""Those that must be there."""
STOPPED = Interrupted(signal.SIGTERM, "run it again")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@contextmanager
def begun(files: RunFiles) -> Iterator[RunState]:
    write_run(files, a_record())
    with kept_status(files, a_record()) as state:
        yield state


def run_of(files: RunFiles) -> RunRecord:
    record = read_run(files)
    assert record is not None
    return record


def status_of(files: RunFiles) -> object:
    return run_of(files).status


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
    with pytest.raises(type(error)), begun(files):  # noqa: PT012
        assert status_of(files) == "running"
        raise error
    assert status_of(files) == status
    assert run_of(files).error == (str(error) or "KeyboardInterrupt")


def test_the_status_is_complete_only_after_all_work(files: RunFiles) -> None:
    with begun(files) as state:
        state.note_durable(100, 7)
        assert (status_of(files), run_of(files).durable.num_images) == ("running", 7)
    assert status_of(files) == "complete"
    assert run_of(files).durable == Durable(100, 7, boot_id())


def test_what_says_complete_is_never_belied_by_an_error(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are durable by then; a folder that cannot be synced may cost the word alone."""

    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")

    with begun(files) as state:
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

    with pytest.raises(ZeroDivisionError) as failed, begun(files):  # noqa: PT012
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
    write_run(files, a_record(status=before))
    mark_ended(files, error)
    assert status_of(files) == after


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


# ---- what it says --------------------------------------------------------------------------------


def test_all_that_it_says_is_read_back_as_it_was(files: RunFiles) -> None:
    segment = Segment(
        first=0,
        started_at="2026-01-01T00:00:00+00:00",
        batchclf="1.0",
        provider="CPUExecutionProvider",
        device="CPU",
        batch_size=8,
        num_streams=2,
        num_workers=2,
        backend="threads",
        limits={"max_pixels": 9, "max_seconds": 60.0},
    )
    record = a_record(
        status="failed",
        error="the disk is full",
        ended_at="2026-01-02T00:00:00+00:00",
        precision_check=PrecisionCheck(200, 0.99, 0.01),
        durable=Durable(100, 7, "boot"),
        segments=(segment,),
        retry=Retry(**vars(segment), codes=("timeout",)),
    )
    write_run(files, record)
    assert read_run(files) == record


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is no JSON"),
        (b"\0\0\0", "it is no JSON"),
        (b'{"status":', "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[]", "its format_version is None, this version's 1"),
        (b"1", "its format_version is None"),
        (b'{"status": "complete"}', "its format_version is None"),
        (b'{"format_version": 2}', "its format_version is 2, this version's 1"),
    ],
)
def test_a_run_json_that_is_damaged_or_of_another_version_is_one_clear_error(
    files: RunFiles, data: bytes, why: str
) -> None:
    files.run.write_bytes(data)
    with pytest.raises(ResumeRefused, match=re.escape(why)) as refused:
        read_run(files)
    assert str(files.run) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [*KEYS, "fingerprint.listing", "a_new_key"])
def test_a_key_that_is_missing_or_unknown_is_named(files: RunFiles, key: str) -> None:
    write_run(files, a_record())
    said = json.loads(files.run.read_bytes())
    if key == "a_new_key":
        said[key] = 1
    elif key == "fingerprint.listing":
        del said["fingerprint"]["listing"]
    else:
        del said[key]
    files.run.write_text(json.dumps(said))
    with pytest.raises(ResumeRefused, match=key):
        read_run(files)


def test_the_run_records_of_other_shards_are_found_and_nothing_else(tmp_path: Path) -> None:
    names = ("run.json", "run-00000-of-00002.json", "run-00001-of-00002.json", "run-notes.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    found = RunFiles(tmp_path, Shard(1, 2)).of_others()
    assert [one.run.name for one in found] == ["run-00000-of-00002.json", "run.json"]
