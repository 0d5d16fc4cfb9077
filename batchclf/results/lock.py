"""One writer per output: a lock that the kernel frees with its process, and a lease beside it.

On one machine the lock decides (flock). Other machines that share the folder may not see it: for
them the holder renews its lease, a small file, every few seconds, and a lease that is not renewed
any more is taken over. Its age is told by the clock of the file system alone, so clocks that differ
do not matter. A holder that was itself stopped for long must look whether the lease is still its
own before it writes on: `Lease.check`. While it is held, its files are touched in a process apart:
the holder ends in time also where their file system hangs.
"""

import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from batchclf.errors import BatchclfError, EnvironmentFailed, Interrupted, ResumeRefused
from batchclf.results.claim import give_back, is_ours, look, remove_if_unused, renew
from batchclf.results.files import (
    RunFiles,
    open_temporary,
    output_failed,
    read_json,
    sync_folder,
    temporary_of,
)
from batchclf.system.apart import Apart, LeftBehind
from batchclf.system.lock import lock_file
from batchclf.system.machine import boot_id
from batchclf.system.paths import kind_of

LOCK_S = 0.2
LEASE_S = 30.0
"""A lease that was not renewed for so long is given up."""
RENEW_S = 5.0
SETTLE_S = 0.5
DROP_S = 0.5
"""Seconds that a lease may take to be given back."""


@contextmanager
def only_writer(files: RunFiles, renewed: Callable[[], None] = lambda: None) -> Iterator["Lease"]:
    """Hold the output for this process; the kernel lets go of it when the process ends.

    `renewed` is called, from another thread, whenever the lease has been renewed.

    Raises:
        ResumeRefused: another process holds it; its host and pid are named.
        EnvironmentFailed: the folder cannot be looked at, created or written.
        UsageError: its path is too long, or its links lead in a circle.
    """
    is_new = kind_of(files.folder, "output") == "nothing"
    is_own = is_new or files.address is not None
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            sync_folder(files.folder.parent)
        lock = lock_file(files.lock, LOCK_S)
    except TimeoutError:
        raise _refused(files, read_json(files.lease)) from None
    except OSError as error:
        raise output_failed(files.folder, error) from error
    try:
        with Apart() as apart:
            lease = Lease(files, renewed, apart)
            try:
                with _leased(files, lease, is_locked=lock is not None):
                    yield lease
            except BaseException as error:
                if is_own and _may_hang(error):
                    with suppress(OSError):
                        apart.do(DROP_S, remove_if_unused, files.lock)
                elif is_own:
                    remove_if_unused(files.lock)
                raise
            if is_own:
                remove_if_unused(files.lock)
    finally:
        if lock is not None:
            os.close(lock)


