"""The frozen listing: placed once, whole, by whoever is first; read from anywhere."""

import errno
import hashlib
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.errors import EnvironmentFailed, ResumeRefused
from batchclf.results import listing
from batchclf.results.files import RunFiles
from batchclf.results.identity import Extent
from batchclf.results.lines import encode, find_done
from batchclf.results.listing import drafted, open_listing, place, take_away
from batchclf.results.records import Entry, ImageRef, Prediction, Record, Shard
from batchclf.results.writer import RecordWriter
from batchclf.system import rename
from tests.results.common import IDENTITY, Entries, placed

NAMES = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"_"))


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


@pytest.fixture(scope="module")
def folder_for_listings() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@given(
    entries=st.lists(st.tuples(NAMES, st.just(b"") | NAMES), max_size=12),
    located=st.booleans(),
    start=st.integers(0, 14),
    stop=st.none() | st.integers(0, 14),
    read_bytes=st.integers(1, 64),
)
def test_a_listing_gives_its_paths_back_from_anywhere_to_anywhere(
    folder_for_listings: Path,
    entries: list[tuple[bytes, bytes]],
    located: bool,
    start: int,
    stop: int | None,
    read_bytes: int,
) -> None:
    files = RunFiles(folder_for_listings)
    paths, locations = [path for path, _ in entries], [found for _, found in entries]
    placed(files, paths, locations if located else ())
    found = open_listing(files)
    assert found is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "READ_BYTES", read_bytes)
        refs = list(found.refs(start, stop))
        assert list(found.paths(start, stop)) == paths[start:stop]
    files.listing.unlink()
    locations = locations if found.located else [b""] * len(paths)
    expected = list(map(ImageRef, range(len(paths)), paths, locations))
    assert refs == expected[start:stop]
    fields = [field for entry in entries for field in entry] if found.located else paths
    assert found.extent == Extent(len(paths), sha256(fields))
    assert found.job == IDENTITY


def sha256(paths: list[bytes]) -> str:
    return hashlib.sha256(b"".join(path + b"\0" for path in paths)).hexdigest()


def test_a_long_listing_and_its_records_are_read_in_little_memory(files: RunFiles) -> None:
    num_images = 30_000
    names = [b"folder/IMG_%08d.jpg" % number for number in range(num_images)]
    placed(files, names)
    with RecordWriter(files.predictions, 0) as records:
        outcome = (Prediction("cat", 0, 0.5),)
        records.write(encode([Record(ImageRef(0, name), outcome) for name in names]))
    del names
    tracemalloc.start()
    try:
        found = open_listing(files)
        assert found is not None
        assert sum(1 for _ in found.refs()) == num_images
        assert find_done(files.predictions, found.paths()).num_ok == num_images
        assert next(found.paths(num_images - 1)) == b"folder/IMG_00029999.jpg"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # the listing alone has 750 kB, 2.4 MB as objects


def test_whoever_places_second_gets_the_first_listing(files: RunFiles) -> None:
    assert list(placed(files, [b"a", b"b"]).paths()) == [b"a", b"b"]
    assert list(placed(files, [b"c"]).paths()) == [b"a", b"b"]
    assert os.listdir(files.folder) == ["listing.nul"]


def test_shards_that_place_at_once_all_get_one_and_the_same_listing(tmp_path: Path) -> None:
    shards = [RunFiles(tmp_path, Shard(index, 8)) for index in range(8)]
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda one: placed(one, [b"%d" % one.shard.index] * 500), shards))
        assert len({one.extent for one in found}) == 1
        assert os.listdir(tmp_path) == ["listing.nul"]
        (tmp_path / "listing.nul").unlink()


@pytest.mark.parametrize("refused", ["link", "link and renameat2"])
def test_a_file_system_without_hard_links_places_by_another_call_or_says_that_it_cannot(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    if refused == "link":
        assert placed(files, [b"a"]).num_images == 1
        assert placed(files, [b"b", b"c"]).num_images == 1
        return
    monkeypatch.setattr(rename, "_RENAME_NOREPLACE", 1 << 20)  # EINVAL, as of old file systems
    with pytest.raises(EnvironmentFailed, match=r"neither hard links.*give an output on"):
        placed(files, [b"a"])
    assert os.listdir(files.folder) == []


def test_an_extended_listing_begins_as_before_and_says_what_it_extends(files: RunFiles) -> None:
    first = placed(files, [b"b", b"d"])
    with drafted(files, IDENTITY, Entries([b"a", b"b", b"c", b"d"]), extends=first) as draft:
        assert list(first.paths()) == [b"b", b"d"], "not in place yet"
        second = place(files, draft)
    assert list(second.paths()) == [b"b", b"d", b"a", b"c"]
    assert second.extent.digest == sha256([b"b", b"d", b"a", b"c"])
    assert second.continues(first.extent)
    assert not first.continues(second.extent)
    assert open_listing(files) == second


def test_a_limit_is_one_on_the_whole_of_an_extended_listing(files: RunFiles) -> None:
    first = placed(files, [b"a"])
    entries = Entries([b"a", b"b", b"c"])
    with drafted(files, IDENTITY, entries, limit=2, extends=first) as draft:
        assert list(draft.paths()) == [b"a", b"b"]


def test_a_draft_that_is_not_placed_leaves_nothing(files: RunFiles) -> None:
    with drafted(files, IDENTITY, Entries([b"a"], num_left_out=3)) as draft:
        assert draft.num_left_out == 3
        assert os.listdir(files.folder) == [draft.path.name]
    assert os.listdir(files.folder) == []


class Failing(Entries):
    def __iter__(self) -> Iterator[Entry]:
        yield Entry(b"a")
        raise OSError(5, "Input/output error")


def test_a_listing_that_fails_half_way_is_not_there(files: RunFiles) -> None:
    with pytest.raises(EnvironmentFailed), drafted(files, IDENTITY, Failing([])):
        pass
    assert os.listdir(files.folder) == []


@pytest.mark.parametrize(
    "data", [b"", b"a\0b\0", b"a\0{", b"a\0[]", b'a\0{"format_version":2}', b"a\0\xff"]
)
def test_a_listing_of_another_version_is_refused_in_one_line(files: RunFiles, data: bytes) -> None:
    files.listing.write_bytes(data)
    with pytest.raises(ResumeRefused, match="not a listing as this version of batchclf writes it"):
        open_listing(files)


def test_only_the_listing_that_was_seen_is_thrown_away(files: RunFiles) -> None:
    assert take_away(files, None)
    seen = placed(files, [b"a"])
    assert seen.is_in_place(files)
    assert take_away(files, seen.file)
    assert not seen.is_in_place(files)
    other = placed(files, [b"b"])
    assert not take_away(files, seen.file)
    assert other.is_in_place(files)
    assert os.listdir(files.folder) == ["listing.nul"]
