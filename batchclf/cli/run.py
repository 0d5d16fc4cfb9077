"""`batchclf run`: classify the images of a job."""

import json
import os
import re
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchclf import STARTED
from batchclf.cli.options import job_options, json_option, load
from batchclf.cli.streams import LogFormat, print_result, say
from batchclf.cli.watching import Watching, watching_options
from batchclf.errors import UsageError
from batchclf.system.interrupt import StopRequest
from batchclf.system.words import counted, images

if TYPE_CHECKING:
    from batchclf.engines.display import RunDisplay
    from batchclf.results.stats import Summary
    from batchclf.spec.job import JobSpec
    from batchclf.spec.options import RunOptions


@click.command("run")
@job_options
@click.option("--limit", type=click.IntRange(1), help="Only the first N images of the listing.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Only part I (from 0) of N contiguous parts of the listing; auto/N: the part that the "
    "scheduler's variables say, as is done without this option where they say it all.",
)
@click.option("--overwrite", is_flag=True, help="Start anew instead of resuming.")
@click.option("--extend", is_flag=True, help="Add the files that appeared since the job began.")
@click.option("--retry-failed", is_flag=True, help="Try the error records of a finished job again.")
@click.option(
    "--codes", metavar="CODE,...", help="With --retry-failed: only errors with these codes."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only tell what would happen and how long it would take, as `validate --trial` does.",
)
@watching_options
@json_option("Print the summary as one JSON object.")
def command(
    job: Path,
    sets: tuple[str, ...],
    limit: int | None,
    shard: str | None,
    overwrite: bool,
    extend: bool,
    retry_failed: bool,
    codes: str | None,
    dry_run: bool,
    log_format: LogFormat,
    notify: str | None,
    metrics_port: str | None,
    as_json: bool,
    **direct: Any,
) -> None:
    """Classify the images of JOB and write one record per image.

    Running the same command again resumes an interrupted job.

    \b
      batchclf run jobs/cpu.yaml
      batchclf run jobs/cpu.yaml -i photos -o runs/photos -b 16
    """
    watching = Watching.asked(log_format, notify, metrics_port)
    if dry_run:
        _require_dry(retry_failed, extend, watching)
    only = None if codes is None else _parse_codes(codes)

    def options() -> "RunOptions":
        from batchclf.spec.options import RunOptions
        from batchclf.spec.shards import choose_shard

        chosen = choose_shard(shard, os.environ)
        if chosen.why is not None:
            say(f"batchclf: {chosen.why}")
        return RunOptions(
            chosen.shard,
            overwrite=overwrite,
            extend=extend,
            retry_failed=retry_failed,
            codes=only,
            limit=limit,
        )

    if dry_run:
        from batchclf.cli.validate import preview

        preview(job, load(job, sets, direct), options(), trial_by="--dry-run", as_json=as_json)
        return
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest().installed(is_last=True))

        def prepare() -> "tuple[JobSpec, RunOptions, RunDisplay]":
            asked, spec = options(), load(job, sets, direct)
            return spec, asked, watching.display(spec, stack)

        from batchclf.engines.local.engine import run_in_worker

        with watching.told_of_errors():
            result = run_in_worker(prepare, stop, STARTED, adopts=True)
    predictions = result.files.shown(result.files.predictions)
    if not result.was_complete:
        _print_summary(result.summary, predictions)
    answer = {
        "status": "complete",
        "exit_code": 0,
        "was_complete": result.was_complete,
        "predictions": predictions,
        "type": "summary",
        **asdict(result.summary),
    }
    if as_json:
        with watching.told_of_errors():
            print_result(json.dumps(answer), f"the job is complete: {predictions}")
    watching.tell(answer, f"complete: {_counts(result.summary)}")  # whoever is told may be slow


def _require_dry(retry_failed: bool, extend: bool, watching: Watching) -> None:
    """Refuse what --dry-run would leave out without a word.

    Raises:
        UsageError: naming it.
    """
    for name, is_given in (
        ("--retry-failed", retry_failed),
        ("--extend", extend),
        ("--notify", watching.webhook is not None),
        ("--metrics-port", watching.metrics is not None),
    ):
        if is_given:
            raise UsageError(
                f"{name}: --dry-run only tells of a run that begins, or goes on with the images "
                f"that have no record; leave {name} out, or --dry-run"
            )


def _parse_codes(text: str) -> frozenset[str]:
    codes = [code.strip() for code in text.split(",")]
    bad = [code for code in codes if not re.fullmatch(r"[a-z0-9_]+", code)]
    if bad:
        raise UsageError(f"--codes: found {bad[0]!r}; write codes such as truncated,io_error")
    return frozenset(codes)


def _counts(summary: "Summary") -> str:
    codes = "".join(f", {count:,} {code}" for code, count in summary.errors_by_code.items())
    errors = f"{counted(summary.num_errors, 'error')}{codes}"
    return f"{images(summary.num_images)}: {summary.num_ok:,} ok, {errors}"


def _print_summary(summary: "Summary", predictions: str) -> None:
    from batchclf.results.records import precision_name

    provider, check, part = summary.provider, summary.precision_check, summary.part
    name = precision_name(summary.precision, check)
    lines = [
        _counts(summary),
        f"{summary.images_per_s:,.1f} images/s over {summary.wall_s:.1f} s "
        f"(and {summary.startup_s:.1f} s of start-up), batches of {summary.batch_size}"
        + (f" in parts of {part.num_images}" if part.num_images < summary.batch_size else ""),
        f"ran on {provider.active} ({provider.device}), {name}; "
        f"bottleneck: {summary.bottleneck} ({summary.bottleneck_why})",
    ]
    if check is not None:
        lines.append(
            f"{name} compared with fp32 on {check.num_images} images: same top class on "
            f"{check.top1_agreement:.1%}, largest difference of a score "
            f"{check.max_score_difference:.2f}"
        )
        if check.is_slow:
            lines.append(
                f"{name} IS SLOWER THAN FP32 HERE: {check.speed} times as fast; use precision fp32"
            )
    if provider.fallback is not None:
        lines.append(f"FELL BACK TO THE CPU, as the job allows: {provider.fallback}")
    lines.append(f"records: {predictions}")
    for line in lines:
        say(f"batchclf: {line}")