class Lease:
    """This process's claim on an output, renewed by a thread of its own."""

    def __init__(self, files: RunFiles, renewed: Callable[[], None], apart: Apart) -> None:
        self.apart = apart
        self._path = files.lease
        self._renewed = renewed
        self._token = secrets.token_hex(8)
        self._renewed_at = time.monotonic()
        self._failure: BatchclfError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def check(self) -> None:
        """Make sure that the output is still this process's.

        Raises:
            ResumeRefused: another machine took it over.
            EnvironmentFailed: the lease cannot be renewed any more.
        """
        if self._failure is not None:
            raise self._failure

    def take(self, *, is_locked: bool) -> None:
        """Write the lease, unless it is another machine's.

        Raises:
            ResumeRefused: naming the holder.
            OSError: the folder cannot be written.
        """
        temporary = temporary_of(self._path)
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "boot_id": boot_id(),
            "token": self._token,
        }
        with open_temporary(self._path) as file:
            file.write(json.dumps(facts).encode() + b"\n")
        holder = read_json(self._path)
        if holder is not None and not _is_stale(self._path, holder, temporary, is_locked=is_locked):
            temporary.unlink()
            raise _refused_by_lease(self._path.parent, holder)
        os.replace(temporary, self._path)
        if holder is not None and not (is_locked and holder.get("boot_id") == boot_id()):
            time.sleep(SETTLE_S)  # another machine may be taking it over as well
            if not is_ours(self._path, self._token):
                raise _refused_by_lease(self._path.parent, read_json(self._path) or {})
        self._thread.start()

    def drop(self) -> None:
        """Give the lease back."""
        self._ended.set()
        give_back(self._path, self._token)
        self._thread.join(DROP_S)

    def drop_apart(self) -> None:
        """The same after an error; where its file system hangs, the lease stays."""
        self._ended.set()
        with suppress(OSError):
            self.apart.do(DROP_S, give_back, self._path, self._token)
        self._thread.join(DROP_S)

    def _keep(self) -> None:
        # Soon at first: another machine may have found no lease either. The file was written just
        # now, so that no process is started for it while a job starts.
        if not self._ended.wait(SETTLE_S):
            self._look(partial(look, self._path, self._token))
        renewing = partial(self.apart.do, math.inf, renew, self._path, self._token)
        while self._failure is None and not self._ended.wait(RENEW_S):
            self._look(renewing)

    def _look(self, whether_ours: Callable[[], bool]) -> None:
        try:
            is_ours = whether_ours()
        except LeftBehind:  # it was left behind: the job is ending
            self._ended.set()
            return
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)
            if is_gone or time.monotonic() - self._renewed_at > LEASE_S:
                self._failure = output_failed(self._path, error)
            return
        if not is_ours:
            self._failure = ResumeRefused(
                f"output: {self._path.parent}: another process took it over, since this one "
                "was stopped for long, or somebody removed its lease; it goes no further"
            )
            return
        self._renewed_at = time.monotonic()
        self._renewed()


@contextmanager
def _leased(files: RunFiles, lease: Lease, *, is_locked: bool) -> Iterator[None]:
    try:
        lease.take(is_locked=is_locked)
    except OSError as error:
        with suppress(OSError):
            temporary_of(files.lease).unlink(missing_ok=True)
        raise output_failed(files.lease, error) from error
    try:
        yield
    except BaseException as error:
        if _may_hang(error):
            lease.drop_apart()
        else:
            lease.drop()
        raise
    lease.drop()


def _may_hang(error: BaseException) -> bool:
    """Whether the file system may be why it ended, or nobody may wait for it: after a signal.

    After other errors nothing is done apart: on a busy machine a process to do it takes long.
    """
    return isinstance(error, Interrupted | EnvironmentFailed) or not isinstance(error, Exception)


def _is_stale(path: Path, holder: dict[str, Any], fresh: Path, *, is_locked: bool) -> bool:
    """Whether nobody can be behind a lease any more; `fresh` was written just now."""
    is_here = holder.get("host") == socket.gethostname()
    age_s = fresh.stat().st_mtime - path.stat().st_mtime
    if holder.get("boot_id") == boot_id():
        if is_locked:
            return True  # the same kernel, and it gave us the lock
    elif is_here and age_s > time.clock_gettime(time.CLOCK_BOOTTIME):
        # This machine, before it was started again. Were it renewed since, it would be that of
        # another one with the same name.
        return True
    return age_s > LEASE_S


def _refused(files: RunFiles, holder: dict[str, Any] | None) -> ResumeRefused:
    return ResumeRefused(
        f"output: {files.folder}: another batchclf is writing there{_named(holder)}; "
        "wait for it, or give another output"
    )


def _refused_by_lease(folder: Path, holder: dict[str, Any]) -> ResumeRefused:
    return ResumeRefused(
        f"output: {folder}: another batchclf is writing there{_named(holder)}; wait for it, or "
        f"give another output. Where that process is gone, try again {LEASE_S:.0f} s after its end"
    )


def _named(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return ""
    host, pid, since = (holder.get(key) for key in ("host", "pid", "since"))
    return f" (pid {pid} on host {host}, since {since})"
