"""prefetch.py: batches in order, memory bounded by the slots, no thread left behind."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.images.prefetch import Load, Memory, Prefetcher, threads
from batchclf.results.records import Batch, Failure, ImageRef, Loaded, Pixels

SHAPE = (2, 3, 3)


def refs(num_images: int) -> Iterator[ImageRef]:
    return (ImageRef(index, b"%d.jpg" % index) for index in range(num_images))


def load(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
    """An image whose pixels tell its index; every seventh is bad."""
    slot_HWC[:] = ref.index % 251 + 1
    if ref.index % 7 == 3:
        slot_HWC[:] = 0
        return Loaded(failure=Failure("corrupt", str(ref.index)))
    return Loaded(warnings=(str(ref.index),))


def prefetcher(
    num_images: int,
    load: Load = load,
    *,
    batch_size: int = 4,
    num_slots: int = 3,
    num_workers: int = 3,
    num_rows: int = 1,
    listing: Iterator[ImageRef] | None = None,
) -> Prefetcher:
    decoding = threads(load, num_workers, Memory(num_slots, (batch_size, *SHAPE)))
    return Prefetcher(listing or refs(num_images), replace(decoding, num_rows=num_rows))


def assert_right(batch: Batch, batch_size: int, num_images: int) -> None:
    first = batch.sequence * batch_size
    expected = list(range(first, min(first + batch_size, num_images)))
    assert [ref.index for ref in batch.refs] == expected
    assert batch.pixels_NHWC.shape == (batch_size, *SHAPE)
    assert batch.pixels_NHWC.dtype == np.uint8
    for row in range(len(expected)):
        slot_HWC = np.empty(SHAPE, np.uint8)
        assert batch.loaded[row] == load(batch.refs[row], slot_HWC)
        np.testing.assert_array_equal(batch.pixels_NHWC[row], slot_HWC)
    assert len(batch.loaded) == len(expected)
    assert not batch.pixels_NHWC[len(expected) :].any(), "the padding is zero"


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@settings(max_examples=120, deadline=None)
@given(
    num_images=st.integers(0, 60),
    batch_size=st.integers(1, 9),
    num_slots=st.integers(1, 5),
    num_workers=st.integers(1, 6),
    num_rows=st.integers(1, 5),
    num_consumers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_every_image_is_handed_out_once_in_order_by_any_number_of_threads(
    num_images: int,
    batch_size: int,
    num_slots: int,
    num_workers: int,
    num_rows: int,
    num_consumers: int,
    seed: int,
) -> None:
    chance = random.Random(seed)
    delays = [chance.choice((0, 0, 0, 0.0005)) for _ in range(num_images)]

    def uneven(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        time.sleep(delays[ref.index])
        return load(ref, slot_HWC)

    sequences: list[list[int]] = [[] for _ in range(num_consumers)]
    wrong: list[BaseException] = []
    with prefetcher(
        num_images,
        uneven,
        batch_size=batch_size,
        num_slots=num_slots,
        num_workers=num_workers,
        num_rows=num_rows,
    ) as batches:

        def consume(own: list[int]) -> None:
            try:
                while (batch := batches.next_batch()) is not None:
                    own.append(batch.sequence)
                    assert_right(batch, batch_size, num_images)
                    batches.release(batch)
            except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
                wrong.append(error)
                batches.stop()

        consumers = [in_thread(partial(consume, own)) for own in sequences]
        for consumer in consumers:
            consumer.join(10)
            assert not consumer.is_alive(), "a consumer waits for ever"
        assert batches.next_batch() is None, "and so it stays"
    if wrong:
        raise wrong[0]
    for own in sequences:
        assert own == sorted(own)
    num_batches = -(-num_images // batch_size)
    assert sorted(number for own in sequences for number in own) == list(range(num_batches))


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_with_a_slow_consumer_the_loader_runs_no_further_than_the_slots(num_slots: int) -> None:
    num_begun = 0
    listed = 0
    lock = threading.Lock()

    def counted(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        nonlocal num_begun
        with lock:
            num_begun += 1
        return load(ref, slot_HWC)

    def listing() -> Iterator[ImageRef]:
        nonlocal listed
        for ref in refs(400):
            listed += 1
            yield ref

    with prefetcher(400, counted, num_slots=num_slots, listing=listing()) as batches:
        wait_until(lambda: num_begun == 4 * num_slots)
        held = [batches.next_batch() for _ in range(num_slots)]
        time.sleep(0.05)
        assert num_begun == listed == 4 * num_slots, "taken, but not given back"
        for number in range(1, 4):
            batch = held.pop(0)
            assert batch is not None
            batches.release(batch)
            wait_until(lambda number=number: num_begun == 4 * (num_slots + number))  # type: ignore[misc]
            time.sleep(0.01)
            assert num_begun == listed == 4 * (num_slots + number)
            held.append(batches.next_batch())


def test_pixels_live_in_as_many_arrays_as_there_are_slots() -> None:
    seen: dict[int, Pixels] = {}
    with prefetcher(200, num_slots=3) as batches:
        while (batch := batches.next_batch()) is not None:
            seen[id(batch.pixels_NHWC)] = batch.pixels_NHWC
            batches.release(batch)
    assert len(seen) <= 3


def test_a_batch_held_by_its_consumer_is_not_written_to() -> None:
    with prefetcher(200, num_slots=2) as batches:
        held = batches.next_batch()
        assert held is not None
        while (batch := batches.next_batch()) is not None and batch.sequence < 40:
            assert_right(held, 4, 200)
            batches.release(batch)
        assert_right(held, 4, 200)


@pytest.mark.parametrize("num_images", [1, 5, 9, 11])
def test_a_short_last_batch_is_padded_with_zeros_in_a_slot_used_before(num_images: int) -> None:
    with prefetcher(num_images, num_slots=1) as batches:
        found = []
        while (batch := batches.next_batch()) is not None:
            assert_right(batch, 4, num_images)
            found.append(len(batch.refs))
            batch.pixels_NHWC[:] = 255
            batches.release(batch)
    assert sum(found) == num_images
    assert found[-1] == num_images % 4


def test_no_images_are_no_batches() -> None:
    with prefetcher(0) as batches:
        assert batches.next_batch() is None


def test_a_later_batch_waits_for_the_one_before_it() -> None:
    gate = threading.Event()

    def slow_first(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        if ref.index == 0:
            gate.wait(20)
        return load(ref, slot_HWC)

    found: list[int] = []
    with prefetcher(8, slow_first) as batches:

        def consume() -> None:
            while (batch := batches.next_batch()) is not None:
                found.append(batch.sequence)

        consumers = [in_thread(consume) for _ in range(2)]
        time.sleep(0.05)
        assert found == [], "batch 1 is complete, but batch 0 is not"
        gate.set()
        for consumer in consumers:
            consumer.join(10)
            assert not consumer.is_alive()
    assert sorted(found) == [0, 1]


@pytest.mark.parametrize("num_consumers", [1, 3])
def test_stopping_wakes_consumers_that_wait_for_a_batch(num_consumers: int) -> None:
    gate = threading.Event()

    def stuck(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        gate.wait(20)
        return Loaded()

    found: list[Batch | None] = []
    with prefetcher(100, stuck) as batches:
        consumers = [
            in_thread(lambda: found.append(batches.next_batch())) for _ in range(num_consumers)
        ]
        time.sleep(0.02)
        batches.stop()
        for consumer in consumers:
            consumer.join(10)
            assert not consumer.is_alive()
        assert found == [None] * num_consumers
        gate.set()


def test_stopping_wakes_workers_that_wait_for_a_slot_and_drops_what_is_decoded() -> None:
    num_begun = 0
    lock = threading.Lock()

    def counted(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        nonlocal num_begun
        with lock:
            num_begun += 1
        return load(ref, slot_HWC)

    with prefetcher(1000, counted) as batches:
        assert batches.next_batch() is not None
        wait_until(lambda: num_begun == 12)
        batches.stop()
        assert batches.next_batch() is None
    assert num_begun == 12


def test_leaving_early_by_an_exception_ends_the_workers() -> None:
    with pytest.raises(ZeroDivisionError), prefetcher(1000):
        raise ZeroDivisionError


def test_an_exception_in_load_reaches_every_consumer() -> None:
    def broken(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        if ref.index == 9:
            raise AttributeError("a bug of ours")
        return load(ref, slot_HWC)

    raised: list[str] = []
    with prefetcher(1000, broken) as batches:

        def consume() -> None:
            try:
                while (batch := batches.next_batch()) is not None:
                    assert batch.sequence < 2, "its batch is never handed out"
                    batches.release(batch)
            except AttributeError as error:
                raised.append(str(error))

        consumers = [in_thread(consume) for _ in range(2)]
        for consumer in consumers:
            consumer.join(10)
            assert not consumer.is_alive()
    assert raised == ["a bug of ours"] * 2


def test_an_exception_in_the_listing_reaches_the_consumer() -> None:
    def listing() -> Iterator[ImageRef]:
        yield from refs(6)
        raise OSError("the disk is gone")

    def consume() -> None:
        with prefetcher(0, listing=listing()) as batches:
            while (batch := batches.next_batch()) is not None:
                batches.release(batch)

    with pytest.raises(OSError, match="disk is gone"):
        consume()
