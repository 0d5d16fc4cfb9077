"""What becomes of a run after one of its processes died, case by case, and death after death."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from batchclf.errors import BatchclfError, EnvironmentFailed, OutOfMemory, WorkerFailed
from batchclf.images.archives.listing import Archive
from batchclf.images.archives.location import File
from batchclf.images.local import LocalFiles
from batchclf.images.source import Source
from batchclf.results.records import Failure, Quarantined, Stretch
from batchclf.run.recovery import (
    ISOLATE_AFTER,
    MANY_GUILTY,
    MAX_FUTILE,
    Beginning,
    Death,
    Progress,
    Recovery,
    recover,
)

BEGUN = Beginning(began=5.0, startup_s=1.5, num_done=0)
RESUMED = Beginning(began=5.0, startup_s=1.5, num_done=100)
DEATH = Death("ended (exit code 7)", ())
KILLED = Death("ended (killed by SIGKILL)", (), by_kernel=True)
DEVICE_LOST = Death("lost its device (no answer)", (), by_device=True)
AT_TWO_IMAGES = Death("ended (killed by SIGSEGV)", (4, 7))
ARCHIVE = Archive(
    LocalFiles(Source(Path("a.zip"), "file", b"", confined=False)), None, File(b"a.zip", b"a.zip")
)
AT_AN_ARCHIVE = Death("ended (killed by SIGSEGV)", listing=ARCHIVE)
LOST = {ARCHIVE: Failure("damaged_archive", "killed by SIGSEGV")}
ISOLATED = "; decoding in processes of its own from now on"


def guilty(number: int) -> Quarantined:
    """So many images that were found guilty."""
    return {b"%d.jpg" % one: Failure("crash", "killed by SIGSEGV") for one in range(number)}


STRETCHES: Quarantined = {
    Stretch(b"a.parquet", start, start + 10): Failure("crash", "killed by SIGSEGV")
    for start in range(0, 100 * MANY_GUILTY, 100)
}
"""Many, which decoding in processes of its own does not help against."""


def short_of_memory(batch_size: int, *, can_be_smaller: bool = True) -> OutOfMemory:
    return OutOfMemory(batch_size, "bad allocation", can_be_smaller=can_be_smaller)


@dataclass(frozen=True)
class Case:
    """One row: what there was, what happened, and how the next process is to go on."""

    name: str
    before: Recovery
    ended: Death | OutOfMemory
    progress: Progress
    after: Recovery
    what: str
    """The end of the line that people are told."""


AT_START = Progress(0, {}, None)
"""The process died before it began to classify."""
CASES = (
    # ---- over an archive that it was listing ----
    Case(
        "over an archive",
        Recovery(num_futile=ISOLATE_AFTER),
        AT_AN_ARCHIVE,
        AT_START,
        Recovery(listing=ARCHIVE, num_futile=ISOLATE_AFTER + 1),
        "; the archive that it was listing, to be tried alone: a.zip",
    ),
    Case(
        "over another archive than the one that was found out",
        Recovery(listing=ARCHIVE, num_futile=1),
        AT_AN_ARCHIVE,
        Progress(0, {}, None, LOST),
        Recovery(listing=ARCHIVE, unlistable=LOST),
        "to be tried alone: a.zip",
    ),
    # ---- whether it got any further ----
    Case(
        "dead before it began",
        Recovery(),
        DEATH,
        AT_START,
        Recovery(num_futile=1),
        "the worker ended (exit code 7): starting it again",
    ),
    Case(
        "dead before its first record",
        Recovery(),
        DEATH,
        Progress(0, {}, BEGUN),
        Recovery(beginning=BEGUN, num_futile=1),
        ": starting it again",
    ),
    Case(
        "dead after a record",
        Recovery(),
        DEATH,
        Progress(1, {}, BEGUN),
        Recovery(beginning=BEGUN, num_images=1),
        ": starting it again",
    ),
    Case(
        "a record more than the one before",
        Recovery(beginning=BEGUN, num_images=8, num_futile=MAX_FUTILE),
        DEATH,
        Progress(9, {}, BEGUN),
        Recovery(beginning=BEGUN, num_images=9),
        ": starting it again",
    ),
    Case(
        "no record more than the one before",
        Recovery(beginning=BEGUN, num_images=8),
        DEATH,
        Progress(8, {}, BEGUN),
        Recovery(beginning=BEGUN, num_images=8, num_futile=1),
        ": starting it again",
    ),
    Case(
        "resumed and no further",
        Recovery(),
        DEATH,
        Progress(100, {}, RESUMED),
        Recovery(beginning=RESUMED, num_images=100, num_futile=1),
        ": starting it again",
    ),
    Case(
        "resumed and a record further",
        Recovery(num_futile=1),
        DEATH,
        Progress(101, {}, RESUMED),
        Recovery(beginning=RESUMED, num_images=101),
        ": starting it again",
    ),
    Case(
        "resumed and no further than the one before",
        Recovery(beginning=RESUMED, num_images=120),
        DEATH,
        Progress(120, {}, RESUMED),
        Recovery(beginning=RESUMED, num_images=120, num_futile=1),
        ": starting it again",
    ),
    # ---- images that may be, or are, to blame ----
    Case(
        "while it decoded",
        Recovery(),
        AT_TWO_IMAGES,
        Progress(0, {}, BEGUN),
        Recovery(suspects=(4, 7), beginning=BEGUN, num_futile=1),
        ": starting it again; images that it was decoding, to be tried alone: 2",
    ),
    Case(
        "suspects of before are not tried again",
        Recovery(suspects=(4, 7), beginning=BEGUN, num_futile=1),
        DEATH,
        Progress(3, {}, BEGUN),
        Recovery(beginning=BEGUN, num_images=3),
        ": starting it again",
    ),
    Case(
        "an image was found guilty",
        Recovery(suspects=(4,), beginning=BEGUN, num_futile=MAX_FUTILE),
        DEATH,
        Progress(0, guilty(1), BEGUN),
        Recovery(quarantined=guilty(1), beginning=BEGUN),
        ": starting it again",
    ),
    Case(
        "no other image was found guilty",
        Recovery(quarantined=guilty(1), beginning=BEGUN),
        DEATH,
        Progress(0, guilty(1), BEGUN),
        Recovery(quarantined=guilty(1), beginning=BEGUN, num_futile=1),
        ": starting it again",
    ),
    Case(
        "while it read archives",
        Recovery(),
        Death("ended (killed by SIGSEGV)", (4, 7), (9,)),
        Progress(0, {}, BEGUN),
        Recovery(suspects=(4, 7), readers=(9,), beginning=BEGUN, num_futile=1),
        "to be tried alone: 2; images that it was reading archives for, likewise: 1",
    ),
    Case(
        "readers of before are not tried again",
        Recovery(readers=(9,), beginning=BEGUN, num_futile=1),
        DEATH,
        Progress(0, STRETCHES, BEGUN),
        Recovery(quarantined=STRETCHES, beginning=BEGUN),
        ": starting it again",
    ),
    # ---- decoding in processes of its own ----
    Case(
        "a second death in vain",
        Recovery(num_futile=ISOLATE_AFTER - 1),
        AT_TWO_IMAGES,
        AT_START,
        Recovery(suspects=(4, 7), isolate=True, num_futile=ISOLATE_AFTER),
        f"to be tried alone: 2{ISOLATED}",
    ),
    Case(
        "a second death in vain of its device",
        Recovery(num_futile=ISOLATE_AFTER - 1),
        DEVICE_LOST,
        AT_START,
        Recovery(num_futile=ISOLATE_AFTER),
        "the worker lost its device (no answer): starting it again",
    ),
    Case(
        "not yet many guilty",
        Recovery(beginning=BEGUN),
        DEATH,
        Progress(9, guilty(MANY_GUILTY - 1), BEGUN),
        Recovery(quarantined=guilty(MANY_GUILTY - 1), beginning=BEGUN, num_images=9),
        ": starting it again",
    ),
    Case(
        "many guilty",
        Recovery(quarantined=guilty(MANY_GUILTY - 1), beginning=BEGUN),
        DEATH,
        Progress(9, guilty(MANY_GUILTY), BEGUN),
        Recovery(quarantined=guilty(MANY_GUILTY), isolate=True, beginning=BEGUN, num_images=9),
        f": starting it again{ISOLATED}",
    ),
    Case(
        "more than many guilty at once",
        Recovery(beginning=BEGUN),
        DEATH,
        Progress(9, guilty(MANY_GUILTY + 1), BEGUN),
        Recovery(quarantined=guilty(MANY_GUILTY + 1), isolate=True, beginning=BEGUN, num_images=9),
        f": starting it again{ISOLATED}",
    ),
    Case(
        "once isolated always isolated, and told of once",
        Recovery(isolate=True, beginning=BEGUN, num_futile=2),
        DEATH,
        Progress(9, {}, BEGUN),
        Recovery(isolate=True, beginning=BEGUN, num_images=9),
        "the worker ended (exit code 7): starting it again",
    ),
    Case(
        "the last death in vain that is survived",
        Recovery(isolate=True, num_futile=MAX_FUTILE - 1),
        KILLED,
        AT_START,
        Recovery(isolate=True, num_futile=MAX_FUTILE),
        "the worker ended (killed by SIGKILL): starting it again",
    ),
    Case(
        "smaller batches stay small",
        Recovery(max_batch_size=4),
        DEATH,
        AT_START,
        Recovery(max_batch_size=4, num_futile=1),
        ": starting it again",
    ),
    # ---- memory ----
    Case(
        "memory for half a batch",
        Recovery(),
        short_of_memory(32),
        Progress(0, {}, BEGUN),
        Recovery(max_batch_size=16, beginning=BEGUN),
        "memory does not suffice for batches of 32 (bad allocation): going on with 16 in a new "
        "session",
    ),
    Case(
        "an odd batch",
        Recovery(max_batch_size=3),
        short_of_memory(3),
        AT_START,
        Recovery(max_batch_size=1),
        "going on with 1 in a new session",
    ),
    Case(
        "what was found out is not forgotten",
        Recovery(suspects=(4, 7), isolate=True),
        short_of_memory(32),
        Progress(9, guilty(1), RESUMED),
        Recovery(
            quarantined=guilty(1),
            isolate=True,
            max_batch_size=16,
            beginning=RESUMED,
            num_images=9,
        ),
        "going on with 16 in a new session",
    ),
    Case(
        "memory too short to get any further",
        Recovery(isolate=True, beginning=BEGUN, num_images=9, num_futile=MAX_FUTILE),
        short_of_memory(32),
        Progress(9, {}, BEGUN),
        Recovery(
            isolate=True,
            max_batch_size=16,
            beginning=BEGUN,
            num_images=9,
            num_futile=MAX_FUTILE,
        ),
        "going on with 16 in a new session",
    ),
    Case(
        "memory too short after a record",
        Recovery(isolate=True, beginning=BEGUN, num_images=9, num_futile=MAX_FUTILE),
        short_of_memory(32),
        Progress(10, {}, BEGUN),
        Recovery(isolate=True, max_batch_size=16, beginning=BEGUN, num_images=10),
        "going on with 16 in a new session",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_next_process_goes_on_as_what_happened_asks_for(case: Case) -> None:
    after, what = recover(case.before, case.ended, case.progress)
    assert after == case.after
    assert what.endswith(case.what)


@pytest.mark.parametrize(
    ("death", "kind", "said"),
    [
        (KILLED, EnvironmentFailed, r"was killed \(SIGKILL\) 4 times .* memory ran out: choose a"),
        (DEVICE_LOST, WorkerFailed, r"lost its device \(no answer\) 4 times .* look at the device"),
        (AT_AN_ARCHIVE, WorkerFailed, r"4 times while listing a.zip, .* leave it out of the input"),
        (AT_TWO_IMAGES, WorkerFailed, r"\(killed by SIGSEGV\) 4 times .* no image is to blame"),
    ],
    ids=["by the kernel", "by its device", "at an archive", "otherwise"],
)
def test_what_dies_again_and_again_in_vain_ends_the_job_with_the_likely_reason(
    death: Death, kind: type[BatchclfError], said: str
) -> None:
    recovery = Recovery()
    for _ in range(MAX_FUTILE):
        recovery, _what = recover(recovery, death, AT_START)
    with pytest.raises(kind, match=said) as caught:
        recover(recovery, death, AT_START)
    assert type(caught.value) is kind


def test_any_number_of_deaths_is_survived_with_a_record_between_them() -> None:
    recovery = Recovery()
    for number in range(1, 4 * MAX_FUTILE):
        recovery, what = recover(recovery, AT_TWO_IMAGES, Progress(number, {}, BEGUN))
        assert "processes of its own" not in what
    assert recovery == Recovery(suspects=(4, 7), beginning=BEGUN, num_images=number)


def test_any_number_of_deaths_is_survived_with_a_culprit_between_them() -> None:
    recovery = Recovery()
    for number in range(1, 4 * MAX_FUTILE):
        recovery, _ = recover(recovery, AT_TWO_IMAGES, Progress(0, guilty(number), BEGUN))
    assert recovery == Recovery((4, 7), guilty(number), isolate=True, beginning=BEGUN)


def test_batches_are_halved_until_they_fit_and_no_death_is_counted() -> None:
    recovery, size, sizes = Recovery(), 40, []
    while size > 1:
        recovery, _ = recover(recovery, short_of_memory(size), AT_START)
        size = recovery.max_batch_size
        sizes.append(size)
    assert sizes == [20, 10, 5, 2, 1]
    assert recovery == Recovery(max_batch_size=1)


def test_memory_that_does_not_suffice_for_less_ends_the_job_as_what_it_is() -> None:
    error = short_of_memory(1, can_be_smaller=False)
    with pytest.raises(OutOfMemory) as caught:
        recover(Recovery(), error, AT_START)
    assert caught.value is error


def test_what_is_found_guilty_later_is_not_taken_for_known_before() -> None:
    found = dict(guilty(1))
    recovery, _ = recover(Recovery(), DEATH, Progress(0, found, BEGUN))
    found.update(guilty(2))
    recovery, _ = recover(recovery, DEATH, Progress(0, found, BEGUN))
    assert recovery == Recovery(quarantined=guilty(2), beginning=BEGUN)
