"""Parts of a job's records: each committed once, by whoever is first, and whole."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from batchclf.errors import EnvironmentFailed
from batchclf.results.files import RunFiles, remove_folder
from batchclf.results.lines import encode_record
from batchclf.results.listing import Listing
from batchclf.results.parts import Folders, find_parts, read_part
from batchclf.results.records import Failure, ImageRef, Record, Shard
from batchclf.results.writer import RecordWriter, discard, remove_leftovers
from tests.results.common import placed

NUM_IMAGES = 20


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@pytest.fixture
def listing(files: RunFiles) -> Listing:
    return placed(files, [b"%02d.jpg" % number for number in range(NUM_IMAGES)])


@pytest.fixture
def folders(files: RunFiles) -> Folders:
    found = Folders(files.parts, files.new_drafts())
    found.make()
    found.make_parts()
    return found


def lines(first: int, stop: int, *, code: str | None = None) -> bytes:
    outcome = () if code is None else Failure(code, "")
    return b"".join(
        encode_record(Record(ImageRef(number, b"%02d.jpg" % number), outcome))
        for number in range(first, stop)
    )


def commit(folders: Folders, first: int, stop: int, *, code: str | None = None) -> bool:
    draft = folders.new_draft(first)
    draft.write_bytes(lines(first, stop, code=code))
    return folders.commit(draft, first)


@pytest.mark.parametrize("number", [None, errno.EPERM], ids=["links", "no links"])
def test_of_attempts_at_one_part_the_first_is_committed_and_none_is_lost_or_changed(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refused(*names: object) -> None:
        raise OSError(number, "no links here")

    if number is not None:
        monkeypatch.setattr(os, "link", refused)
    codes = [f"attempt_{attempt}" for attempt in range(8)]
    with ThreadPoolExecutor(len(codes)) as pool:
        was_first = list(pool.map(lambda code: commit(folders, 3, 5, code=code), codes))
    assert was_first.count(True) == 1
    assert folders.path(3).read_bytes() == lines(3, 5, code=codes[was_first.index(True)])
    assert os.listdir(folders.drafts) == []


def test_a_commit_that_was_done_though_the_server_said_otherwise_is_known_as_ones_own(
    folders: Folders,
) -> None:
    draft = folders.new_draft(0)
    draft.write_bytes(lines(0, 2))
    os.link(draft, folders.path(0))
    assert folders.commit(draft, 0)


def test_a_draft_that_is_gone_when_its_part_is_there_is_nobodys(folders: Folders) -> None:
    """As where the server of a file system without links was asked twice to rename it."""
    folders.path(0).write_bytes(lines(0, 2))
    with patch("batchclf.results.parts.place_first", side_effect=FileExistsError):
        assert not folders.commit(folders.new_draft(0), 0)
    assert folders.path(0).read_bytes() == lines(0, 2)


def test_who_is_left_over_from_an_earlier_start_commits_nothing_more(
    files: RunFiles, folders: Folders
) -> None:
    draft = folders.new_draft(0)
    writer = RecordWriter(draft)
    remove_leftovers(files, is_complete=False)
    assert not folders.drafts.exists()
    with pytest.raises(EnvironmentFailed, match="is gone"):
        writer.sync()
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        folders.commit(draft, 0)
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        RecordWriter(folders.new_draft(3))
    assert os.listdir(folders.parts) == []


def test_parts_are_found_in_order_from_a_position_on_with_what_they_count(
    files: RunFiles, listing: Listing, folders: Folders
) -> None:
    for first, stop, code in ((0, 3, None), (8, 10, "truncated"), (3, 5, None)):
        commit(folders, first, stop, code=code)
    (folders.parts / "notes.txt").write_text("x")
    found = list(find_parts(files, listing, 0))
    assert [(one.first, one.stop, one.num_ok) for one in found] == [
        (0, 3, 3),
        (3, 5, 2),
        (8, 10, 0),
    ]
    assert found[2].errors_by_code == {"truncated": 2}
    assert found[0].num_bytes == len(lines(0, 3))
    assert [one.first for one in find_parts(files, listing, 3)] == [3, 8]
    assert list(find_parts(RunFiles(files.folder, Shard(0, 2)), listing, 0)) == []


@pytest.mark.parametrize(
    "data",
    [lines(5, 8)[:-4], lines(5, 8) + b"half", b"", lines(4, 7), lines(5, 6) + b"\0" * 40],
    ids=["cut", "more", "empty", "of other images", "zeros"],
)
def test_a_damaged_part_is_removed_and_its_images_are_to_be_done_again(
    files: RunFiles, listing: Listing, folders: Folders, data: bytes
) -> None:
    commit(folders, 2, 5)
    folders.path(5).write_bytes(data)
    commit(folders, 8, NUM_IMAGES)
    assert [one.first for one in find_parts(files, listing, 0)] == [2, 8]
    assert not folders.path(5).exists()


def test_a_part_of_another_attempt_is_read_and_one_of_other_images_is_refused(
    listing: Listing, folders: Folders
) -> None:
    commit(folders, 5, 9)
    assert read_part(folders, 5, listing.paths(5, 9)).num_images == 4
    with pytest.raises(EnvironmentFailed, match="holds other records"):
        read_part(folders, 5, listing.paths(5, 8))


def test_starting_anew_and_a_complete_job_take_the_parts_of_their_shard_away(
    files: RunFiles, folders: Folders
) -> None:
    other = Folders(RunFiles(files.folder, Shard(1, 2)).parts, folders.drafts)
    for one in (folders, other):
        one.make_parts()
    remove_leftovers(files, is_complete=False)
    assert folders.parts.exists()
    discard(files)
    assert sorted(os.listdir(files.folder)) == [other.parts.name]
    folders.make_parts()
    remove_leftovers(files, is_complete=True)
    assert sorted(os.listdir(files.folder)) == [other.parts.name]
    remove_folder(folders.parts)


def test_a_folder_that_nfs_keeps_files_in_for_others_is_left_to_the_next_start(
    files: RunFiles, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a file that is open elsewhere is renamed when it is removed, and its folder stays."""
    (folders.drafts / "token").write_text("x")
    (folders.drafts / "open").write_text("x")
    unlink, is_open = os.unlink, True

    def unlink_as_nfs(name: str, *, dir_fd: int | None = None) -> None:
        if is_open and os.path.basename(name) == "open":
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_as_nfs)
    remove_folder(folders.drafts)
    assert not folders.drafts.exists()
    (left,) = files.old_drafts()
    assert os.listdir(left) == ["open"]
    remove_leftovers(files, is_complete=False)
    is_open = False
    remove_leftovers(files, is_complete=False)
    assert list(files.old_drafts()) == []
