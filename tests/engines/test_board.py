"""The board that a worker process shares with its parent."""

import os
import time
from pathlib import Path
from typing import cast

import pytest

from batchclf.engines.local.board import MAX_DEVICES, MAX_THREADS, Board
from batchclf.engines.local.process import WorkerProcess
from batchclf.engines.local.watcher import _Pulse
from batchclf.images.ahead import Depth
from batchclf.spec.file import load_job
from batchclf.spec.job import MAX_COUNT
from tests.tiny import write_tiny_job


def test_every_thread_that_a_job_may_have_has_its_place_on_the_board() -> None:
    assert MAX_COUNT + MAX_DEVICES * Depth().num_reads == MAX_THREADS
    descriptor = Board.new_descriptor()
    try:
        worker, parent = Board(descriptor), Board(descriptor)
    finally:
        os.close(descriptor)
    worker.at(MAX_THREADS - 1, 7, step=3)
    worker.at(0, 0)
    assert list(parent.in_flight()) == [(0, 0, 0), (MAX_THREADS - 1, 7, 3)]
    parent.clear()
    assert list(worker.in_flight()) == []


def test_what_the_worker_counts_and_that_it_is_alive_is_seen_by_its_parent() -> None:
    descriptor = Board.new_descriptor()
    try:
        worker, parent = Board(descriptor), Board(descriptor)
    finally:
        os.close(descriptor)
    worker.count(7, 2)
    assert (parent.num_images, parent.num_errors) == (7, 2)
    worker.at(5, 41)
    worker.at(5, None)
    assert list(parent.in_flight()) == []
    before = parent.last_beat
    worker.beat()
    assert parent.last_beat != before


def test_an_output_that_was_never_known_to_be_ones_own_is_as_good_as_lost() -> None:
    descriptor = Board.new_descriptor()
    try:
        board = Board(descriptor)
    finally:
        os.close(descriptor)
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert board.seconds_since_renewed >= uptime_s
    board.renewed()
    assert 0 <= board.seconds_since_renewed < uptime_s


class Idle:
    """A worker that uses no CPU time."""

    def cpu_seconds(self) -> float:
        return 0.0


def test_an_image_may_take_its_seconds_from_when_it_was_begun_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(write_tiny_job(tmp_path, loader={"max_seconds": 3}))
    descriptor = Board.new_descriptor()
    try:
        board = Board(descriptor)
    finally:
        os.close(descriptor)
    second = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: second)
    pulse = _Pulse(board, cast(WorkerProcess, Idle()), job)
    for number in range(20):
        second += 1
        board.at(1, number)
        assert pulse.look(is_classifying=True) is None
    for _ in range(3):
        second += 1
        assert pulse.look(is_classifying=True) is None
    second += 1
    death = pulse.look(is_classifying=True)
    assert death is not None
    assert death.suspects == (19,)
    assert "longer than loader.max_seconds (3 s)" in death.cause
