"""The command line: parse, call, print, exit code.

Nothing heavy is imported before it is needed. stdout carries results only; progress and log lines
go to stderr.
"""

import difflib
import importlib
import json
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

from batchclf import __version__
from batchclf.cli.streams import log_as, open_standard_streams, print_result, say
from batchclf.errors import BatchclfError, EnvironmentFailed, Interrupted, WorkerFailed
from batchclf.system.interrupt import end_as_usual

AS_JSON = "json"
"""The context's object where `--json` was given."""

COMMANDS = {
    "run": "Classify the images of a job; run it again to resume.",
    "init": "Write a commented job file to start from.",
    "validate": "Check a job without running it: spec, provider, model, images.",
    "status": "Tell how far a job is, also while it runs elsewhere.",
    "merge": "Join the shards of a job into one.",
    "report": "Show a job on one HTML page: speed, classes, pictures, errors.",
    "score": "Compare a job's predictions with true labels.",
    "convert": "Write a job's records as CSV or Parquet, or its images into folders.",
    "export": "Write a job's model bundle, to run it where torch is not installed.",
    "verify": "Compare a job's provider with PyTorch and native OpenVINO.",
    "tune": "Find the fastest batch size, streams and workers of a job.",
    "doctor": "Tell what this machine can run, and why not the rest.",
    "schema": "Print the JSON Schema of the job file.",
    "completion": "Print what makes a shell complete these commands.",
}
"""Each command's module in this folder, and its line in --help."""

ARGUMENTS = {
    "JOB": "give a job file; `batchclf init job.yaml` writes one",
    "OUTPUT": "give the folder that a job writes to, its `output`",
    "FOLDER": "give the folder to write the bundle into",
}
"""What to give where an argument is missing."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"batchclf.cli.{cmd_name}")
        command: click.Command = module.command
        end_as_usual()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; one that is misspelt is told with the nearest, but to no shell."""
        is_name = bool(args) and not args[0].startswith("-")
        if is_name and args[0] not in COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], COMMANDS, 1, cutoff=0.5)
            what = f"did you mean {near[0]!r}?" if near else "`batchclf --help` lists them"
            ctx.fail(f"No such command {args[0]!r}; {what}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a user's error becomes a message and its exit code, no traceback."""
        open_standard_streams()
        log_as("text")  # a program may call several commands
        try:
            return self._invoked(ctx)
        except click.UsageError as error:
            raise _with_advice(error) from None
        except BatchclfError as error:
            if ctx.obj == AS_JSON:
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
                answer = {"status": status, "exit_code": error.exit_code, "error": str(error)}
                with suppress(EnvironmentFailed):  # stderr says more
                    print_result(json.dumps(answer))
            say(f"batchclf: {error}", "error", exit_code=error.exit_code)
            for note in getattr(error, "__notes__", ()):
                say(f"batchclf: {note}", "error")
            is_bug = error.exit_code == BatchclfError.exit_code
            if is_bug and not isinstance(error, WorkerFailed):  # which says it all in its message
                say(traceback.format_exc(), "error")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)

    def _invoked(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError as error:
            raise BatchclfError(
                f"{error}: a package is missing, broken, or of a version that batchclf does not "
                "work with; `pip check` names most such"
            ) from error


def _with_advice(error: click.UsageError) -> click.UsageError:
    """What click says of a command line, cut to what is read, with what to do about it."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.human_readable_name
        if name not in ARGUMENTS:
            return error
        return click.UsageError(f"Missing argument {name!r}: {ARGUMENTS[name]}.", error.ctx)
    takes_patterns = error.ctx is not None and any(
        "-i" in one.opts for one in error.ctx.command.params
    )
    if "unexpected extra argument" not in error.message or not takes_patterns:
        return error
    shown = error.message if len(error.message) < 200 else f"{error.message[:197]}...)"
    advice = "a pattern is given in quotes, for the shell not to expand it: -i 'photos/*.jpg'"
    return click.UsageError(f"{shown}; {advice}", error.ctx)


def _print_version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if not is_asked:
        return
    from batchclf.images.resampler import resampler_name
    from batchclf.runtime.providers import PROVIDERS, flavour_problem, installed_flavours

    lines = [f"batchclf, version {__version__}, resampler: {resampler_name()}"]
    if (problem := flavour_problem()) is not None:
        lines.append(f"no provider: {problem}")
    for flavour, version in installed_flavours().items():
        own = [one.name for one in PROVIDERS.values() if one.distribution == flavour]
        names = ", ".join(dict.fromkeys((*own, "cpu")))
        lines.append(f"{flavour} {version}, providers: {names} (`batchclf doctor` tries them)")
    try:
        print_result("\n".join(lines))
    except EnvironmentFailed as error:  # no command is begun yet that would tell it
        say(f"batchclf: {error}", "error")
        context.exit(error.exit_code)
    context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version, what resizes images here, and the providers of ONNX Runtime.",
)
def main() -> None:
    """Classify folders of images through ONNX Runtime, one record per image.

    \b
      batchclf init job.yaml          write a job file
      batchclf run job.yaml           classify; the same command resumes
    """
