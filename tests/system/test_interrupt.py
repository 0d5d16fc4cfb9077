"""A signal ends what is going on, wherever the interpreter happens to be when it comes."""

import os
import signal
import sys
import time
import weakref

import pytest

from batchclf.errors import Interrupted
from batchclf.system.interrupt import StopRequest

WAIT_S = 10.0


class Thing:
    pass


def test_a_signal_within_a_weak_references_callback_is_not_lost_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    # CPython 3.11 frees the locks of imports in such callbacks: an export imports much.
    thing = Thing()
    ref = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    hook = sys.unraisablehook
    with pytest.raises(Interrupted) as caught, StopRequest().installed():  # noqa: PT012
        del thing
        time.sleep(WAIT_S)
    assert ref() is None
    assert caught.value.exit_code == 143
    assert capfd.readouterr().err == ""
    assert sys.unraisablehook is hook


def test_a_signal_in_a_callback_is_only_noted_where_the_caller_drains() -> None:
    thing = Thing()
    ref = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with StopRequest().installed() as stop, stop.drained_by_caller():
        del thing
        time.sleep(0.1)
        assert ref() is None
        assert stop.signal_number == signal.SIGTERM


def test_what_else_is_lost_in_a_callback_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def fail(_: object) -> None:
        raise ValueError("not a signal")

    thing = Thing()
    ref = weakref.ref(thing, fail)
    with StopRequest().installed():
        del thing
    assert ref() is None
    assert [args.exc_type for args in told] == [ValueError]
