"""Members that inflate to much more than their archive has: they take turns."""

from pathlib import Path

import pytest

from batchclf.images import memory
from batchclf.images.memory import SMALL_BYTES, SharedRoom
from batchclf.images.source import open_source
from batchclf.images.store import open_store
from batchclf.results.records import Failure, refs_of
from tests.images.archives.common import as_tar, as_zip, photo, written

LARGE = photo(1) + bytes(SMALL_BYTES)


class NotedRoom(SharedRoom):
    """Notes what is taken and given back."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[int] = []

    def take(self, num_bytes: int, limit: int) -> None:
        assert limit > 0
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


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_member_that_inflates_to_much_takes_a_turn_and_a_small_one_none(
    tmp_path: Path, room: NotedRoom, name: str
) -> None:
    files = {b"large.jpg": LARGE, b"small.jpg": photo(2)}
    content = as_zip(files) if name == "a.zip" else as_tar(files, "w:gz")
    assert len(content) < SMALL_BYTES // 100
    store = open_store(open_source(written(tmp_path / name, content)))
    large, small = refs_of(store.entries())
    assert store.read(small, 2**30) == photo(2)
    assert room.turns == []
    assert store.read(large, 2**30) == LARGE
    taken, given = room.turns
    assert taken >= len(LARGE)
    assert given == -taken
    assert isinstance(store.read(large, SMALL_BYTES), Failure)
    assert len(room.turns) == 2, "it is not inflated"
