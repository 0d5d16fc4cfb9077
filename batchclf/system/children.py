"""Python processes that this one starts: they never outlive it, nor take its memory."""

import ctypes
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>."""


def start_python(
    program: str,
    *,
    pass_fds: Sequence[int] = (),
    stdout: int | None = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start this interpreter on a program text, with this process's `sys.path`.

    Its stdin is empty and its stderr is this process's; so is its stdout where `stdout` is None.
    `env` is added to this process's environment. A child that is to call `end_with_parent` must be
    started by a thread that lives as long as the child should.

    Raises:
        OSError: no process is to be had.
    """
    return subprocess.Popen(  # noqa: S603 - our own programs
        [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        pass_fds=pass_fds,
        env={**os.environ, **(env or {})},
    )


def start_serving(
    module: str,
    *descriptors: int,
    held: Iterable[int],
    stdout: int | None = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    first: str = "",
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start this interpreter on `serve` of a module, and connect it with this process.

    `serve` is called with the descriptor of its end of the connection, with `descriptors`, which
    are passed on, and with the number of this process. `held`: signals that it never sees
    (`_signals_held`); `first`: what is done before its module is imported; the rest as of
    `start_python`.

    Raises:
        OSError: no process is to be had.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, _signals_held(held):
        passed = (theirs.fileno(), *descriptors)
        process = start_python(
            f"{first}from {module} import serve; serve{(*passed, os.getpid())}",
            pass_fds=passed,
            stdout=stdout,
            env=env,
        )
        return process, Connection(ours.detach())


@contextmanager
def _signals_held(numbers: Iterable[int]) -> Iterator[None]:
    """Processes that this thread starts within never see these signals: they are its own to hear.

    So the Ctrl-C of a terminal, which goes to all, does not end them before their parent does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent_pid: int) -> None:
    """In a child, first of all: have the kernel kill this process as soon as its parent dies.

    That works whatever this process is at, even where it never hears that a pipe has closed: in a
    native loop that holds the interpreter lock. To the kernel (prctl(2), PR_SET_PDEATHSIG) the
    parent is the THREAD that started this process: when it ends, this process is killed too,
    though the process `parent_pid` lives on.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os._exit(1)


def expendable(adjustment: int) -> None:
    """Have the kernel's OOM killer take this process rather than others: 1000 is the first to go.

    `adjustment` is the least `oom_score_adj` (proc_pid_oom_score_adj(5)) that this process is to
    have; one that is higher stays. A preference: where it cannot be set, nothing happens.
    """
    path = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        if int(path.read_text()) < adjustment:
            path.write_text(str(adjustment))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that processes started now could use: by the machine, and by the cgroups around us.

    Reads MemAvailable of /proc/meminfo, and the limits (not the use) of cgroup v2 (`memory.max`)
    and v1 (`memory.limit_in_bytes`); in a container the own cgroup is mounted at the top, so all
    folders up to there are looked at.
    """
    meminfo = (root / "proc/meminfo").read_text()
    found = [int(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s*(\d+) kB", meminfo, re.M)]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # no such cgroup here, or no limit ("max")
                found.append(int((folder / name).read_text()))
    return min(found)


def limit_memory(num_bytes: int) -> None:
    """Let this process allocate so many bytes at most, all its private memory taken together.

    Beyond that malloc fails, and Python raises MemoryError; memory shared with others does not
    count (setrlimit(2), RLIMIT_DATA). A lower limit that is set already stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [one for one in (num_bytes, soft) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def how_it_ended(returncode: int) -> str:
    """A process's end in words: `killed by SIGSEGV`, `exit code 3`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-returncode}"
