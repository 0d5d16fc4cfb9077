"""ahead.py: reads overlap, in the order of the listing, within bounds; nobody waits in vain."""

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


def test_what_has_come_and_is_not_taken_is_bounded_in_number_and_in_bytes() -> None:
    for depth, at_most in ((Depth(5, 1 << 30), 5), (Depth(64, 4000), 4), (Depth(64, 10), 1)):
        num_read = 0

        def read(ref: ImageRef) -> bytes:
            nonlocal num_read
            num_read += 1
            return bytes(1000)

        with ReadAhead(read, refs(40), depth) as ahead:
            ahead._recent.clear()
            ahead._recent.append(1000)  # as after the first ones
            for taken, ref in enumerate(islice(ahead, 8)):
                settled = num_read
                while True:  # until no further read begins
                    time.sleep(0.02)
                    if num_read == settled:
                        break
                    settled = num_read
                assert settled - taken <= at_most
                ahead.take(ref)


def test_a_read_that_never_ends_keeps_nobody_who_leaves() -> None:
    never = threading.Event()

    def read(ref: ImageRef) -> bytes:
        if ref.index >= 8:
            never.wait()
        return ref.path + ref.location

    decoding = threads(load, 2, Memory(3, (4, *SHAPE)))
    with (
        reading_ahead(read, refs(100), decoding) as (ahead, fed),
        Prefetcher(ahead, fed) as batches,
    ):
        assert batches.next_batch() is not None
        assert batches.next_batch() is not None
        batches.stop()
        started = time.monotonic()
    assert time.monotonic() - started < 5
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

    def read(ref: ImageRef) -> bytes:
        time.sleep(1.5)
        return b""

    with ReadAhead(read, refs(1), beat=lambda: beats.append(time.monotonic())) as ahead:
        ahead.take(next(ahead))
    assert beats
