"""The board that a worker process shares with its parent."""

import os
import time

from batchclf.engines.local.board import MAX_THREADS, Board
from batchclf.spec.job import MAX_COUNT


def test_every_decoding_thread_that_a_job_may_have_has_its_place_on_the_board() -> None:
    assert MAX_THREADS == MAX_COUNT
    descriptor = Board.new_descriptor()
    try:
        worker, parent = Board(descriptor), Board(descriptor)
    finally:
        os.close(descriptor)
    worker.at(MAX_COUNT - 1, 7)
    worker.at(0, 0)
    assert list(parent.in_flight()) == [(0, 0), (MAX_COUNT - 1, 7)]
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
