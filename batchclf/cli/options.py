"""The options that several commands share: a job file and overrides of its keys."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from batchclf.cli import AS_JSON
from batchclf.errors import BatchclfError, UsageError

if TYPE_CHECKING:
    from batchclf.spec.job import JobSpec

Command = TypeVar("Command", bound=Callable[..., Any])

_DIRECT = {
    "batch_size": ("-b", "--batch-size", int, "Images per batch."),
    "provider": ("--provider", None, str, "cpu, cuda or openvino."),
    "precision": ("--precision", None, str, "fp32, fp16, bf16 or int8."),
    "top_k": ("--top-k", None, int, "Classes per record."),
    "input": (
        "-i",
        "--input",
        str,
        "Folder, image, glob, archive or list (- for stdin); repeatable.",
    ),
    "output": ("-o", "--output", str, "Folder for the results, or address in a bucket."),
}
_REPEATABLE = ("input",)
VALUES = {
    "provider": ("cpu", "cuda", "openvino"),
    "precision": ("fp32", "fp16", "bf16", "int8"),
}
"""What a shell offers for a key."""


def job_options(command: Command) -> Command:
    """Add JOB and the options that override its keys; `load` reads them."""
    for key, (short, long, kind, text) in reversed(_DIRECT.items()):
        names = [name for name in (short, long) if name]
        several = key in _REPEATABLE
        command = click.option(
            *names,
            f"override_{key}",
            type=kind,
            help=text,
            multiple=several,
            shell_complete=partial(_complete_value, key),
        )(command)
    command = click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=_complete_key,
        help="Override any key of the job file, such as loader.workers=8; may be repeated.",
    )(command)
    # What cannot be read is told as every other path of the job is, and as JSON where asked for.
    return click.argument("job", type=click.Path(path_type=Path, readable=False))(command)


def _complete_value(
    key: str, ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What a key may be that has a few values; files and folders for those that are paths."""
    if key in ("input", "output"):
        return [CompletionItem(incomplete, type="file" if key == "input" else "dir")]
    return [CompletionItem(one) for one in VALUES.get(key, ()) if one.startswith(incomplete)]


def _complete_key(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Keys of the job file, dotted; behind `=`, nothing."""
    from batchclf.spec.explain import dotted_keys

    keys = (f"{key}=" for key in dotted_keys())
    return [CompletionItem(key) for key in keys if key.startswith(incomplete)]


@contextmanager
def output_folder(output: str) -> Iterator[Path]:
    """The folder of a job's output; what lies in a bucket is fetched, for as long as it is read.

    Raises:
        BatchclfError: as `fetched_output`; it is a file.
    """
    from batchclf.spec.input import is_address

    if not is_address(output):
        require_no_file(Path(output))
        yield Path(output)
        return
    from batchclf.results.mirror import fetched_output

    with fetched_output(output) as folder:
        yield folder


def require_no_file(output: Path) -> None:
    """Refuse a file, most often the job's own, where the folder that a job writes to is asked for.

    Raises:
        UsageError: with that folder, where the file is a job that names it.
    """
    if not os.path.isfile(output):
        return
    from batchclf.spec.file import load_job

    try:
        advice = f"the job in it writes to {load_job(output).output}: give that"
    except BatchclfError:  # it is no job file
        advice = "give the folder a job writes to"
    raise UsageError(f"output: {output} is a file; {advice}")


def json_option(text: str) -> Callable[[Command], Command]:
    """Add --json: one JSON object on stdout, also when the command fails."""

    def note(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
        if value:
            ctx.find_root().obj = AS_JSON
        return value

    return click.option("--json", "as_json", is_flag=True, callback=note, help=text)


def load(job: Path, sets: tuple[str, ...], direct: dict[str, Any]) -> "JobSpec":
    """The job with its overrides.

    --provider comes first, so that --set can add keys to it; the other direct options come last.

    Raises:
        JobFileError: with every problem found.
        ProviderError: no ONNX Runtime, or two, so that what uses it cannot even be imported.
    """
    from batchclf.runtime.providers import require_flavour
    from batchclf.spec.file import Override, load_job, parse_set

    overrides = [parse_set(text) for text in sets]
    for key, value in direct.items():
        name = key.removeprefix("override_")
        values = value if name in _REPEATABLE else (value,) if value is not None else ()
        if values:
            option = next(text for text in _DIRECT[name][:2] if text and text.startswith("--"))
            given = values[0] if len(values) == 1 else list(values)
            override = Override(name, given, " ".join(f"{option} {one}" for one in values))
            overrides.insert(0 if name == "provider" else len(overrides), override)
    spec = load_job(job, overrides)
    require_flavour()
    return spec


def load_to_look(job: Path, sets: tuple[str, ...], direct: dict[str, Any]) -> "JobSpec":
    """As `load`, for commands that keep nothing: what can be read once only is in temporary files.

    Raises:
        BatchclfError: as `load` and `to_look`.
    """
    return to_look(load(job, sets, direct))


def to_look(spec: "JobSpec") -> "JobSpec":
    """The job with what can be read once only in temporary files, for as long as the command lasts.

    Raises:
        BatchclfError: such a list cannot be read, or holds nothing.
    """
    from batchclf.images.streams import is_stream
    from batchclf.run.kept import keep_lists
    from batchclf.spec.input import places_of

    if not any(map(is_stream, places_of(spec.input))):
        return spec
    folder = click.get_current_context().with_resource(TemporaryDirectory(prefix="batchclf-"))
    return keep_lists(spec, Path(folder), lambda: None)
