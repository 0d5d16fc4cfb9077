"""Files that misbehave for real in the process that decodes them; on PYTHONPATH, when switched on.

An image file that consists of `POISON:` and one of KINDS does what KINDS says instead of being
decoded. Nothing is imported early: the product's decoder is changed when it is imported.
"""

import ctypes
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, NoReturn

SWITCH = "BATCHCLF_TEST_POISON"
"""The environment variable that switches it on."""
MARK = b"POISON:"
BOMB_BYTES = 2**29
"""A memory bomb that no limit has stopped by now ends as the OOM killer would end it."""
_DECODE = "batchclf.images.decode"


def _segfault() -> None:
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(3)


def _loop() -> NoReturn:
    while True:
        pass


def _hang() -> None:
    time.sleep(86_400)


def _native_loop() -> None:
    """Wait for a lock that this very thread holds; PyDLL keeps the interpreter lock meanwhile."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(64)  # zeros: PTHREAD_MUTEX_INITIALIZER
    while True:
        libc.pthread_mutex_lock(mutex)


def _bomb() -> None:
    held = []
    for _ in range(0, BOMB_BYTES, 2**24):
        held.append(b"\1" * 2**24)
    _kill()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KINDS: dict[str, Callable[[], None]] = {
    "segfault": _segfault,
    "abort": os.abort,
    "exit": _exit,
    "loop": _loop,
    "hang": _hang,
    "native_loop": _native_loop,
    "bomb": _bomb,
    "kill": _kill,
}


def poison(decode: ModuleType) -> None:
    """Change `batchclf.images.decode`, once it is imported."""
    decode_well = decode.Decoder.__call__

    def decode_or_die(self: object, data: bytes, *rest: object) -> Any:
        if data.startswith(MARK):
            KINDS[data.removeprefix(MARK).decode()]()
        return decode_well(self, data, *rest)

    decode.Decoder.__call__ = decode_or_die


class _Poisoner(MetaPathFinder):
    """Waits for the decoder to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DECODE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_poison(module: ModuleType) -> None:
            execute(module)
            poison(module)

        spec.loader.exec_module = execute_and_poison  # type: ignore[method-assign]
        return spec


if SWITCH in os.environ:
    sys.meta_path.insert(0, _Poisoner())
