"""What is left of a listing, handed out in ranges."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.results import listing as listing_module
from batchclf.results.files import RunFiles
from batchclf.results.listing import Listing
from batchclf.results.records import ImageRef
from batchclf.run.ranges import Failed, Gaps, Range, Ranges, gaps_between
from tests.results.common import placed

NUM_IMAGES = 40
PATHS = [b"folder/%03d.jpg" % number for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module", params=[False, True], ids=["paths", "located"])
def listing(request: pytest.FixtureRequest) -> Iterator[Listing]:
    with tempfile.TemporaryDirectory() as folder:
        locations = [b"at %d" % number for number in range(NUM_IMAGES)] if request.param else ()
        yield placed(RunFiles(Path(folder)), PATHS, locations)


def taken(ranges: Ranges, sizes: Iterator[int]) -> Iterator[Range]:
    while (one := ranges.take(next(sizes))) is not None:
        yield one


@given(
    done=st.lists(st.tuples(st.integers(0, NUM_IMAGES), st.integers(1, 9)), max_size=6),
    bounds=st.tuples(st.integers(0, NUM_IMAGES), st.integers(0, NUM_IMAGES)).map(sorted),
    sizes=st.lists(st.integers(1, 12), min_size=1),
    read_bytes=st.integers(1, 64),
)
def test_ranges_hold_each_image_that_is_not_done_once_and_in_order(
    listing: Listing,
    done: list[tuple[int, int]],
    bounds: list[int],
    sizes: list[int],
    read_bytes: int,
) -> None:
    first, last = bounds
    spans = sorted((start, start + length) for start, length in done)
    spans = [(start, min(stop, last)) for start, stop in spans if first <= start < last]
    expected = [
        number
        for number in range(first, last)
        if not any(start <= number < stop for start, stop in spans)
    ]
    ranges = Gaps(listing, gaps_between(first, last, spans), first)
    assert ranges.num_left == len(expected)
    endless = iter(sizes * (NUM_IMAGES + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing_module, "READ_BYTES", read_bytes)
        found = list(taken(ranges, endless))
        refs = [ref for one in found for ref in one.refs(listing)]
        halves = [ref for one in found for ref in halved(ranges, one, listing)]
    assert [ref.index for ref in refs] == expected
    assert [ref.path for ref in refs] == [PATHS[number] for number in expected]
    assert halves == refs
    assert ranges.num_left == 0


def halved(ranges: Ranges, one: Range, listing: Listing) -> list[ImageRef]:
    """The images of a range of which only the first half was done, and of the rest of it."""
    half = one.num_images // 2
    rest = ranges.after(one, half) if half else one
    assert rest.first == one.first + half
    return [*list(one.refs(listing))[:half], *rest.refs(listing)]


def test_failed_images_are_numbered_among_themselves_and_brought_along(listing: Listing) -> None:
    refs = [ImageRef(number, PATHS[number]) for number in (3, 7, 8, 21, 30)]
    ranges = Failed(iter(refs), len(refs), num_done=2)
    first, second, none = (ranges.take(3) for _ in range(3))
    assert first is not None
    assert second is not None
    assert none is None
    assert ((first.first, first.num_images), (second.first, second.num_images)) == ((2, 3), (5, 2))
    assert [*first.refs(listing), *second.refs(listing)] == refs
    assert list(first.refs(listing, 2)) == refs[2:3]
    rest = ranges.after(first, 1)
    assert (rest.first, list(rest.refs(listing))) == (3, refs[1:3])
