"""The board that a worker process shares with its parent."""

import os

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
