"""A process for what may never end: what it answers, and that nobody waits for it in vain."""

import os
import signal
import struct
import time
from multiprocessing.connection import Connection
from unittest.mock import patch

import psutil
import pytest

from batchclf.system.apart import Apart, Ended, LeftBehind
from tests.engines.common import assert_gone


def test_it_returns_and_raises_as_the_function_does_and_in_another_process() -> None:
    with Apart() as apart:
        pid = apart.do(30, os.getpid)
        assert pid not in (0, os.getpid())
        assert apart.do(30, os.getpid) == pid
        with pytest.raises(FileNotFoundError):
            apart.do(30, os.stat, "/nowhere")
        assert apart.do(30, int, "ff", base=16) == 255
    assert not psutil.pid_exists(pid)


def test_what_takes_too_long_is_left_behind_and_nothing_more_is_waited_for() -> None:
    with Apart() as apart:
        process = psutil.Process(apart.do(30, os.getpid))
        with pytest.raises(LeftBehind):
            apart.do(0.2, time.sleep, 1000)
        began = time.monotonic()
        with pytest.raises(LeftBehind):
            apart.do(600, os.getpid)
        assert time.monotonic() - began < 300, "it was waited for"
    assert_gone([process])


def test_one_that_was_killed_is_replaced_at_the_next_call() -> None:
    with Apart() as apart:
        first = apart.do(30, os.getpid)
        os.kill(first, signal.SIGKILL)
        while psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert apart.do(30, os.getpid) != first


def test_one_that_dies_at_its_work_is_an_error_of_the_system() -> None:
    with Apart() as apart:
        with pytest.raises(Ended, match="has ended: exit code 3"):
            apart.do(30, os._exit, 3)
        assert apart.do(30, os.getpid)


def cut_off() -> None:
    """Let this process end in the middle of its next answer."""

    def send_some(connection: Connection, answer: object) -> None:
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"the first of 1000 bytes")
        os._exit(3)

    patch.object(Connection, "send", send_some).start()


def test_one_that_dies_in_the_middle_of_its_answer_is_an_error_of_the_system() -> None:
    with Apart() as apart:
        with pytest.raises(Ended, match="has ended: exit code 3"):
            apart.do(30, cut_off)
        assert apart.do(30, os.getpid)
