"""A worker process, started and ended. Imports little: it is started before all else."""

import os
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

from batchclf.engines.local.board import Board
from batchclf.engines.local.signals import DUMP_SIGNAL, STOP_SIGNALS
from batchclf.errors import EnvironmentFailed
from batchclf.system.children import start_serving
from batchclf.system.interrupt import SIGNALS

if TYPE_CHECKING:
    from batchclf.engines.local.messages import Message, ServeSetup, Setup
    from batchclf.run.duty import Attempt

DUMP_S = 1.0
END_S = 5.0
"""Seconds that a process which has said its last word may take to end."""
KILL_S = 0.7
"""Seconds that a killed one may take; one that is stuck in the kernel is left behind."""
_MEMORY = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
}
"""How a worker takes memory, unless the user's environment says otherwise. pyarrow's own choice,
mimalloc, keeps 16 MB more of it. Of glibc, blocks from the first size on go back to the system as
soon as they are freed (mallopt(3)); by itself it raises that up to 32 MB, and row groups of Parquet
files that came and went leave 40 MB of holes. What is free at the end of a heap is kept up to the
other size: else each photo's memory would be given back, and cleared again, for a sixth of the CPU.
"""
_HELD = (*SIGNALS, *STOP_SIGNALS)


class Workers:
    """The worker process of a run, and those that take its place; use as a context manager.

    The first one is started at once: it imports what it needs while this process does.
    """

    def __init__(self, *, adopts: bool = False) -> None:
        """Start the first one.

        `adopts`: in a container, whose first process this is, what a worker leaves behind becomes
        this one's, and is reaped. Not so where a program of a user's may have children, too.

        Raises:
            EnvironmentFailed: no process is to be had.
        """
        self._adopts = adopts and os.getpid() == 1
        self.board_descriptor = Board.new_descriptor()
        try:
            self.current = WorkerProcess(self.board_descriptor)
        except BaseException:
            os.close(self.board_descriptor)
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        os.close(self.board_descriptor)

    def kill(self) -> None:
        """End the current one, whatever it is at, and the processes that it started."""
        self.current.kill()
        if self._adopts:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass

    def replace(self) -> None:
        """Start another in the place of one that has ended.

        Raises:
            EnvironmentFailed: no process is to be had.
        """
        self.current = WorkerProcess(self.board_descriptor)


class WorkerProcess:
    """One worker process, as its parent sees it."""

    def __init__(self, board_descriptor: int) -> None:
        """Start it, on a board that `Board.new_descriptor` made.

        Raises:
            EnvironmentFailed: no process is to be had.
        """
        try:
            self._process, self._connection = start_serving(
                "batchclf.engines.local.worker",
                board_descriptor,
                held=_HELD,
                stdout=2,  # results are the parent's to print
                env={**_MEMORY, **os.environ},
                # Nothing that is imported is garbage; looking for it takes some 30 ms.
                first="import gc; gc.disable(); ",
            )
        except OSError as error:
            raise EnvironmentFailed(
                f"the job's process cannot be started: {error}; run the same command later"
            ) from error
        self.has_hung_up = False
        self.is_left_behind = False
        """It was killed, and is stuck in the kernel."""

    def send(self, setup: "Setup | ServeSetup | Attempt | None") -> None:
        """Tell it what to do; one that is dead already is found out later."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(setup)

    def receive(self, seconds: float) -> "Message | None":
        """Its next message, waiting so long at most."""
        try:
            if self._connection.poll(seconds):
                message: Message = self._connection.recv()
                return message
        except (EOFError, OSError):  # the latter where it died within a message
            self.has_hung_up = True
        return None

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        self._process.send_signal(number)

    def cpu_seconds(self) -> float:
        """The CPU time that it has used (proc_pid_stat(5), utime and stime); 0 once it is gone."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to stderr; a stopped process cannot."""
        self.signal(DUMP_SIGNAL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DUMP_S)

    def end(self) -> int | None:
        """Wait for its end, and help where it does not come; None: it is stuck in the kernel."""
        for _ in range(2):
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(END_S)
            self._process.kill()
        return None

    def kill(self) -> None:
        """End it, whatever it is at, and the processes that it started with it."""
        self._process.kill()
        if not self.is_left_behind:
            try:
                self._process.wait(KILL_S)
            except subprocess.TimeoutExpired:  # stuck in the kernel: waiting again would not help
                self.is_left_behind = True
        self._connection.close()
