"""Several streams of inference: order, padding, failures, errors of each part."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.results.records import (
    Batch,
    Failure,
    ImageRef,
    Loaded,
    Pixels,
    Prediction,
    Record,
    Scores,
)
from batchclf.runtime.streams import Streams

TICK_S = 0.05
SLOTS = 4


def batch_of(sequence: int, loaded: Sequence[Loaded] = (Loaded(),)) -> Batch:
    refs = tuple(
        ImageRef(sequence * SLOTS + i, b"%d-%d" % (sequence, i)) for i in range(len(loaded))
    )
    return Batch(sequence, refs, tuple(loaded), np.full((SLOTS, 1, 1, 3), sequence, np.uint8))


def source_of(batches: Iterable[Batch]) -> Callable[[], Batch | None]:
    iterator, lock = iter(batches), threading.Lock()

    def next_batch() -> Batch | None:
        with lock:
            return next(iterator, None)

    return next_batch


def classify(pixels_NHWC: Pixels, num_rows: int) -> Scores:
    return pixels_NHWC[:num_rows, 0, 0, :1].astype(np.float32)


def rank(scores_NK: Scores) -> list[tuple[Prediction, ...] | Failure]:
    return [(Prediction("only", 0, float(row[0])),) for row in scores_NK]


def ignore(decode_wait_s: float, infer_s: float) -> None:
    pass


def collect(streams: Streams) -> list[tuple[Batch, list[Record]]]:
    with streams:
        return [result for result in streams.results(TICK_S) if result is not None]


@settings(deadline=None, max_examples=25)
@given(
    delays_ms=st.lists(st.integers(0, 4), max_size=30),
    num_streams=st.integers(1, 6),
)
def test_results_come_in_the_order_of_the_batches_whatever_each_one_takes(
    delays_ms: list[int], num_streams: int
) -> None:
    def delayed(pixels_NHWC: Pixels, num_rows: int) -> Scores:
        time.sleep(delays_ms[int(pixels_NHWC[0, 0, 0, 0])] / 1000)
        return classify(pixels_NHWC, num_rows)

    batches = [batch_of(number) for number in range(len(delays_ms))]
    results = collect(Streams(source_of(batches), [delayed] * num_streams, rank, ignore))
    assert [batch.sequence for batch, _ in results] == list(range(len(batches)))
    for batch, records in results:
        assert records == [Record(batch.refs[0], (Prediction("only", 0, batch.sequence),))]


def test_rows_of_padding_are_neither_ranked_nor_recorded() -> None:
    seen: list[tuple[int, ...]] = []

    def watching(scores_NK: Scores) -> list[tuple[Prediction, ...] | Failure]:
        seen.append(scores_NK.shape)
        return rank(scores_NK)

    batch = batch_of(0, [Loaded(), Loaded()])
    ((_, records),) = collect(Streams(source_of([batch]), [classify], watching, ignore))
    assert seen == [(2, 1)]
    assert [record.ref for record in records] == list(batch.refs)


def test_an_image_that_failed_to_load_keeps_its_failure_and_its_warnings() -> None:
    bad = Failure("truncated", "ends early")
    loaded = [Loaded(failure=bad), Loaded(warnings=("has_alpha",)), Loaded(bad, ("odd",))]
    batch = batch_of(0, loaded)
    ((_, records),) = collect(Streams(source_of([batch]), [classify], rank, ignore))
    assert [record.outcome for record in records] == [bad, (Prediction("only", 0, 0.0),), bad]
    assert [record.warnings for record in records] == [(), ("has_alpha",), ("odd",)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=SLOTS))
def test_only_images_that_loaded_are_inferred_each_with_its_own_pixels(good: list[bool]) -> None:
    bad = Failure("truncated", "ends early")
    batch = batch_of(0, [Loaded(None if one else bad) for one in good])
    batch.pixels_NHWC[:, 0, 0, 0] = range(10, 10 + SLOTS)
    asked: list[int] = []

    def noting(pixels_NHWC: Pixels, num_rows: int) -> Scores:
        asked.append(num_rows)
        return classify(pixels_NHWC, num_rows)

    ((_, records),) = collect(Streams(source_of([batch]), [noting], rank, ignore))
    assert asked == [sum(good)] * any(good)
    assert [record.outcome for record in records] == [
        (Prediction("only", 0, 10.0 + row),) if one else bad for row, one in enumerate(good)
    ]


def test_streams_infer_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)

    def meeting(pixels_NHWC: Pixels, num_rows: int) -> Scores:
        both.wait()
        return classify(pixels_NHWC, num_rows)

    results = collect(
        Streams(source_of([batch_of(0), batch_of(1)]), [meeting, meeting], rank, ignore)
    )
    assert len(results) == 2


def test_each_batch_is_timed_once() -> None:
    times: list[tuple[float, float]] = []

    def slowly(pixels_NHWC: Pixels, num_rows: int) -> Scores:
        time.sleep(0.02)
        return classify(pixels_NHWC, num_rows)

    batches = [batch_of(number) for number in range(3)]
    collect(Streams(source_of(batches), [slowly], rank, lambda *both: times.append(both)))
    assert len(times) == 3
    assert all(wait_s >= 0 and infer_s >= 0.019 for wait_s, infer_s in times)


def test_a_tick_without_a_result_yields_none() -> None:
    go_on = threading.Event()

    def waiting(pixels_NHWC: Pixels, num_rows: int) -> Scores:
        assert go_on.wait(10)
        return classify(pixels_NHWC, num_rows)

    with Streams(source_of([batch_of(0)]), [waiting], rank, ignore) as streams:
        results = streams.results(0.01)
        assert next(results) is None
        go_on.set()
        assert [batch.sequence for batch, _ in filter(None, results)] == [0]


def failing(*_: object) -> None:
    raise ZeroDivisionError("broken part")


@pytest.mark.parametrize("part", ["next_batch", "classifier", "rank", "timed"])
@pytest.mark.parametrize("num_streams", [1, 3])
def test_the_error_of_any_part_reaches_the_consumer(part: str, num_streams: int) -> None:
    parts = {
        "next_batch": source_of([batch_of(0), batch_of(1)]),
        "classifier": classify,
        "rank": rank,
        "timed": ignore,
    }
    parts[part] = failing
    streams = Streams(
        parts["next_batch"],  # type: ignore[arg-type]
        [parts["classifier"]] * num_streams,  # type: ignore[list-item]
        parts["rank"],  # type: ignore[arg-type]
        parts["timed"],  # type: ignore[arg-type]
    )
    with pytest.raises(ZeroDivisionError, match="broken part"):
        collect(streams)


def test_leaving_the_block_waits_for_the_threads() -> None:
    collect(Streams(source_of([batch_of(0)]), [classify] * 3, rank, ignore))
    assert not [one.name for one in threading.enumerate() if one.name.startswith("stream-")]
