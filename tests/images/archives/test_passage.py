"""What is read from its beginning on: once, whatever the threads ask for, in bounded memory."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from batchclf.images.archives import passage
from batchclf.images.archives.passage import Chunk, Cursor
from batchclf.images.prefetch import Decoding, noted
from batchclf.images.watch import Watch
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels
from batchclf.system.alive import Place

MANY = 10_000


class Numbers:
    """Chunks of 10 units, each of which takes a byte; reading can begin every `stride` units."""

    kept_bytes = 200

    def __init__(self, stride: int = MANY, fails_at: int | None = None) -> None:
        self.stride = stride
        self.fails_at = fails_at
        self.begun: list[int] = []
        self.num_chunks = 0

    def span_of(self, unit: int) -> Place:
        start = unit // self.stride * self.stride
        return Place(start, start + self.stride)

    def size_of(self, unit: int) -> int:
        return 1

    def begin(self, start: int) -> Iterator[Chunk[range]]:
        self.begun.append(start)
        for at in range(start, MANY, 10):
            if at == self.fails_at:
                self.fails_at = None
                raise OSError(5, "an I/O error")
            self.num_chunks += 1
            yield Chunk(10, range(at, at + 10), 10)


def units(cursor: Cursor[range], start: int, stop: int) -> list[int]:
    """What a cursor gives."""
    found: list[int] = []
    for _, chunk in cursor.read(start, stop):
        assert not isinstance(chunk.payload, Failure)
        found += chunk.payload
    return [unit for unit in found if start <= unit < stop]


@pytest.fixture(autouse=True)
def little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests need no megabytes."""
    monkeypatch.setattr(passage, "MAX_KEPT_BYTES", 1000)


def test_many_threads_that_ask_almost_in_order_read_everything_once() -> None:
    numbers = Numbers()
    cursor: Cursor[range] = Cursor(lambda: numbers)
    starts = iter(range(0, MANY, 7))
    taking = threading.Lock()
    found: dict[int, list[int]] = {}

    def work() -> None:
        while True:
            with taking:
                start = next(starts, None)
            if start is None:
                return
            found[start] = units(cursor, start, min(start + 7, MANY))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result()
    assert [unit for start in sorted(found) for unit in found[start]] == list(range(MANY))
    assert len(numbers.begun) < 20, "it begins again only where a thread is far behind"


def test_no_more_is_kept_than_may_be_and_what_is_wanted() -> None:
    cursor: Cursor[range] = Cursor(Numbers)
    assert units(cursor, 5000, 5005) == list(range(5000, 5005))
    assert cursor._kept_bytes <= 210
    assert units(cursor, 6000, 8000) == list(range(6000, 8000))
    assert 2000 <= cursor._kept_bytes <= 2210


def test_who_comes_too_late_makes_it_begin_again_and_keep_more() -> None:
    numbers = Numbers()
    cursor: Cursor[range] = Cursor(lambda: numbers)
    for start in (1000, 700, 1000, 500):
        assert units(cursor, start, start + 3) == list(range(start, start + 3))
    assert numbers.begun == [0, 0, 0], "the second time, 700 to 1000 are kept"
    units(cursor, 0, 5)
    assert cursor.may_keep == 800


def test_what_one_had_to_keep_the_next_one_keeps_from_its_beginning_on() -> None:
    passage._cursors.clear()
    for start in (1000, 700):
        passage.cursor_at("first", Numbers).read(start, start + 3)
    assert passage.cursor_at("first", Numbers).may_keep == 400
    assert passage.cursor_at("second", Numbers).may_keep == 400


def test_it_goes_on_from_the_last_place_before_what_is_wanted() -> None:
    numbers = Numbers(stride=1000)
    cursor: Cursor[range] = Cursor(lambda: numbers)
    assert units(cursor, 5432, 5435) == [5432, 5433, 5434]
    assert units(cursor, 5998, 6002) == [5998, 5999, 6000, 6001]
    assert units(cursor, 9001, 9002) == [9001]
    assert numbers.begun == [5000, 9000]
    assert numbers.num_chunks < 120


def test_after_a_disk_error_the_next_call_begins_again() -> None:
    numbers = Numbers(fails_at=50)
    cursor: Cursor[range] = Cursor(lambda: numbers)
    with pytest.raises(OSError, match="an I/O error"):
        cursor.read(40, 60)
    assert units(cursor, 40, 60) == list(range(40, 60))


def test_behind_the_end_there_is_nothing() -> None:
    cursor: Cursor[range] = Cursor(Numbers)
    assert units(cursor, MANY - 3, MANY + 5) == [MANY - 3, MANY - 2, MANY - 1]
    assert cursor.read(MANY, MANY + 1) == []


def test_of_many_passages_the_last_few_stay_open() -> None:
    made: list[int] = []

    def make(number: int) -> Numbers:
        made.append(number)
        return Numbers()

    for number in (*range(6), 5, 4, 0):
        passage.cursor_at(("test", number), partial(make, number)).read(0, 1)
    assert made == [*range(6), 0]


def test_while_others_are_passed_over_a_worker_is_at_each_place_anew() -> None:
    told: list[object] = []

    def load(refs: Sequence[ImageRef], rows_NHWC: Pixels) -> Sequence[Loaded]:
        Cursor(Numbers).read(20, 25)
        told.append("decodes")
        return [Loaded()]

    watch = Watch(lambda thread, index, step: told.append((index, step)))
    decoding = noted(Decoding([load], []), watch)
    decoding.workers[0]([ImageRef(7, b"7.jpg")], np.zeros((1, 1, 1, 3), np.uint8))
    places = [(7, 1), (7, 2), (7, 3), (7, 4)]  # what makes the passage, then three chunks
    assert told == [(7, 0), *places, (7, 0), "decodes", (None, 0)]


def test_who_waits_for_another_thread_is_at_no_image() -> None:
    told: list[object] = []
    waits = threading.Event()

    def note(thread: int, index: int | None, step: int) -> None:
        told.append((index, step))
        if index is None:
            waits.set()

    cursor: Cursor[range] = Cursor(Numbers)

    def read() -> None:
        with Watch(note).loading(0, 7):
            cursor.read(0, 5)

    with ThreadPoolExecutor(1) as pool:
        with cursor._lock:
            reading = pool.submit(read)
            assert waits.wait(10)
        reading.result()
    assert told == [(7, 0), (None, 0), (7, 0), (7, 1), (7, 2), (7, 0), (None, 0)]
