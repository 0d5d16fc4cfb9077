"""A model that says the same of every image is told from images that are the same."""

import numpy as np
import pytest

from batchclf.results.records import Batch, Failure, ImageRef, Loaded, Prediction, Record
from batchclf.run.sameness import ENOUGH, ENOUGH_SATURATED, FEW, FirstAnswers

SAME = (Prediction("ant", 0, 0.25), Prediction("bee", 1, 0.25))
SURE = (Prediction("ant", 0, 1.0), Prediction("bee", 1, 0.0))
BAD = Failure("truncated", "ends early")


def batch_of(
    colours: list[int], outcomes: list[tuple[Prediction, ...] | Failure]
) -> tuple[Batch, list[Record]]:
    """Images of one colour each with what was said of them, and a row of padding."""
    refs = tuple(ImageRef(index, b"%d" % index) for index in range(len(colours)))
    pixels_NHWC = np.zeros((len(colours) + 1, 2, 2, 3), np.uint8)
    pixels_NHWC[:-1] = np.array(colours, np.uint8)[:, None, None, None]
    records = [Record(ref, outcome) for ref, outcome in zip(refs, outcomes, strict=True)]
    return Batch(0, refs, (Loaded(),) * len(refs), pixels_NHWC), records


@pytest.mark.parametrize("size", [1, 3, ENOUGH, 20])
def test_enough_images_with_one_answer_are_warned_of_once(size: int) -> None:
    first, said = FirstAnswers(), []
    for start in range(0, 60, size):
        colours = list(range(start, start + size))
        said.append(first.look(*batch_of(colours, [SAME] * size)))
    said.append(first.end())
    (warning,) = [one for one in said if one is not None]
    assert warning.startswith(f"WARNING: {ENOUGH} different images all got one and the same answer")
    assert "'ant' with score 0.25: the model does not see them" in warning


@pytest.mark.parametrize("count", [FEW - 1, FEW, ENOUGH - 1])
def test_a_short_job_is_judged_at_its_end(count: int) -> None:
    first = FirstAnswers()
    assert first.look(*batch_of(list(range(count)), [SAME] * count)) is None
    assert (first.end() is not None) == (count >= FEW)


@pytest.mark.parametrize("size", [1, 7, ENOUGH_SATURATED])
def test_many_sure_answers_are_no_proof_and_warned_of_late(size: int) -> None:
    first, said = FirstAnswers(), []
    for start in range(0, 2 * ENOUGH_SATURATED, size):
        colours = list(range(start, start + size))
        said.append(first.look(*batch_of(colours, [SURE] * size)))
        if start + size < ENOUGH_SATURATED:
            assert said[-1] is None
    said.append(first.end())
    (warning,) = [one for one in said if one is not None]
    assert warning.startswith(f"WARNING: {ENOUGH_SATURATED} different images")
    assert "the model may not see them" in warning


@pytest.mark.parametrize("count", [FEW, ENOUGH, ENOUGH_SATURATED - 1])
def test_a_short_job_of_sure_answers_is_not_judged(count: int) -> None:
    first = FirstAnswers()
    assert first.look(*batch_of(list(range(count)), [SURE] * count)) is None
    assert first.end() is None


def test_copies_of_one_image_count_once_and_failures_not_at_all() -> None:
    first = FirstAnswers()
    assert first.look(*batch_of([7] * 30, [SAME] * 30)) is None
    assert first.look(*batch_of(list(range(30)), [BAD] * 30)) is None
    assert first.end() is None


@pytest.mark.parametrize(
    "other", [(Prediction("ant", 0, 0.25), Prediction("bee", 1, 0.2499)), SAME[::-1]]
)
def test_one_answer_that_differs_ends_it(other: tuple[Prediction, ...]) -> None:
    first = FirstAnswers()
    assert first.look(*batch_of([1, 2, 3], [SAME, SAME, other])) is None
    assert first.look(*batch_of(list(range(40)), [SAME] * 40)) is None
    assert first.end() is None


def test_a_batchs_pixels_may_be_used_again() -> None:
    first = FirstAnswers()
    batch, records = batch_of([1], [SAME])
    first.look(batch, records)
    batch.pixels_NHWC[...] = 9
    assert first.look(*batch_of([1] * ENOUGH, [SAME] * ENOUGH)) is None
    assert first.end() is None
