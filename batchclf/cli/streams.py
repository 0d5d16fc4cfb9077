"""stdout and stderr, as they may be in a night: closed, full, read by nobody."""

import json
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

import click

from batchclf.errors import EnvironmentFailed
from batchclf.system.text import escaped

LogFormat = Literal["text", "json"]
Level = Literal["info", "warning", "error"]
PREFIX = "batchclf: "
"""Of lines for people, which may stand among those of other programs."""
STDERR = 2
PATIENCE_S = 0.2
"""Seconds that whoever reads a pipe or a terminal may take to make room for a line."""
_log_format: LogFormat = "text"


def open_standard_streams() -> None:
    """Where one was closed, open it on nothing: the next file opened would be taken for it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - until the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def print_result(text: str, done: str = "") -> None:
    """What a command was asked for, on stdout; `done` says what is complete, though it is not read.

    Where the reader is gone, no error comes of it: the command ends as its work did.

    Raises:
        EnvironmentFailed: stdout cannot be written.
    """
    data = f"{text}\n".encode(sys.stdout.encoding, "backslashreplace")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        _to_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return
        raise EnvironmentFailed(
            f"stdout cannot be written: {error.strerror}; the result is not printed"
            + (f", but {done}" if done else "")
        ) from error


def log_as(form: LogFormat) -> None:
    """How this process writes its log from now on."""
    global _log_format
    _log_format = form


def logs_json() -> bool:
    """Whether each line of the log is an object of JSON."""
    return _log_format == "json"


def say(text: str, level: Level = "info", **facts: float | str | None) -> None:
    """A line of the log, on stderr: text for people, made `printable`, or an object of JSON.

    `facts` are for programs, which find them in the object only.

    Where nobody makes room for it, it is dropped: a job ends at a signal, and with its own exit
    code, whoever does not read what it says.
    """
    line = _as_json(text, level, facts) if logs_json() else coloured(printable(text), level)
    data = f"{line}\n".encode(sys.stderr.encoding, "backslashreplace")
    with unless_gone(sys.stderr):
        sys.stderr.flush()
        for first in range(0, len(data), select.PIPE_BUF):
            if not is_read():
                return
            sys.stderr.buffer.write(data[first : first + select.PIPE_BUF])
            sys.stderr.buffer.flush()


def coloured(text: str, level: Level = "info") -> str:
    """A line for stderr, in the colour of its level on a terminal that shows colours.

    Who wants none sets NO_COLOR (https://no-color.org).
    """
    colour = {"info": None, "warning": "yellow", "error": "red"}[_level_of(text, level)]
    shows = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if colour is None or not shows or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour)


def _level_of(text: str, level: Level) -> Level:
    is_warning = text.removeprefix(PREFIX).startswith("WARNING")
    return "warning" if is_warning and level == "info" else level


def _as_json(text: str, level: Level, facts: Mapping[str, float | str | None]) -> str:
    message, level = text.removeprefix(PREFIX), _level_of(text, level)
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": level, "message": message, **facts})


def is_read() -> bool:
    """Whether stderr has room, or soon will have, for PIPE_BUF bytes; else a print might wait."""
    return bool(select.select((), (STDERR,), (), PATIENCE_S)[1])


@contextmanager
def unless_gone(stream: TextIO) -> Iterator[None]:
    """Print within: where the reader is gone, or the stream's disk is full, no error comes of it.

    From then on, what is printed there goes nowhere.
    """
    try:
        yield
    except OSError:
        _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    """What is printed there from now on, and what is left in its buffer, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def as_lines(*lines: str) -> str:
    """Lines for people, each made `printable`."""
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Text that cannot drive the terminal, nor pass for another line of the log.

    It is `escaped`, but line breaks stay, and what follows one is indented: a file's name with one
    in it does not begin a line.
    """
    lines = "\n".join(map(escaped, text.split("\n")))
    return re.sub(r"\n(?=[^ \n])", "\n  ", lines)
