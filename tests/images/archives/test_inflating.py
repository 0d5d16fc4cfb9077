"""Members that inflate to much more than their archive has: they take turns."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from batchclf.images import memory
from batchclf.images.load import loader_of
from batchclf.images.memory import SMALL_BYTES, SharedRoom
from batchclf.images.source import open_source, source_of
from batchclf.images.store import open_store
from batchclf.results.records import Failure, Preprocess, refs_of
from batchclf.spec.file import load_job
from tests.images.archives.common import as_tar, as_zip, photo, written
from tests.tiny import write_tiny_job

KINDS = ("a.zip", "a.tgz", "a.parquet")
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
    loader = loader_of(job, source_of(job), Preprocess(8, (8, 8), "bilinear", None, None))
    (large,) = refs_of(loader.store.entries())
    assert loader.read(large) == LARGE
    assert room.limits == {SMALL_BYTES}


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_member_that_inflates_to_much_takes_a_turn_and_a_small_one_none(
    tmp_path: Path, room: NotedRoom, name: str
) -> None:
    files = {b"large.jpg": LARGE, b"small.jpg": photo(2)}
    archive = packed(tmp_path, name, files)
    assert archive.stat().st_size < SMALL_BYTES // 100
    store = open_store(open_source(archive))
    large, small = refs_of(store.entries())
    assert store.read(small, 2**30) == photo(2)
    assert room.turns == []
    assert store.read(large, 2**30) == LARGE
    taken, given = room.turns
    assert taken >= len(LARGE)
    assert given == -taken
    assert isinstance(store.read(large, SMALL_BYTES), Failure)
    assert len(room.turns) == 2, "it is not inflated"
