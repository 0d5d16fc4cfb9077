"""Processes that are started here: they end with their parent, and keep within their memory."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from batchclf.system.children import (
    available_memory,
    how_it_ended,
    start_python,
    start_serving,
)


def output_of(program: str) -> str:
    with subprocess.Popen(
        [sys.executable, "-c", f"from batchclf.system.children import *\n{program}"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        return process.communicate()[0]


def test_a_program_runs_on_this_interpreters_path_without_input(tmp_path: Path) -> None:
    (tmp_path / "of_the_parent.py").write_text("answer = 42")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        process = start_python(
            "import os, sys, of_the_parent as one; "
            "sys.exit(one.answer + len(sys.stdin.read()) + int(os.environ['MORE']))",
            env={"MORE": "1"},
        )
    assert how_it_ended(process.wait()) == "exit code 43"


def test_an_end_is_told_in_words() -> None:
    assert how_it_ended(0) == "exit code 0"
    assert how_it_ended(-11) == "killed by SIGSEGV"
    assert how_it_ended(-40) == "killed by signal 40"


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    process = start_python(
        "from batchclf.system.children import end_with_parent; end_with_parent(1); print('alive')"
    )
    assert process.wait() == 1


def test_a_child_is_killed_with_its_parent() -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, time; from batchclf.system.children import start_python\n"
            "child = start_python('import time\\n'\n"
            "    'from batchclf.system.children import end_with_parent\\n'\n"
            "    f'end_with_parent({os.getpid()}); print(flush=True); time.sleep(60)', stdout=None)"
            "\n"
            "print(child.pid, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline().strip() for _ in range(2)]
        child = psutil.Process(int("".join(lines)))
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_a_process_is_made_more_expendable_and_never_less() -> None:
    read = "print(open('/proc/self/oom_score_adj').read().strip())"
    assert output_of(f"expendable(700); {read}; expendable(300); {read}") == "700\n700\n"


def test_memory_is_limited_and_never_more_than_it_was() -> None:
    show = "print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
    program = f"limit_memory(2**29); {show}; limit_memory(2**30); {show}; bytes(2**29)"
    found = output_of(f"try:\n    {program}\nexcept MemoryError:\n    print('out of memory')\n")
    assert found.split("\n") == [str(2**29), str(2**29), "out of memory", ""]
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_is_that_of_the_machine_or_of_the_tightest_cgroup(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    write(tmp_path / "proc/self/cgroup", "4:memory:/\n0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert available_memory(tmp_path) == 3000 * 1024
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "2000\n")
    assert available_memory(tmp_path) == 2000
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n")
    assert available_memory(tmp_path) == 1000


def test_available_memory_of_this_machine_is_sensible() -> None:
    assert 2**20 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


SERVE = """
import builtins, os
from multiprocessing.connection import Connection

def serve(connected, other, parent_pid):
    with Connection(connected) as connection:
        told = connection.recv()
        is_child = parent_pid == os.getppid()
        connection.send((told, os.read(other, 9), is_child, hasattr(builtins, "first")))
"""


def test_a_process_that_serves_is_connected_and_never_sees_the_held_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serving.py").write_text(SERVE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    other, written = os.pipe()
    os.write(written, b"passed on")
    num_open = len(os.listdir("/proc/self/fd"))
    process, connection = start_serving(
        "serving", other, held=(signal.SIGTERM,), first="import builtins; builtins.first = 1; "
    )
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mine
    assert len(os.listdir("/proc/self/fd")) == num_open + 1
    process.terminate()
    with connection:
        connection.send("hello")
        assert connection.recv() == ("hello", b"passed on", True, True)
    assert process.wait() == 0
    os.close(other)
    os.close(written)
