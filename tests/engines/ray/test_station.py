"""A worker of a cluster by itself: what it commits, and what it asks about first; without Ray.

Each is a real process; what a driver would send, the test sends.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from batchclf.engines.ray import station
from batchclf.engines.ray.station import Station
from batchclf.errors import EnvironmentFailed
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import resolve_model
from batchclf.results.files import RunFiles
from batchclf.results.lines import encode_record
from batchclf.results.parts import Committed, Folders
from batchclf.results.records import Failure, ImageRef, Record
from batchclf.run.duty import Attempt, Doubt, Duty, Landmark
from batchclf.run.landmarks import NUM_LANDMARKS, Witness, require_landmarks
from batchclf.run.ranges import Range
from batchclf.runtime.classifier import open_reference
from batchclf.spec.file import load_job
from tests.engines.common import fault
from tests.results.common import placed
from tests.tiny import link_digits, write_tiny_job

NUM_IMAGES = 40
WAIT_S = 30.0
"""Beyond which a worker hangs; the batch of SLOW takes far longer."""
SLOW = """
def change(module):
    rank, batches = module.rank, []
    def rank_late(*args, **kwargs):
        batches.append(1)
        if len(batches) > 4:
            (FOLDER / "waiting").touch()
            time.sleep(1000)
        return rank(*args, **kwargs)
    module.rank = rank_late
