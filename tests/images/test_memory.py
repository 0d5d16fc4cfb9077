"""Large images take turns: what decoders hold at once stays within a limit, and nobody is stuck."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchclf.images import decode, memory
from batchclf.images.decode import Decoder
from batchclf.images.decode_pool import DecodeProcesses, Workers
from batchclf.images.memory import SMALL_BYTES, Claim, SharedRoom
from batchclf.images.prefetch import Memory, Prefetcher, noted, threads
from batchclf.images.resampler import NATIVE
from batchclf.images.watch import Watch
from batchclf.results.records import Batch, Failure, ImageRef, Loaded, Pixels, Preprocess
from tests.conftest import ROOT
from tests.images.common import encode

LARGE = 2 * SMALL_BYTES
SMALL = Preprocess(32, (32, 32), "bilinear", None, None)
REFS = [ImageRef(number, b"%d" % number) for number in range(6)]
MEMORY = Memory(2, (3, 4, 4, 3))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> SharedRoom:
    """A room of this test's own."""
    own = SharedRoom()
    monkeypatch.setattr(memory, "_room", [own])
    return own


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < ends_at, "it never comes"
        time.sleep(0.002)


def test_turns_within_the_limit_are_given_at_once_and_others_in_the_order_of_asking() -> None:
    room, given = SharedRoom(), list[int]()

    def take(number: int, num_bytes: int) -> None:
        room.take(num_bytes, 100)
        given.append(number)

    room.take(40, 100)
    room.take(60, 100)
    askers = []
    for number, num_bytes in enumerate((50, 10, 40)):  # the second would fit before the first
        askers.append(threading.Thread(target=take, args=(number, num_bytes), daemon=True))
        askers[-1].start()
        wait_until(lambda number=number: len(room._asking) == number + 1)  # type: ignore[misc]
    room.give(40)
    time.sleep(0.02)
    assert given == []
    room.give(60)
    for asker in askers:
        asker.join(10)
    assert sorted(given) == [0, 1, 2]
    assert room.taken == 100


def test_what_is_larger_than_the_limit_has_the_room_to_itself() -> None:
    room, given = SharedRoom(), list[str]()

    def take() -> None:
        room.take(1000, 100)
        given.append("large")

    room.take(1, 100)
    asker = threading.Thread(target=take, daemon=True)
    asker.start()
    wait_until(lambda: len(room._asking) == 1)
    assert given == []
    room.give(1)
    asker.join(10)
    assert given == ["large"]


def test_many_threads_are_never_beyond_the_limit_and_none_is_stuck(room: SharedRoom) -> None:
    limit, lock, held, seen = 5 * LARGE, threading.Lock(), list[int](), list[list[int]]()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            sizes = [rng.choice((1, LARGE, 2 * LARGE, 3 * LARGE, 9 * LARGE)) for _ in range(2)]
            with Claim(limit) as claim:
                claim(sizes[0])
                claim(sizes[1])  # it needs another decoder, say
                taken = claim._taken
                with lock:
                    held.append(taken)
                    seen.append([one for one in held if one])
                if rng.random() < 0.3:
                    time.sleep(0.0005)
                with lock:
                    held.remove(taken)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8), timeout=60))
    assert all(sum(one) <= limit or len(one) == 1 for one in seen)
    assert max(map(len, seen)) > 1
    assert room.taken == 0


def test_who_holds_something_and_asks_for_more_goes_first_and_only_one_is_beyond_the_limit(
    room: SharedRoom,
) -> None:
    limit, all_hold = 3 * LARGE, threading.Barrier(3)
    inside, most_inside, most_taken = 0, 0, 0

    def work(number: int) -> None:
        nonlocal inside, most_inside, most_taken
        with Claim(limit) as claim:
            claim.keep(LARGE)
            if number < 3:
                all_hold.wait(20)
            for times in (1, 2):  # it needs another decoder, say
                claim(times * LARGE)
                inside += 1
                most_inside = max(most_inside, inside)
                most_taken = max(most_taken, room.taken)
                time.sleep(0.01)
                inside -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6), timeout=60))
    assert most_taken == limit + 2 * LARGE
    assert most_inside == 1
    assert room.taken == 0


def test_an_image_that_fails_gives_its_turn_back(
    room: SharedRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        assert room.taken > 0
        raise OSError("no more")

    monkeypatch.setattr(decode, "resize_into", fails)
    decoder = Decoder(SMALL, max_memory=1)
    for format_ in ("JPEG", "PNG"):
        loaded = decoder(large(format_), b"x", np.zeros((32, 32, 3), np.uint8))
        assert loaded.failure == Failure("corrupt", "OSError: no more")
    assert room.taken == 0


def test_small_images_never_touch_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "the_room", None)
    decoder = Decoder(SMALL, max_memory=1)
    for format_ in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = encode(Image.new("RGB", (1200, 1200)), format_)
        assert decoder(file, b"x", np.zeros((32, 32, 3), np.uint8)) == Loaded()


