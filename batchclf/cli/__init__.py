"""The command line: parse, call, print, exit code. Nothing heavy is imported before it is needed.

stdout carries results only; progress and log lines go to stderr.
"""

import importlib
import json
import os
import re
import signal
import sys
import traceback
from typing import Any

import click

from batchclf import __version__
from batchclf.errors import BatchclfError, Interrupted

AS_JSON = "json"
"""The context's object where `--json` was given."""

COMMANDS = {
    "run": "Classify the images of a job; run it again to resume.",
    "init": "Write a commented job file to start from.",
    "validate": "Check a job without running it: spec, provider, model, images.",
    "export": "Write a job's model bundle, to run it where torch is not installed.",
    "verify": "Compare a job's provider with PyTorch and native OpenVINO.",
    "tune": "Find the fastest batch size, streams and workers of a job.",
    "doctor": "Tell what this machine can run, and why not the rest.",
    "schema": "Print the JSON Schema of the job file.",
}
"""Each command's module in this folder, and its line in --help."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"batchclf.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a user's error becomes a message and its exit code, no traceback."""
        _open_standard_streams()
        _hear_sigterm_as_pid_1()
        try:
            return super().invoke(ctx)
        except BatchclfError as error:
            if ctx.obj == AS_JSON:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                answer = {"status": status, "exit_code": error.exit_code, "error": str(error)}
                click.echo(json.dumps(answer))
            click.echo(f"batchclf: {printable(str(error))}", err=True)
            for note in getattr(error, "__notes__", ()):
                click.echo(f"batchclf: {printable(note)}", err=True)
            if error.exit_code == BatchclfError.exit_code:
                click.echo(printable(traceback.format_exc()), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)


def _open_standard_streams() -> None:
    """Where one was closed, open it on nothing: the next file opened would be taken for it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - until the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _hear_sigterm_as_pid_1() -> None:
    """End at SIGTERM in a container too: the kernel drops it for a PID 1 that has no handler."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchclf")
def main() -> None:
    """Classify folders of images through ONNX Runtime, one record per image.

    \b
      batchclf init job.yaml          write a job file
      batchclf run job.yaml           classify; the same command resumes
    """


def printable(text: str) -> str:
    """Text that cannot drive the terminal, nor pass for another line of the log.

    Escaped is all that is not printable: control characters, also those beyond ASCII, marks that
    turn the direction of text (U+202A to U+202E, U+2066 to U+2069), line and paragraph separators,
    halves of surrogate pairs. A line break stays, and what follows it is indented: a file's name
    with one in it does not begin a line.
    """
    escaped = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )
    return re.sub(r"\n(?=[^ \n])", "\n  ", escaped)
