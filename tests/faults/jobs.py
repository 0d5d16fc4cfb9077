"""A job to disturb: started as users start it, watched from outside, and compared at the end.

The processes of a start are found by a mark in their environment, so that none is overlooked,
whatever process group or parent it has by then.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tests.conftest import ROOT, command
from tests.tiny import write_tiny_job

MARK = "BATCHCLF_FAULTS_START"
"""Environment variable that all processes of one start share."""
WORKER = b"batchclf.engines.local.worker"
"""In the command line of the process that does the work."""
WAIT_S = 120.0
"""For a job of seconds: whatever takes longer hangs."""
TICK_S = 0.005
SCORE_TOLERANCE = 1e-5
PSS = re.compile(rb"^Pss: +(\d+) kB", re.MULTILINE)
RESUMING = re.compile(r"resuming after ([\d,]+) of")


@dataclass(slots=True)
class Start:
    """One start of `batchclf run`, the leader of a process group of its own."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    """What it has written to stderr."""
    started_at: float = field(default_factory=time.time)
    """As `killed_at`, to be compared with times of files."""
    killed_at: float = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def num_resumed(self) -> int | None:
        """How many images this start says were done before; None: it says nothing of the kind."""
        found = RESUMING.search(self.stderr)
        return int(found[1].replace(",", "")) if found else None

    def wait(self, timeout_s: float = WAIT_S) -> int | None:
        """The exit code as a shell tells it, 128 and more for a signal; None: still running."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def send(self, number: signal.Signals, *, to_group: bool = False) -> None:
        """Send a signal to the parent process, or to the whole group as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number) if to_group else os.kill(self.pid, number)

    def kill(self, *, group: bool = True) -> None:
        """SIGKILL to the whole process group, or to its leader alone."""
        self.killed_at = time.time()
        self.send(signal.SIGKILL, to_group=group)
        self.process.wait()

    def send_to(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one of its processes, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def members(self) -> list[int]:
        """The process ids of this start that are alive."""
        return [pid for pid in _pids() if self.mark.encode() in _read(pid, "environ")]

    def worker(self) -> int | None:
        """The process that does the work for the parent; None: there is none now."""
        for pid in self.members():
            if _parent(pid) == self.pid and WORKER in _read(pid, "cmdline"):
                return pid
        return None

    def memory_mb(self) -> float:
        """What its processes take together, what they share counted once: `Pss` of proc(5)."""
        found = (PSS.search(_read(pid, "smaps_rollup")) for pid in self.members())
        return sum(int(one[1]) for one in found if one) / 1024

    def num_left(self, timeout_s: float = 30.0) -> int:
        """How many of its processes are still alive after so long."""
        deadline = time.monotonic() + timeout_s
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(TICK_S)
        return len(left)

    def wait_until(self, condition: Callable[[], object], timeout_s: float = WAIT_S) -> bool:
        """Wait for something that the running job does; False: it ended, or time was up."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.is_running or time.monotonic() > deadline:
                return bool(condition())
            time.sleep(TICK_S)
        return True


