"""Decoding in processes: the same pixels and outcomes as in threads, and an end in every case."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from batchclf.errors import BatchclfError
from batchclf.images.decode import Decoder
from batchclf.images.jpeg import decoder_name
from batchclf.images.load import Loader
from batchclf.images.prefetch import Load, Prefetcher, threads
from batchclf.images.processes import DecodeProcesses
from batchclf.results.records import ImageRef, Loaded, Pixels, Preprocess
from tests.conftest import command, read_records
from tests.tiny import SlowLoader, assert_same_records, link_digits, run_here, write_tiny_job

EDGE = 24
PREPROCESS = Preprocess(EDGE, (EDGE, EDGE), "bilinear", None, None)
BATCH_SHAPE = (5, EDGE, EDGE, 3)
SLOTS = 3


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """33 images of any kind, some of them no image or not there."""
    rng = np.random.default_rng(0)
    for number in range(33):
        path = tmp_path / f"{number:02d}.jpg"
        if number % 11 == 5:
            path.write_bytes(b"no image")
        elif number % 11 != 7:
            shape = (EDGE + number, 2 * EDGE, 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return tmp_path


def refs_of(count: int = 33) -> list[ImageRef]:
    return [ImageRef(number, b"%02d.jpg" % number) for number in range(count)]


def loader_of(folder: Path, max_pixels: int = 10**6) -> Loader:
    return Loader(os.fsencode(folder), True, Decoder(PREPROCESS, max_pixels=max_pixels))


def collect(batches: Prefetcher) -> tuple[list[Loaded], Pixels]:
    """What became of all images, and their pixels, NHWC."""
    loaded: list[Loaded] = []
    pixels: list[Pixels] = []
    while (batch := batches.next_batch()) is not None:
        loaded += batch.loaded
        pixels.append(batch.pixels_NHWC[: len(batch.refs)].copy())
        batches.release(batch)
    return loaded, np.concatenate(pixels)


def processes_of(loader: Load, count: int = 3) -> "closing[DecodeProcesses]":
    return closing(DecodeProcesses(loader, count, num_slots=SLOTS, batch_shape=BATCH_SHAPE))


def prefetcher(processes: DecodeProcesses, refs: Sequence[ImageRef]) -> Prefetcher:
    return Prefetcher(iter(refs), processes.decoding, batch_shape=BATCH_SHAPE, num_slots=SLOTS)


def test_pixels_and_outcomes_are_those_of_threads(images: Path) -> None:
    loader = loader_of(images, max_pixels=(EDGE + 30) * 2 * EDGE)
    with Prefetcher(
        iter(refs_of()),
        threads(loader, 2),
        batch_shape=BATCH_SHAPE,
        num_slots=SLOTS,
    ) as batches:
        expected, expected_NHWC = collect(batches)
    with processes_of(loader) as processes, prefetcher(processes, refs_of()) as batches:
        found, found_NHWC = collect(batches)
        assert processes.decoding.cpu_seconds() > 0
    assert found == expected
    codes = [one.failure and one.failure.code for one in found]
    assert {"not_an_image", "vanished", "too_large", None} <= {*codes}
    np.testing.assert_array_equal(found_NHWC, expected_NHWC)


def test_the_processes_end_with_the_block_and_with_their_parent(images: Path) -> None:
    with processes_of(loader_of(images)) as processes:
        children = psutil.Process().children()
        assert len(children) >= 3
        with prefetcher(processes, refs_of(4)) as batches:
            collect(batches)
    assert not [child for child in children if child.is_running()]
    script = (
        "import sys; from pathlib import Path; from tests.images.test_processes import *\n"
        "processes = processes_of(loader_of(Path(sys.argv[1])))\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(images)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        orphans = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(orphans) == 3
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(orphans, timeout=5)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_images_that_take_for_ever_are_abandoned_at_the_end_of_the_block(images: Path) -> None:
    ended = threading.Event()

    def leave_early() -> None:
        with processes_of(SlowLoader(loader_of(images), 60)) as processes:
            with prefetcher(processes, refs_of()):
                pass
            ended.set()

    threading.Thread(target=leave_early, daemon=True).start()
    assert ended.wait(30), "waits for images that nobody wants"


def test_a_process_that_dies_ends_the_job_with_the_images_it_had(images: Path) -> None:
    with processes_of(loader_of(images), 1) as processes:
        (child,) = (one for one in psutil.Process().children() if "processes" in str(one.cmdline()))
        child.kill()
        with (
            prefetcher(processes, refs_of()) as batches,
            pytest.raises(BatchclfError, match=r"exit code -9; it had been given 00\.jpg, 01\.jpg"),
        ):
            collect(batches)


def test_processes_that_do_not_get_ready_leave_none_behind(images: Path) -> None:
    before = psutil.Process().children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["/no/such/folder"])
        with pytest.raises(BatchclfError, match="exit code 1 before it began"):
            processes_of(loader_of(images))
    assert psutil.Process().children() == before


def test_a_bug_in_a_process_is_told_with_its_traceback(images: Path) -> None:
    broken = SlowLoader(loader_of(images), -1)  # time.sleep refuses that
    with (
        processes_of(broken) as processes,
        prefetcher(processes, refs_of()) as batches,
        pytest.raises(RuntimeError, match="in a decoding process:\nTraceback"),
    ):
        collect(batches)


def test_a_job_writes_the_same_records_with_processes_and_counts_their_time(
    tmp_path: Path,
) -> None:
    run_here(write_tiny_job(tmp_path, output=str(tmp_path / "threads")))
    loader = {"backend": "processes", "workers": 3}
    job = write_tiny_job(tmp_path, output=str(tmp_path / "processes"), loader=loader)
    run_here(job)
    assert_same_records(read_records(tmp_path / "processes"), read_records(tmp_path / "threads"))
    run = json.loads((tmp_path / "processes" / "run.json").read_bytes())
    assert (run["backend"], run["num_workers"]) == ("processes", 3)
    assert run["jpeg_decoder"] == decoder_name()


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_stopped_job_drains_its_processes(tmp_path: Path, whole_group: bool) -> None:
    link_digits(tmp_path / "images", 20_000)
    job = write_tiny_job(
        tmp_path,
        input=str(tmp_path / "images"),
        loader={"backend": "processes", "workers": 2},
    )
    process = subprocess.Popen(
        command("run", job), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    predictions = tmp_path / "out" / "predictions.jsonl"
    while not (predictions.exists() and predictions.stat().st_size):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (130 if whole_group else 143), stderr
    assert 0 < len(read_records(tmp_path / "out")) < 20_000
    assert not [child for child in children if child.is_running()]
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["status"] == "interrupted"
