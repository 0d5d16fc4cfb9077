"""Members that inflate to much more than their archive has: they take turns."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchclf.images import memory
from batchclf.images.ahead import Depth, Fetched, ReadAhead
from batchclf.images.decode import Decoder
from batchclf.images.load import Loader, loader_of
from batchclf.images.memory import SMALL_BYTES, Claim, SharedRoom
from batchclf.images.room import this_claim
from batchclf.images.source import open_source, source_of
from batchclf.images.store import open_store
from batchclf.results.records import Failure, ImageRef, Loaded, Preprocess, refs_of
from batchclf.spec.file import load_job
from tests.images.archives.common import as_tar, as_zip, photo, written
from tests.images.common import encode
from tests.tiny import write_tiny_job

KINDS = ("a.zip", "a.tgz", "a.parquet")
SMALL = Preprocess(8, (8, 8), "bilinear", None, None)
LARGE = photo(1) + bytes(SMALL_BYTES)


class NotedRoom(SharedRoom):
    """Notes what is taken and given back."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []
        self.limits: set[int] = set()

    def take(self, num_bytes: int, limit: int) -> None:
        self.limits.add(limit)
        super().take(num_bytes, limit)
        self.turns.append(num_bytes)

    def give(self, num_bytes: int) -> None:
        super().give(num_bytes)
        self.turns.append(-num_bytes)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> NotedRoom:
    own = NotedRoom()
    monkeypatch.setattr(memory, "_room", [own])
    return own


def packed(folder: Path, name: str, files: Mapping[bytes, bytes]) -> Path:
    """An archive of a kind that its name tells, much smaller than the large file in it."""
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
        from tests.images.archives.test_parquet import as_parquet, structs

        rows = [(content, name.decode()) for name, content in files.items()]
        return written(folder / name, as_parquet({"image": structs(rows)}))
    return written(folder / name, as_zip(files) if name == "a.zip" else as_tar(files, "w:gz"))


@pytest.mark.parametrize("name", KINDS)
def test_what_inflates_to_much_takes_its_turn_within_what_the_job_allows(
    tmp_path: Path, room: NotedRoom, name: str
) -> None:
    job = load_job(
        write_tiny_job(
            tmp_path,
            input=str(packed(tmp_path, name, {b"large.jpg": LARGE})),
            loader={"max_memory": SMALL_BYTES},
        )
    )
    loader = loader_of(job, source_of(job), SMALL)
    (large,) = refs_of(loader.store.entries())
    assert loader(large, np.zeros((8, 8, 3), np.uint8)).failure is not None, "it is no real photo"
    assert room.limits == {SMALL_BYTES}
    assert room.turns[0] >= SMALL_BYTES
    assert room.taken == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_was_inflated_holds_its_turn_until_it_is_decoded(
    tmp_path: Path, room: NotedRoom, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images = [encode(Image.new("RGB", (3400, 3400), (n, n, n)), "BMP") for n in range(3)]
    files = {b"%d.bmp" % number: image for number, image in enumerate(images)}
    archive = packed(tmp_path, name, files)
    decoder = Decoder(SMALL, max_memory=SMALL_BYTES)
    loader = Loader(open_store(open_source(archive)), decoder)
    inside, most, counting = 0, 0, threading.Condition()
    decode = Decoder.__call__

    def decode_together(*arguments: Any) -> Loaded:
        nonlocal inside, most
        with counting:
            inside += 1
            most = max(most, inside)
            counting.notify_all()
            counting.wait_for(lambda: inside == 3, timeout=0.5)  # had they all been inflated
            inside -= 1
        return decode(*arguments)

    monkeypatch.setattr(Decoder, "__call__", decode_together)

    def load(ref: ImageRef) -> Loaded:
        return loader(ref, np.zeros((8, 8, 3), np.uint8))

    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(load, refs_of(loader.store.entries()), timeout=60))
    assert loaded == [Loaded()] * 3
    assert most == 1
    assert max(accumulate(room.turns)) < SMALL_BYTES + 8 * 3400**2 + len(images[0])
    assert room.taken == 0


def test_what_another_process_is_handed_holds_its_turn_until_it_is_done(
    tmp_path: Path, room: NotedRoom
) -> None:
    half = photo(1) + bytes(SMALL_BYTES * 3 // 4)
    archive = packed(tmp_path, "a.tgz", {b"1.jpg": half, b"2.jpg": half})
    loader = Loader(open_store(open_source(archive)), Decoder(SMALL))
    with loader.fetched(list(refs_of(loader.store.entries()))) as handed:
        assert all(isinstance(one, Fetched) for one in handed)
        assert room.taken >= 2 * len(half)
        with loader.fetched(handed):
            assert room.taken >= 4 * len(half), "what was read ahead counts as well"
    assert room.taken == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_ahead_of_an_archive_is_bounded_before_it_is_inflated(
    tmp_path: Path, name: str
) -> None:
    files = {b"%02d.jpg" % number: photo(number) + bytes(2**20) for number in range(40)}
    archive = packed(tmp_path, name, files)
    store = open_store(open_source(archive))
    num_read = 0

    def read(ref: ImageRef) -> bytes | Failure:
        nonlocal num_read
        content = store.read(ref, 2**30, this_claim())
        num_read += 1
        return content

    with ReadAhead(read, refs_of(store.entries()), Depth(16, 2**22)) as ahead:
        time.sleep(1)
        assert 1 <= num_read <= 5
        assert ahead._num_bytes < 2**22 + 2**21, "only the first may go beyond"
        taken = [ahead.take(ref) for ref in ahead]
    assert [one.content for one in taken if isinstance(one, Fetched)] == list(files.values())


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_member_that_inflates_to_much_takes_a_turn_and_a_small_one_none(
    tmp_path: Path, room: NotedRoom, name: str
) -> None:
    files = {b"large.jpg": LARGE, b"small.jpg": photo(2)}
    archive = packed(tmp_path, name, files)
    assert archive.stat().st_size < SMALL_BYTES // 100
    store = open_store(open_source(archive))
    large, small = refs_of(store.entries())
    with Claim(2**40) as claim:
        assert store.read(small, 2**30, claim) == photo(2)
        assert room.turns == []
        assert isinstance(store.read(large, SMALL_BYTES, claim), Failure)
        assert room.turns == [], "it is not inflated"
        assert store.read(large, 2**30, claim) == LARGE
    taken, given = room.turns
    assert taken >= len(LARGE)
    assert given == -taken
