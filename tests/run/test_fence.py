"""A run that stood still may have lost its output: it asks before it writes (`before_write`)."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from batchclf.errors import BatchclfError, DeviceLost, Interrupted
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.request import Run
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.run.test_resume import with_failures
from tests.tiny import Log

P = ParamSpec("P")
T = TypeVar("T")
SLOW = (
    "look.resolve_model",
    "look.drafted",
    "job.make_ready",
    "append.classify",
    "retry.classify",
)
"""Functions of a run, by the modules that call them, which may take as long as they like."""
WRITES = {"write": 0, "ftruncate": 0, "unlink": 0, "replace": 1, "link": 1}
"""Functions of `os`, and which of their arguments is the file that they change."""


class Asking(Log):
    """Knows whether a run has asked since it last waited for something."""

    def __init__(self, ending: BatchclfError | None, stop: StopRequest) -> None:
        super().__init__()
        self.has_asked = False
        self._ending = ending
        self._stop = stop

    def before_write(self) -> None:
        self.has_asked = True

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        self.has_asked = False  # the first batch is waited for, as the next one in `update`
        if isinstance(self._ending, Interrupted):
            self._stop.signal_number = self._ending.signal_number
        elif self._ending is not None:
            raise self._ending

    def update(self, num_images: int, num_errors: int) -> None:
        self.has_asked = False


@contextmanager
def unasked_writes(output: Path, log: Asking) -> Iterator[list[str]]:
    """What becomes of an output's files, in this process, without a question before it."""
    found: list[str] = []

    def slow(call: Callable[P, T]) -> Callable[P, T]:
        @wraps(call)
        def done(*args: P.args, **options: P.kwargs) -> T:
            try:
                return call(*args, **options)
            finally:
                log.has_asked = False

        return done

    def watched(call: Callable[P, T], place: int) -> Callable[P, T]:
        @wraps(call)
        def write(*args: P.args, **options: P.kwargs) -> T:
            target = args[place]
            path = Path(
                os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            )
            is_private = path.name.startswith((".lock", ".lease")) or path.suffix == ".tmp"
            if path.parent == output and not is_private and not log.has_asked:
                found.append(f"{call.__name__} {path.name}")
            return call(*args, **options)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for module, _, name in (one.partition(".") for one in SLOW):
            holder = import_module(f"batchclf.run.{module}")
            patch.setattr(holder, name, slow(getattr(holder, name)))
        for name, place in WRITES.items():
            patch.setattr(os, name, watched(getattr(os, name), place))
        yield found


@pytest.mark.parametrize("begins", ["anew", "resuming", "overwriting", "extending", "retrying"])
@pytest.mark.parametrize(
    "ending",
    [None, Interrupted(signal.SIGTERM, "run it again"), DeviceLost("no answer")],
    ids=["to its end", "until a signal", "until an error"],
)
def test_after_each_wait_a_run_asks_whether_the_output_is_its_own_before_it_writes(
    tmp_path: Path, begins: str, ending: BatchclfError | None
) -> None:
    job, predictions, lines = with_failures(tmp_path)
    options = RunOptions(
        limit=None if begins == "extending" else 6,
        overwrite=begins == "overwriting",
        extend=begins == "extending",
        retry_failed=begins == "retrying",
    )
    if begins == "anew":
        shutil.rmtree(predictions.parent)
    elif begins == "resuming":
        predictions.write_bytes(b"".join(line + b"\n" for line in lines[:3]))
    spec, stop = load_job(job), StopRequest()
    log = Asking(ending, stop)
    with (
        hold_output(spec),
        unasked_writes(predictions.parent, log) as unasked,
        suppress(*[type(ending)] if ending else []),
    ):
        run_job(Run(spec, options, log, stop))
    assert unasked == []