@dataclass(frozen=True, slots=True)
class Job:
    """A job file, and the lines that an undisturbed run of it writes."""

    folder: Path
    path: Path
    images: Path
    lines: Sequence[bytes]
    wall_s: float
    """Of the undisturbed run, preparing the model and starting included."""
    environment: Mapping[str, str]

    @contextmanager
    def started(
        self,
        output: Path,
        *arguments: str,
        through: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Start]:
        """A running `batchclf run`; nothing of it is left after the block."""
        mark = uuid.uuid4().hex
        descriptor, log = tempfile.mkstemp(dir=self.folder, suffix=".log")
        with os.fdopen(descriptor, "wb") as stderr:
            process = subprocess.Popen(
                [*through, *command("run", self.path, "-o", output, *arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, **self.environment, **(environment or {}), MARK: mark},
                start_new_session=True,
            )
        start = Start(process, mark, Path(log))
        try:
            yield start
        finally:
            for pid in {*start.members(), process.pid} if start.is_running else start.members():
                start.send_to(pid, signal.SIGKILL)
            process.wait()
            start.log.unlink()

    def run(self, output: Path, *arguments: str, **options: Any) -> tuple[int | None, str]:
        """Run to the end: the exit code (None: it hangs) and stderr."""
        with self.started(output, *arguments, **options) as start:
            return start.wait(), start.stderr

    def complaints(self, output: Path) -> list[str]:
        """How a finished output differs from the undisturbed one; empty: not at all."""
        found = lines_of(output)
        complaints = differences(found, self.lines)
        status = run_json(output).get("status")
        return complaints + ([] if status == "complete" else [f"its status is {status}"])

    def resumed(self, output: Path, *arguments: str) -> list[str]:
        """Run the plain command to its end: what is wrong with that run and with its output."""
        exit_code, stderr = self.run(output, *arguments)
        if exit_code != 0:
            return [f"resuming ended with {exit_code}: {stderr[-600:]}"]
        return self.complaints(output)


def make_job(folder: Path, images: Path, environment: Mapping[str, str], **keys: Any) -> Job:
    """A job with the tiny model and `keys` of the job file, run once undisturbed.

    Raises:
        RuntimeError: that run failed.
    """
    folder.mkdir(exist_ok=True)
    path = write_tiny_job(folder, input=str(images), **keys)
    job = Job(folder, path, images, (), 0.0, environment)
    undisturbed = folder / "undisturbed"
    started = time.monotonic()
    exit_code, stderr = job.run(undisturbed)
    if exit_code != 0:
        raise RuntimeError(f"the undisturbed run ended with {exit_code}: {stderr}")
    wall_s = time.monotonic() - started
    return Job(folder, path, images, lines_of(undisturbed), wall_s, environment)


# ---- what a job wrote ----------------------------------------------------------------------------


def lines_of(output: Path, name: str = "predictions.jsonl") -> list[bytes]:
    """The lines of a file of records with their newlines; none without the file."""
    try:
        return (output / name).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def run_json(output: Path) -> dict[str, Any]:
    """What run.json says; empty when there is none.

    Raises:
        ValueError: it is torn, which it must never be.
    """
    try:
        found: dict[str, Any] = json.loads((output / "run.json").read_bytes())
    except FileNotFoundError:
        return {}
    return found


def differences(found: Sequence[bytes], expected: Sequence[bytes]) -> list[str]:
    """How lines differ from the expected ones: lost, doubled, changed; scores may by 1e-5."""
    if len(found) == len(expected) and all(map(same_line, found, expected)):
        return []
    paths = [path_of(line) for line in found]
    wanted = [path_of(line) for line in expected]
    num_lost = len(set(wanted) - set(paths))
    num_doubled = len(paths) - len(set(paths))
    changed = [
        one for one, other in zip(found, expected, strict=False) if not same_line(one, other)
    ]
    return [
        f"{num_lost} lost, {num_doubled} doubled, {len(changed)} not as expected, the first: "
        f"{changed[0][:200] if changed else None!r}"
    ]


def same_line(found: bytes, expected: bytes) -> bool:
    """Whether two lines are one record, up to 1e-5 in its scores."""
    if found == expected:
        return True
    try:
        one, other = orjson.loads(found), orjson.loads(expected)
    except orjson.JSONDecodeError:
        return False
    close = all(
        abs(a.pop("score") - b.pop("score")) <= SCORE_TOLERANCE
        for a, b in zip(one.get("predictions", ()), other.get("predictions", ()), strict=False)
    )
    return close and found.endswith(b"\n") and bool(one == other)


def whole_prefix(found: Sequence[bytes], expected: Sequence[bytes]) -> int | None:
    """How many whole records an interrupted output holds; None: other ones than expected.

    Only the last line may be torn, since nothing but a process has died.
    """
    whole = list(found[:-1] if found and not found[-1].endswith(b"\n") else found)
    if len(whole) > len(expected) or not all(map(same_line, whole, expected)):
        return None
    return len(whole)


def path_of(line: bytes) -> str | None:
    """The path in a record; None: it is none."""
    try:
        return str(orjson.loads(line)["path"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


# ---- processes, from /proc -----------------------------------------------------------------------


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is another's
        return b""


def state_of(pid: int) -> str:
    """R, S, T, Z ...: proc(5); empty when there is no such process."""
    return _stat(pid)[0]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1] or 0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces and brackets."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split() or [""] * 50


def children_of(pid: int) -> list[int]:
    """The process ids of a process's children, zombies included."""
    return [one for one in _pids() if _parent(one) == pid]
