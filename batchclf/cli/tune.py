"""`batchclf tune`: find the fastest settings of a job by running it on a sample of its images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from batchclf.cli.options import job_options, json_option, load_to_look
from batchclf.cli.streams import as_lines, print_result, say
from batchclf.errors import UsageError

if TYPE_CHECKING:
    from batchclf.tuning.records import Result, Tuned


@click.command("tune")
@job_options
@click.option(
    "--budget",
    type=click.FloatRange(1),
    default=120,
    show_default=True,
    help="Seconds that all of it may take.",
)
@click.option(
    "--batch-sizes",
    default="",
    help="Besides the job's own; otherwise 1,8,32,128, then half and double the best.",
)
@click.option("--precisions", default="", help="Besides the job's own, such as fp32,int8.")
@click.option("--decodes", default="", help="Besides the job's own: exact,fast.")
@click.option("--apply", "is_applied", is_flag=True, help="Write the best settings into JOB.")
@json_option("Print what was found as one JSON object.")
def command(
    job: Path,
    sets: tuple[str, ...],
    budget: float,
    batch_sizes: str,
    precisions: str,
    decodes: str,
    is_applied: bool,
    as_json: bool,
    **direct: Any,
) -> None:
    """Find the fastest batch size, parts, streams, threads and decode workers for JOB here.

    Runs the whole pipeline on a sample of the job's images, writes tune.jsonl and tune.png into
    its output folder, and prints the best settings. Precision and decode mode change the results
    of a job, so others than its own are tried only where they are named.

    \b
      batchclf tune jobs/cpu.yaml --budget 60
      batchclf tune jobs/cpu.yaml --precisions fp32,int8 --decodes exact,fast --apply
    """
    import json

    from batchclf.cli.progress import Progress
    from batchclf.results.records import DecodeMode, Precision
    from batchclf.system.interrupt import StopRequest

    sizes = _sizes(batch_sizes) if batch_sizes else ()
    more_precisions = _names("--precisions", precisions, get_args(Precision))
    more_decodes = _names("--decodes", decodes, get_args(DecodeMode))
    request = StopRequest("nothing was chosen; run the same command to start over")
    with request.installed(is_last=True) as stop, Progress() as progress:
        spec = load_to_look(job, sets, direct)
        if is_applied:
            _require_editable(job)
        from batchclf.run.output import local_output
        from batchclf.tuning.budget import TuneOptions
        from batchclf.tuning.tune import tune_job

        output = local_output(spec)

        options = TuneOptions(budget, sizes, more_precisions, more_decodes)
        tuned = tune_job(spec, options, log=progress.log, stop=stop)
    files = f"{output / 'tune.jsonl'}, {output / 'tune.png'}"
    done = f"tuning is complete: {files}"
    try:
        if not as_json:
            print_result(as_lines(*_table(tuned), *_conclusion(tuned)), done)
    finally:  # whoever reads it
        if is_applied:
            from batchclf.spec.edit import write_settings

            write_settings(job, tuned.keys)
    if as_json:
        print_result(json.dumps(_answer(tuned, output, is_applied)), done)
        return
    if is_applied:
        say(f"batchclf: written into {job}")
    say(f"batchclf: {files}")


def _require_editable(job: Path) -> None:
    """Say what would hinder --apply before anything is measured."""
    try:
        from batchclf.spec.edit import require_editable
    except ModuleNotFoundError:
        raise UsageError(
            "--apply: ruamel.yaml, which keeps the job file's comments, is not installed: "
            "pip install 'batchclf[tune]'"
        ) from None
    require_editable(job)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(one) for one in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(1 <= size <= 65536 for size in sizes):
        raise UsageError(
            f"--batch-sizes: found {text!r}; write numbers from 1 to 65536, such as 1,8,32,128"
        )
    return sizes


def _names(option: str, text: str, allowed: tuple[str, ...]) -> tuple[Any, ...]:
    names = tuple(one.strip() for one in text.split(",") if one.strip())
    if unknown := [one for one in names if one not in allowed]:
        raise UsageError(f"{option}: found {unknown[0]!r}; allowed: {', '.join(allowed)}")
    return names


def _answer(tuned: "Tuned", output: Path, is_applied: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from batchclf.tuning.records import as_facts

    current = tuned.current_result
    return {
        "status": "complete",
        "exit_code": 0,
        "model": tuned.model,
        "provider": tuned.provider,
        "device": tuned.device,
        "num_cores": tuned.num_cores,
        "num_listed": tuned.num_listed,
        "num_sampled": tuned.num_sampled,
        "wall_s": tuned.wall_s,
        "too_large": tuned.too_large,
        "current": as_facts(current or tuned.current),
        "best": as_facts(tuned.best),
        "settings": tuned.keys,
        "applied": is_applied,
        **asdict(tuned.verdict),
        "notes": tuned.notes,
        "results": [as_facts(one) for one in tuned.results],
        "files": [str(output / name) for name in ("tune.jsonl", "tune.png")],
    }


# ---- for people ----------------------------------------------------------------------------------

_HEADER = (
    *("precision", "decode", "batch", "part", "streams", "workers", "decode limit"),
    *("inference limit", "limit", "reached", "", "batch ms (p95)", "trials", ""),
)


def _table(tuned: "Tuned") -> list[str]:
    """All that was tried, images/s; the batch size ascending within precision and decode mode."""
    by_batch = sorted(
        tuned.results,
        key=lambda one: (
            one.settings.session.precision,
            one.settings.decode,
            one.settings.session.batch_size,
            -one.images_per_s,
        ),
    )
    rows = [_HEADER, *(_row(one, tuned) for one in by_batch)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{tuned.model} on {tuned.device} ({tuned.provider}), {tuned.num_cores} cores; "
        f"{tuned.num_sampled} of {tuned.num_listed:,} images, "
        f"{tuned.wall_s:.0f} s; limits and reached in images/s",
        *(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]


def _row(one: "Result", tuned: "Tuned") -> tuple[str, ...]:
    settings, session, predicted = one.settings, one.settings.session, one.predicted
    marks = [
        name
        for name, marked in (("best", tuned.best.settings), ("the job's own", tuned.current))
        if settings == marked
    ]
    return (
        session.precision,
        settings.decode,
        str(session.batch_size),
        str(session.part),
        f"{session.streams} x {session.threads}",
        str(settings.workers),
        f"{predicted.decode_limit_images_per_s:,.1f}",
        f"{predicted.infer_limit_images_per_s:,.1f}",
        f"{predicted.limit_images_per_s:,.1f}",
        f"{one.images_per_s:,.1f}",
        f"{one.efficiency:.0%}",
        f"{one.batch_ms['p50']:,.1f} ({one.batch_ms['p95']:,.1f})",
        str(one.num_trials),
        ", ".join(marks),
    )


def _conclusion(tuned: "Tuned") -> list[str]:
    own = tuned.current_result
    verdict = tuned.verdict
    gain = ""
    if own is None:
        gain = "; the job's own settings were not measured"
    elif own.settings != tuned.best.settings:
        gain = f", x {tuned.best.images_per_s / own.images_per_s:.2f} of the job's own settings"
    return [
        *(f"note: {note}" for note in tuned.notes),
        f"bottleneck: {verdict.bottleneck}: {verdict.why}",
        f"what would lift it: {'; '.join(verdict.lift)}",
        f"best: {tuned.best.images_per_s:,.1f} images/s{gain}:",
        "",
        *_snippet(tuned.keys),
    ]


def _snippet(keys: "dict[str, int | str] | Any") -> list[str]:
    """Dotted keys as a piece of a job file."""
    lines: list[str] = []
    previous = ""
    for key, value in sorted(keys.items(), key=lambda item: item[0].rpartition(".")[0]):
        parent, _, leaf = key.rpartition(".")
        if parent != previous:
            lines.append(f"{parent}:")
            previous = parent
        lines.append(f"{'  ' if parent else ''}{leaf}: {value}")
    return lines
