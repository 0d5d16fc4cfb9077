"""The figures of a run: latency percentiles, counts, stages, the bottleneck."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.results.lines import encode
from batchclf.results.records import Failure, ImageRef, Prediction, Record
from batchclf.results.stats import Histogram, StatsCollector

OK = Record(ImageRef(0, b"a"), (Prediction("cat", 0, 1.0),))
BAD = Record(ImageRef(1, b"b"), Failure("truncated", "ends early"))
EMPTY = Record(ImageRef(2, b"c"), Failure("empty_file", "0 bytes"))


def collector(num_streams: int = 1) -> StatsCollector:
    stats = StatsCollector(lambda: 1.234567, lambda: 99.96)
    stats.listed(0.5)
    stats.start(startup_s=2.0, num_streams=num_streams)
    return stats


def stand_still(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Let the clock show `times`, one per look."""
    monkeypatch.setattr("batchclf.results.stats.time.perf_counter", iter(times).__next__)


@given(
    st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=300),
    st.sampled_from([1, 25, 50, 90, 95, 99, 100]),
)
def test_percentiles_are_within_1_percent_of_numpys(seconds: list[float], percent: float) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.add(value)
    expected = np.percentile(seconds, percent, method="inverted_cdf")
    assert histogram.percentile_ms(percent) / 1000 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("percent", [50, 95, 99])
def test_percentiles_of_many_durations_are_within_1_percent_of_numpys_default(
    percent: float,
) -> None:
    seconds = np.random.default_rng(0).lognormal(mean=-3, sigma=0.8, size=50_000)
    histogram = Histogram()
    for value in seconds:
        histogram.add(float(value))
    assert histogram.percentile_ms(percent) == pytest.approx(
        1000 * np.percentile(seconds, percent), rel=0.01
    )


def test_the_histogram_does_not_grow_with_the_number_of_durations() -> None:
    histogram = Histogram()
    for number in range(100_000):
        histogram.add(0.01 + number % 1000 / 100_000)
    assert len(histogram._counts) < 100


def test_an_empty_histogram_and_a_duration_of_zero_are_no_errors() -> None:
    histogram = Histogram()
    assert histogram.percentile_ms(50) == 0
    histogram.add(0.0)
    histogram.add(-1e-9)
    assert histogram.percentile_ms(99) == 0


def test_counts_are_kept_by_code_and_add_up() -> None:
    stats = collector()
    stats.add_lines(encode([OK, BAD, EMPTY, BAD]))
    stats.add_lines(encode([OK]))
    stats.add_write(0.1)
    stats.add_write(0.2)
    figures = stats.snapshot()
    assert (figures.num_images, figures.num_ok, figures.num_errors) == (5, 2, 3)
    assert dict(figures.errors_by_code) == {"empty_file": 1, "truncated": 2}
    assert list(figures.errors_by_code) == ["empty_file", "truncated"]
    assert (stats.num_images, stats.num_errors) == (5, 3)
    assert figures.stage_s.write == pytest.approx(0.3)
    assert figures.stage_s.list == 0.5
    assert figures.startup_s == 2.0
    assert figures.cpu_s == 1.23
    assert figures.peak_rss_mb == 100.0


def test_what_an_earlier_run_wrote_counts_as_done_but_not_as_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_still(monkeypatch, 100.0, 102.0)
    stats = collector()
    stats.resume(90, {"truncated": 10})
    stats.add_lines(encode([OK, BAD]))
    figures = stats.snapshot()
    assert (figures.num_images, figures.num_ok, figures.num_errors) == (102, 91, 11)
    assert figures.wall_s == 2.0
    assert figures.images_per_s == 1.0


@pytest.mark.parametrize(
    ("decode_wait_s", "infer_s", "write_s", "expected"),
    [
        (1.0, 19.0, 0.1, "infer"),
        (4.0, 16.0, 0.1, "infer"),
        (8.0, 12.0, 0.1, "decode"),  # they share the cores: decoding costs more, and is caught up
        (18.0, 2.0, 0.1, "decode"),
        (18.0, 1.0, 4.0, "decode"),  # writing takes longer than inference, and holds nobody up
        (18.0, 2.0, 9.0, "write"),  # nobody gives batches back: the streams wait as well
        (1.0, 19.0, 6.0, "infer"),  # writing goes on beside it
        (1.0, 6.0, 6.0, "write"),  # after it, on a disk that takes long to have it all
    ],
)
def test_the_bottleneck_is_what_the_others_wait_for(
    monkeypatch: pytest.MonkeyPatch,
    decode_wait_s: float,
    infer_s: float,
    write_s: float,
    expected: str,
) -> None:
    stand_still(monkeypatch, 0.0, 10.0)
    stats = collector(num_streams=2)
    for _ in range(8):
        stats.add_batch(decode_wait_s / 8, infer_s / 8)
    stats.add_write(write_s)
    figures = stats.snapshot()
    assert figures.bottleneck == expected
    assert "%" in figures.bottleneck_why


@pytest.mark.parametrize(
    ("write_s", "elsewhere_s", "expected"),
    [
        (1.0, 18.0, "decode"),  # each of three spends 6 s on lines, while it infers for 6.1 s
        (1.0, 27.0, "write"),
        (9.0, 3.0, "write"),  # they wait for the one that writes
    ],
)
def test_lines_that_several_processes_make_are_counted_and_compared_with_what_one_can_do(
    monkeypatch: pytest.MonkeyPatch, write_s: float, elsewhere_s: float, expected: str
) -> None:
    stand_still(monkeypatch, 0.0, 10.0)
    stats = collector(num_streams=3)
    for _ in range(12):
        stats.add_batch(11.7 / 12, 18.3 / 12)
    for _ in range(6):
        stats.add_lines_elsewhere(elsewhere_s / 6, 3)
    stats.add_write(write_s)
    figures = stats.snapshot()
    assert figures.bottleneck == expected
    assert figures.stage_s.write == write_s + elsewhere_s


@pytest.mark.parametrize(
    ("decode_wait_s", "infer_s", "write_s", "expected"),
    [(0.2, 0.1, 0.01, "decode"), (0.1, 0.2, 0.15, "infer"), (0.1, 0.2, 0.3, "write")],
)
@pytest.mark.parametrize("num_batches", [1, 5])
def test_the_bottleneck_of_a_short_job_is_its_longest_stage_and_said_to_be_unsure(
    num_batches: int, decode_wait_s: float, infer_s: float, write_s: float, expected: str
) -> None:
    stats = collector(num_streams=2)
    for _ in range(num_batches):
        stats.add_batch(decode_wait_s, infer_s)
        stats.add_write(write_s / (1 if num_batches == 1 else 2))
    figures = stats.snapshot()
    assert figures.bottleneck == expected
    assert figures.bottleneck_why.startswith("too short to tell")


def test_without_a_batch_the_bottleneck_says_so() -> None:
    assert collector().snapshot().bottleneck_why == "no batch was inferred"


def test_streams_may_add_batches_at_once() -> None:
    stats = collector()

    def add() -> None:
        for _ in range(2000):
            stats.add_batch(0.001, 0.002)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stages = stats.snapshot().stage_s
    assert stages.decode_wait == pytest.approx(8.0)
    assert stages.infer == pytest.approx(16.0)
    assert stats._batches._counts.total() == 8000
