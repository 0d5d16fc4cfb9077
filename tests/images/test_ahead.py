"""ahead.py: reads overlap, in the order of the listing, within bounds; nobody waits in vain."""

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest

from batchclf.errors import EnvironmentFailed
from batchclf.images.ahead import Depth, Fetched, ReadAhead, reading_ahead
from batchclf.images.prefetch import Memory, Prefetcher, threads
from batchclf.images.room import this_claim
from batchclf.images.watch import Watch
from batchclf.results.records import Batch, Failure, ImageRef, Loaded, Pixels

SHAPE = (2, 3, 3)


def refs(num_images: int, step: int = 1) -> Iterator[ImageRef]:
    return (ImageRef(step * n, b"%d.jpg" % n, b"at %d" % n) for n in range(num_images))


def load(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
    """An image whose content has come."""
    assert isinstance(ref, Fetched)
    if isinstance(ref.content, Failure):
        return Loaded(failure=ref.content)
    assert ref.content == ref.path + ref.location
    return Loaded()


def content(ref: ImageRef) -> bytes | Failure:
    return Failure("io_error", str(ref.index)) if ref.index % 7 == 3 else ref.path + ref.location


def test_each_image_comes_with_its_own_content_in_the_order_of_the_listing() -> None:
    decoding = threads(load, 3, Memory(3, (8, *SHAPE)))
    listed = list(refs(500, step=3))
    with (
        reading_ahead(content, iter(listed), replace(decoding, num_rows=3)) as (ahead, fed),
        Prefetcher(ahead, fed) as batches,
    ):
        found: list[ImageRef] = []
        while (batch := batches.next_batch()) is not None:
            found += batch.refs
            failed = [one.failure for one in batch.loaded]
            expected = [content(ref) for ref in batch.refs]
            assert failed == [one if isinstance(one, Failure) else None for one in expected]
            batches.release(batch)
    assert found == listed


def test_as_many_reads_are_under_way_as_are_allowed_though_one_worker_decodes() -> None:
    together = threading.Barrier(8)

    def read(ref: ImageRef) -> bytes:
        together.wait(30)  # broken unless 8 come
        return b""

    with ReadAhead(read, refs(64), Depth(num_reads=8)) as ahead:
        assert [ahead.take(ref).index for ref in ahead] == list(range(64))


@pytest.mark.parametrize(
    ("depth", "at_most"), [(Depth(5, 1 << 30), 5), (Depth(64, 4000), 5), (Depth(64, 10), 1)]
)
def test_what_is_on_its_way_or_has_come_and_is_not_taken_is_bounded_in_number_and_in_bytes(
    depth: Depth, at_most: int
) -> None:
    num_read = 0
    counting = threading.Lock()

    def read(ref: ImageRef) -> bytes:
        nonlocal num_read
        time.sleep(random.random() / 500)  # whichever comes first
        this_claim()(1000)
        with counting:
            num_read += 1
        return bytes(1000)

    with ReadAhead(read, refs(40), depth) as ahead:
        for taken, ref in enumerate(ahead):
            settled = -1
            while settled != num_read:  # until no further read begins
                settled = num_read
                time.sleep(0.02)
            assert settled - taken <= at_most, "the one that is wanted next may come beside others"
            ahead.take(ref)


def test_reads_of_any_size_come_to_an_end_whichever_of_them_is_first() -> None:
    chance = random.Random(0)
    sizes = [chance.choice((0, 10, 900, 1000, 5000)) for _ in range(400)]
    num_begun = 0

    def read(ref: ImageRef) -> bytes:
        nonlocal num_begun
        num_begun += 1
        time.sleep(chance.random() / 1000)
        if sizes[ref.index] < 5000:
            this_claim()(sizes[ref.index] // 2)
        this_claim()(sizes[ref.index])
        return bytes(sizes[ref.index])

    found: list[int] = []
    with ReadAhead(read, refs(len(sizes)), Depth(16, 2000)) as ahead:

        def work() -> None:
            while some := list(islice(ahead, 5)):
                for ref in some:
                    taken = ahead.take(ref)
                    assert isinstance(taken, Fetched)
                    assert taken.content == bytes(sizes[ref.index])
                    found.append(ref.index)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    assert sorted(found) == list(range(len(sizes)))
    assert num_begun > len(sizes), "some began again"
    assert ahead._num_bytes == 0


def test_what_waits_for_room_ends_with_the_others() -> None:
    def read(ref: ImageRef) -> bytes:
        this_claim()(1000)
        return bytes(1000)

    before = set(threading.enumerate())
    with ReadAhead(read, refs(40), Depth(8, 1500)) as ahead:
        while not ahead._waiting:
            time.sleep(0.01)
        readers = set(threading.enumerate()) - before
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


def test_what_lies_near_passes_as_it_is_in_its_place() -> None:
    def read(ref: ImageRef) -> bytes | None:
        return None if ref.index % 3 else b"far"

    with ReadAhead(read, refs(200), Depth(8)) as ahead:
        taken = [ahead.take(ref) for ref in ahead]
    assert [one.index for one in taken] == list(range(200))
    assert [isinstance(one, Fetched) for one in taken] == [n % 3 == 0 for n in range(200)]


def test_a_read_that_never_ends_keeps_nobody_who_leaves() -> None:
    never = threading.Event()
    ended = []

    def read(ref: ImageRef) -> bytes:
        if ref.index >= 8:
            never.wait(60)
            ended.append(ref)
        return ref.path + ref.location

    decoding = threads(load, 2, Memory(3, (4, *SHAPE)))
    with (
        reading_ahead(read, refs(100), decoding) as (ahead, fed),
        Prefetcher(ahead, fed) as batches,
    ):
        assert batches.next_batch() is not None
        assert batches.next_batch() is not None
        batches.stop()
    assert ended == []
    never.set()


def test_what_is_no_images_fault_is_raised_where_the_batch_is_asked_for() -> None:
    def read(ref: ImageRef) -> bytes:
        if ref.index == 9:
            raise EnvironmentFailed("the bucket has gone")
        return ref.path + ref.location

    def broken() -> Iterator[ImageRef]:
        yield from refs(9)
        raise EnvironmentFailed("the listing has gone")

    for listed, said in ((refs(100), "bucket"), (broken(), "listing")):
        decoding = threads(load, 2, Memory(3, (4, *SHAPE)))
        with (
            reading_ahead(read, listed, decoding) as (ahead, fed),
            Prefetcher(ahead, fed) as batches,
            pytest.raises(EnvironmentFailed, match=said),
        ):
            deque(iter(lambda: released(batches), None))


def released(batches: Prefetcher) -> Batch | None:
    """The next batch, given back at once."""
    if (batch := batches.next_batch()) is not None:
        batches.release(batch)
    return batch


def test_who_waits_for_a_read_shows_that_it_is_alive() -> None:
    beats: list[float] = []
    watch = Watch(beat=lambda: beats.append(time.monotonic()))

    def read(ref: ImageRef) -> bytes:
        time.sleep(1.5)
        return b""

    with ReadAhead(read, refs(1), watch=watch) as ahead:
        ahead.take(next(ahead))
    assert beats
