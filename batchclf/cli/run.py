"""`batchclf run`: classify the images of a job."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from batchclf.cli.options import job_options, json_option, load
from batchclf.errors import UsageError


@click.command("run")
@job_options
@click.option("--limit", type=click.IntRange(1), help="Only the first N images of the listing.")
@click.option(
    "--shard", metavar="I/N", help="Only part I (from 0) of N contiguous parts of the listing."
)
@click.option("--overwrite", is_flag=True, help="Start anew instead of resuming.")
@click.option("--retry-failed", is_flag=True, help="Try the error records of a finished job again.")
@json_option("Print the summary as one JSON object.")
def command(
    job: Path,
    sets: tuple[str, ...],
    limit: int | None,
    shard: str | None,
    overwrite: bool,
    retry_failed: bool,
    as_json: bool,
    **direct: Any,
) -> None:
    """Classify the images of JOB and write one record per image.

    Running the same command again resumes an interrupted job.

    \b
      batchclf run jobs/cpu.yaml
      batchclf run jobs/cpu.yaml -i photos -o runs/photos -b 16
    """
    import json

    from batchclf.cli.progress import Progress
    from batchclf.interrupt import StopRequest
    from batchclf.results.records import Shard

    if overwrite and retry_failed:
        raise UsageError("--overwrite starts anew, --retry-failed keeps: give one of them")
    part = Shard() if shard is None else _parse_shard(shard)
    with StopRequest().installed() as stop, Progress() as progress:
        spec = load(job, sets, direct)
        from batchclf.pipeline import RunOptions, run_job

        options = RunOptions(part, overwrite=overwrite, retry_failed=retry_failed, limit=limit)
        result = run_job(spec, options, reporter=progress, stop=stop)
    if as_json:
        answer = {
            "status": "complete",
            "exit_code": 0,
            "was_complete": result.was_complete,
            "predictions": str(result.files.predictions),
            **result.summary,
        }
        click.echo(json.dumps(answer))
    if not result.was_complete:
        _print_summary(result.summary, result.files.predictions)


def _parse_shard(text: str) -> Any:
    from batchclf.results.records import Shard

    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]) <= 99999:
        raise UsageError(f"--shard: found {text!r}; write I/N with I from 0 to N-1, such as 3/16")
    return Shard(int(match[1]), int(match[2]))


def _print_summary(summary: Mapping[str, Any], predictions: Path) -> None:
    provider = summary["provider"]
    lines = [
        f"{summary['num_images']:,} images: {summary['num_ok']:,} ok, "
        f"{summary['num_errors']:,} errors"
        + "".join(f", {count:,} {code}" for code, count in summary["errors_by_code"].items()),
        f"{summary['images_per_s']:,.1f} images/s over {summary['wall_s']:.1f} s "
        f"(and {summary['startup_s']:.1f} s of start-up), batches of {summary['batch_size']}",
        f"ran on {provider['active']} ({provider['device']}), {summary['precision']}; "
        f"bottleneck: {summary['bottleneck']} ({summary['bottleneck_why']})",
        f"records: {predictions}",
    ]
    if provider["fallback"] is not None:
        lines.insert(-1, f"FELL BACK TO THE CPU, as the job allows: {provider['fallback']}")
    if (check := summary["precision_check"]) is not None:
        name = summary["precision"] if summary["precision"] != "fp32" else "TF32"
        lines.insert(
            -1,
            f"{name} compared with fp32 on {check['num_images']} images: same top "
            f"class on {check['top1_agreement']:.1%}, largest difference of a score "
            f"{check['max_score_difference']:.2f}",
        )
    for line in lines:
        click.echo(f"batchclf: {line}", err=True)