def large(format_: str) -> bytes:
    return encode(Image.new("RGB", (4096, 2048), (1, 2, 3)), format_)


PEAK = """
import sys, threading
import numpy as np
from batchclf.images.decode import Decoder
from batchclf.results.records import Preprocess
from batchclf.system.machine import peak_rss_mb
data, limit = open(sys.argv[1], "rb").read(), int(sys.argv[2])
decoder = Decoder(Preprocess(32, (32, 32), "bilinear", None, None), max_memory=limit)
before = peak_rss_mb()
def work():
    loaded = decoder(data, b"x", np.zeros((32, 32, 3), np.uint8))
    assert loaded.failure is None, loaded
workers = [threading.Thread(target=work) for _ in range(4)]
for one in workers: one.start()
for one in workers: one.join()
print(round(peak_rss_mb() - before))
"""


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_images_decoded_one_after_another_cost_the_memory_of_one(
    tmp_path: Path, format_: str
) -> None:
    """Four of 16 megapixels, in as many threads; Pillow has four bytes for each."""
    is_native = format_ == "JPEG" and bool(NATIVE)
    file, mb_each = tmp_path / "large", (3.3 if is_native else 4.3) * 16
    file.write_bytes(encode(Image.new("RGB", (4000, 4000), (9, 8, 7)), format_))
    found = {}
    for limit in (1, 2**40):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, file, str(limit)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found[limit] = int(done.stdout)
    assert found[1] < 1.3 * mb_each
    assert found[2**40] > 2 * mb_each, "the machine decodes but one at a time: this shows nothing"


# ---- who watches the time ------------------------------------------------------------------------


def test_an_image_that_waits_for_its_turn_is_not_one_that_takes_long(room: SharedRoom) -> None:
    notes: list[tuple[int, int | None]] = []
    room.take(LARGE, 1)

    def load(ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        with Claim(1) as claim:
            claim(LARGE if ref.index == 1 else 1)
        return Loaded()

    watch = Watch(lambda thread, index, step: notes.append((thread, index)))
    decoding = noted(threads(load, 1, MEMORY), watch)
    with Prefetcher(iter(REFS[:3]), decoding) as batches:
        wait_until(lambda: len(room._asking) == 1)
        assert notes[-1] == (0, None)
        room.give(LARGE)
        assert isinstance(batches.next_batch(), Batch)
    assert [index for _, index in notes] == [0, None, 1, None, 1, None, 2, None]


# ---- in processes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """In place of a loader: holds a turn for a while, and writes down from when to when."""

    log: Path
    seconds: float
    ends_on: int = -1
    """An image that ends its process."""

    def __call__(self, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        with Claim(LARGE) as claim:
            claim(LARGE)
            begun = time.monotonic()
            if ref.index == self.ends_on:
                os._exit(7)
            time.sleep(self.seconds)
            with self.log.open("a") as log:
                log.write(f"{begun} {time.monotonic()}\n")
        slot_HWC[:] = ref.index + 1
        return Loaded()


def run_in_processes(load: Holding, max_seconds: float = 60) -> list[Loaded]:
    loaded: list[Loaded] = []
    with (
        closing(DecodeProcesses(load, Workers(3, max_seconds), MEMORY)) as processes,
        Prefetcher(iter(REFS), processes.decoding) as batches,
    ):
        while (batch := batches.next_batch()) is not None:
            loaded += batch.loaded
            batches.release(batch)
    return loaded


def turns_of(log: Path) -> list[tuple[float, float]]:
    return sorted((float(a), float(b)) for a, b in map(str.split, log.read_text().splitlines()))


def test_processes_take_turns_in_the_room_of_their_parent(tmp_path: Path, room: SharedRoom) -> None:
    load = Holding(tmp_path / "log", 0.05)
    assert run_in_processes(load) == [Loaded()] * len(REFS)
    turns = turns_of(load.log)
    assert len(turns) == len(REFS)
    assert all(before[1] <= after[0] for before, after in pairwise(turns))
    assert room.taken == 0


def test_a_process_that_ends_gives_its_turn_back(tmp_path: Path, room: SharedRoom) -> None:
    load = Holding(tmp_path / "log", 0.01, ends_on=2)
    loaded = run_in_processes(load)
    codes = [one.failure and one.failure.code for one in loaded]
    assert codes == [None, None, "decoder_crash", None, None, None]
    assert room.taken == 0


def test_the_time_that_an_image_waits_for_its_turn_is_not_its_own(
    tmp_path: Path, room: SharedRoom
) -> None:
    """Six of them wait for one another, all together longer than one may take."""
    load = Holding(tmp_path / "log", 0.3)
    assert run_in_processes(load, max_seconds=0.9) == [Loaded()] * len(REFS)
    turns = turns_of(load.log)
    assert turns[-1][1] - turns[0][0] > 1.5
    assert room.taken == 0
