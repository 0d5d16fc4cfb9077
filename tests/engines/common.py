"""Real runs to disturb, and faults put into their processes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from batchclf.spec.options import RunOptions
from tests.conftest import ROOT, command, read_records
from tests.tiny import (
    SLOW,
    assert_same_records,
    link_digits,
    run_here,
    tiny_model,
    write_tiny_job,
)

WAIT_S = 60.0
"""Beyond which a run hangs; nothing here takes so long."""
WORKER = "batchclf.engines.local.worker"
"""In the command line of the process that does a run's work."""
HOOK = '''
import fnmatch, importlib.abc, importlib.machinery, os, signal, sys, threading, time
from pathlib import Path

IS_WORKER = any("batchclf.engines.local.worker" in one for one in sys.orig_argv)
FOLDER = Path({folder!r})


def once(name):
    """True the first time that any process asks."""
    try:
        (FOLDER / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if not fnmatch.fnmatchcase(name, {module!r}):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def execute_and_change(module):
            execute(module)
            change(module)
        spec.loader.exec_module = execute_and_change
        return spec


if {module!r}:
    sys.meta_path.insert(0, Hook())
'''


def fault(folder: Path, program: str, module: str = "") -> dict[str, str]:
    """The environment of processes that run `program` first of all.

    It may define `change(module)`, to be called with each module of that name (as in a shell: `*`)
    once it is imported, and use `once(name)`, IS_WORKER, and what HOOK imports.
    """
    place = folder / "fault"
    place.mkdir()
    text = HOOK.format(folder=str(place), module=module) + program
    (place / "sitecustomize.py").write_text(text)
    paths = [str(place), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass(slots=True)
class Run:
    """A `batchclf run` that runs, in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Its processes that are there now, itself first."""
        this = psutil.Process(self.process.pid)
        return [this, *this.children(recursive=True)]

    def worker(self) -> psutil.Process | None:
        """The process that does the work, if there is one now."""
        for one in self.members():
            with suppress(psutil.NoSuchProcess):
                if any(WORKER in part for part in one.cmdline()) and one.ppid() == self.process.pid:
                    return one
        return None

    def wait_for_worker(self) -> psutil.Process:
        self.wait_until(lambda: self.worker() is not None)
        worker = self.worker()
        assert worker is not None
        return worker

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that the run does before it ends."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, f"it does not get there: {self.stderr}"
            time.sleep(0.005)

    def wait_to_say(self, text: str) -> None:
        self.wait_until(lambda: text in self.stderr)

    def end(self, timeout: float = WAIT_S) -> int:
        """The exit code, as Python tells it; everything that it started must have ended."""
        code = self.process.wait(timeout)
        assert_gone([psutil.Process(pid) for pid in _pids_with(str(self.log))])
        return code


def assert_gone(processes: list[psutil.Process]) -> None:
    """All of them have ended by now, or do within 5 s."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _pids_with(mark: str) -> Iterator[int]:
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.environ().get("BATCHCLF_TEST_MARK") == mark:
                yield one.pid


@contextmanager
def started(
    job: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    through: tuple[str, ...] = (),
    **popen: Any,
) -> Iterator[Run]:
    """A running `batchclf run`, of which nothing is left after the block."""
    log = job.parent / f"{time.monotonic_ns()}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*through, *command("run", job, *options)],
            **{"stdin": subprocess.DEVNULL, "stdout": stderr, "stderr": stderr, **popen},
            cwd=ROOT,
            env={**os.environ, **(env or {}), "BATCHCLF_TEST_MARK": str(log)},
            start_new_session=True,
        )
    run = Run(process, log)
    try:
        yield run
    finally:
        for pid in {process.pid, *_pids_with(str(log))}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finished(job: Path, *options: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """A `batchclf run` to its end: the exit code and what it printed."""
    with started(job, *options, env=env) as run:
        return run.end(), run.stderr


def has_records(output: Path, number: int = 1) -> Callable[[], bool]:
    """Whether so many records are written."""
    predictions = output / "predictions.jsonl"
    return lambda: predictions.exists() and predictions.read_bytes().count(b"\n") >= number


def run_json(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "run.json").read_bytes())
    return found


def summary_of(output: Path) -> dict[str, Any]:
    """The last line of stats.jsonl."""
    found: dict[str, Any] = json.loads((output / "stats.jsonl").read_bytes().splitlines()[-1])
    assert found["type"] == "summary"
    return found


def write_job(folder: Path, num_images: int = 40, *, slow: bool = False, **keys: Any) -> Path:
    """A job of the first digits; a slow one takes about 5 ms of a core for each of them.

    Its model is in the cache, and the same images' undisturbed records in `undisturbed`.
    """
    images = folder / "images"
    if not images.exists():
        link_digits(images, num_images)
    model = tiny_model(folder, **(SLOW if slow else {}))
    keys = {"input": str(images), "model": model, "batch_size": 4, **keys}
    settings = {**keys, "output": str(folder / "undisturbed"), "batch_size": 32}
    run_here(write_tiny_job(folder, name="undisturbed.yaml", **settings), RunOptions())
    return write_tiny_job(folder, **{"loader": {"workers": 2}, **keys})


def assert_as_undisturbed(folder: Path, *, but: Mapping[str, str] | None = None) -> None:
    """The output is complete, and its records are the undisturbed ones, `but` errors by name."""
    but = but or {}
    assert run_json(folder / "out")["status"] == "complete"
    found = read_records(folder / "out")
    codes = {one["path"]: one["error"]["code"] for one in found if one["path"] in but}
    assert codes == but
    expected = [one for one in read_records(folder / "undisturbed") if one["path"] not in but]
    assert_same_records([one for one in found if one["path"] not in but], expected)