"""


@dataclass(slots=True)
class Site:
    """A job's input and output, where stations are set up."""

    duty: Duty
    images: Path
    folders: Folders
    witness: Witness

    def attempt(self, first: int, stop: int) -> Attempt:
        near = self.duty.listing.mark(first)
        return Attempt(
            Range(first, stop - first, near), self.folders, self.folders.new_draft(first)
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    images = tmp_path / "images"
    images.mkdir()
    link_digits(images / "some", NUM_IMAGES)
    job = load_job(write_tiny_job(tmp_path, input=str(images), batch_size=4))
    model = resolve_model(job.model, batch_size=4, open_reference=open_reference, log=print)
    out = tmp_path / "out"
    out.mkdir()
    files = RunFiles(out)
    names = sorted(os.fsencode(path.relative_to(images)) for path in images.rglob("*.*"))
    listing = placed(files, names)
    folders = Folders(files.parts, files.new_drafts())
    folders.make()
    folders.make_parts()
    witness = Witness(open_store(source_of(job)), listing, files)
    duty = Duty(job, model, listing, NUM_IMAGES, landmarks=witness.landmarks)
    return Site(duty, images, folders, witness)


@contextmanager
def station_of(duty: Duty) -> Iterator[tuple[Station, Callable[[Attempt], Future[object]]]]:
    """A station, and how it is asked to do things meanwhile."""
    one = Station(duty)
    with ThreadPoolExecutor() as pool:
        try:
            yield one, lambda attempt: pool.submit(one.do, attempt)
        finally:
            one.stop()


def until(condition: Callable[[], object]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


# ---- a signal ------------------------------------------------------------------------------------


@pytest.fixture
def has_slowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Stations take for ever over any batch after their fourth; whether one is at such a batch."""
    monkeypatch.setattr(station, "DRAIN_S", 0.5)
    for name, value in fault(tmp_path, SLOW, "batchclf.runtime.ranking").items():
        monkeypatch.setenv(name, value)
    return (tmp_path / "fault" / "waiting").exists


def test_what_was_written_when_a_signal_came_in_a_long_batch_is_committed(
    site: Site, has_slowed: Callable[[], bool]
) -> None:
    with station_of(site.duty) as (one, do):
        assert do(site.attempt(0, 8)).result(WAIT_S) == Committed(0, *written(site, 0), Counter())
        attempt = site.attempt(8, 40)
        asked = do(attempt)
        until(lambda: has_slowed() and attempt.draft.stat().st_size)
        one.stop()
        part = asked.result(WAIT_S)
    assert isinstance(part, Committed)
    assert 0 < part.num_images < 32
    assert written(site, 8) == (part.num_bytes, part.num_images)
    assert not attempt.draft.exists()


def test_what_may_be_missing_by_mistake_is_not_committed_after_a_signal_either(
    site: Site, has_slowed: Callable[[], bool]
) -> None:
    with station_of(site.duty) as (one, do):
        assert one.opened()
        for path in sorted((site.images / "some").iterdir())[:12]:
            path.unlink()
        attempt = site.attempt(0, 40)
        asked = do(attempt)
        until(lambda: has_slowed() and attempt.draft.read_bytes().count(b"vanished") == 12)
        one.stop()
        assert asked.result(WAIT_S) is None
    assert list(site.folders.parts.iterdir()) == []


def written(site: Site, first: int) -> tuple[int, int]:
    data = site.folders.path(first).read_bytes()
    return len(data), data.count(b"\n")


# ---- a listing that is not in its place yet ------------------------------------------------------


def test_a_worker_opens_with_a_sample_before_the_listing_is_in_its_place(site: Site) -> None:
    job = site.duty.job.model_copy(update={"precision": "int8", "min_agreement": 0.0})
    sample = tuple(site.duty.listing.refs(0, 8))
    path = site.duty.listing.path
    path.rename(path.with_name("later"))
    with station_of(replace(site.duty, job=job, sample=sample)) as (one, do):
        opened, _ = one.opened()
        assert opened.precision_check is not None
        assert opened.precision_check.num_images == 8
        path.with_name("later").rename(path)
        part = do(site.attempt(0, 16)).result(WAIT_S)
    assert isinstance(part, Committed)
    assert part.num_ok == 16


# ---- an input that is not there ------------------------------------------------------------------


def test_a_range_whose_images_are_missing_is_committed_only_when_that_is_confirmed(
    site: Site,
) -> None:
    some, elsewhere = site.images / "some", site.images / "elsewhere"
    with station_of(site.duty) as (one, do):
        assert one.opened()
        some.rename(elsewhere)
        some.mkdir()
        attempt = site.attempt(0, 20)
        assert do(attempt).result(WAIT_S) == Doubt(attempt)
        seen = one.look()
        assert (seen.num_underway, seen.num_errors) == (20, 0), "errors.max is not passed by it"
        assert list(site.folders.parts.iterdir()) == []
        assert site.witness.seen(attempt) is None
        some.rmdir()
        elsewhere.rename(some)
        assert site.witness.seen(attempt) == str(min(some.iterdir()))
        part = do(replace(attempt, is_confirmed=True)).result(WAIT_S)
    assert isinstance(part, Committed)
    assert part.errors_by_code == {"vanished": 20}
    assert written(site, 0)[1] == 20
    seen = one.look()
    assert (seen.num_underway, seen.num_errors, seen.number) == (0, 0, 2)


def test_a_few_images_that_went_away_are_recorded_at_once(site: Site) -> None:
    with station_of(site.duty) as (one, do):
        assert one.opened()
        for path in sorted((site.images / "some").iterdir())[:3]:
            path.unlink()
        part = do(site.attempt(0, 40)).result(WAIT_S)
    assert isinstance(part, Committed)
    assert part.errors_by_code == {"vanished": 3}


def test_a_range_that_ends_with_a_missing_image_is_asked_about_as_where_a_mount_was_just_lost(
    site: Site,
) -> None:
    with station_of(site.duty) as (one, do):
        assert one.opened()
        sorted((site.images / "some").iterdir())[-1].unlink()
        attempt = site.attempt(0, 40)
        assert do(attempt).result(WAIT_S) == Doubt(attempt)


@pytest.mark.parametrize("there", [12, 19])
def test_missing_images_from_all_over_a_range_are_looked_for(site: Site, there: int) -> None:
    paths = sorted((site.images / "some").iterdir())
    attempt = site.attempt(0, 20)
    lines = (
        encode_record(Record(ref, Failure("vanished", "it is not there")))
        for ref in attempt.range.refs(site.duty.listing)
    )
    attempt.draft.write_bytes(b"".join(lines))
    for number in {*range(20)} - {there}:
        paths[number].unlink()
    assert site.witness.seen(attempt) == str(paths[there])


def test_a_worker_that_finds_another_input_than_the_driver_does_not_open(site: Site) -> None:
    names = sorted((site.images / "some").iterdir())
    for path in names:
        path.unlink()
        path.write_bytes(b"another file")
    one = Station(site.duty)
    with pytest.raises(EnvironmentFailed, match="it has 12 bytes, and where the job was started"):
        one.opened()


def test_what_is_removed_while_a_worker_is_open_ends_neither_its_next_process_nor_another_worker(
    site: Site,
) -> None:
    with station_of(site.duty) as (one, do):
        assert one.opened()
        for path in sorted((site.images / "some").iterdir())[:3]:
            path.unlink()
        assert one._watching is not None
        one._watching._workers.current._process.kill()
        part = do(site.attempt(0, 40)).result(WAIT_S)
    assert isinstance(part, Committed)
    assert part.errors_by_code == {"vanished": 3}
    left = site.witness.landmarks_left()
    assert len(left) == NUM_LANDMARKS - 3
    with station_of(replace(site.duty, landmarks=left)) as (other, _):
        assert other.opened()


# ---- what the driver sees ------------------------------------------------------------------------


def test_landmarks_are_spread_and_one_of_them_may_have_changed(site: Site) -> None:
    found, store = site.witness.landmarks, site.witness.store
    assert len(found) == NUM_LANDMARKS
    assert found[0].ref.index == 0
    assert found[-1].ref.index == 38
    one = site.images / os.fsdecode(found[3].ref.path)
    one.unlink()
    require_landmarks(store, found)
    with pytest.raises(EnvironmentFailed, match=r"1 of 1 images that were compared; .*mounted"):
        require_landmarks(store, found[3:4])
    gone = Landmark(ImageRef(0, b"some/none.png"), 7)
    with pytest.raises(EnvironmentFailed, match=r"none\.png: it is not there, and where the job"):
        require_landmarks(store, (gone, *found))


def test_an_input_most_of_which_has_gone_for_the_driver_as_well_ends_the_job(site: Site) -> None:
    assert site.witness.landmarks
    names = sorted((site.images / "some").iterdir())
    for path in names[:10]:
        path.unlink()
    site.witness.require_input()
    for path in names[10:]:
        path.unlink()
    with pytest.raises(EnvironmentFailed, match=r"\(32 of 32 that were looked at\); put them back"):
        site.witness.require_input()
