"""`batchclf validate`: check a job without running it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchclf.cli.options import job_options, json_option, load_to_look
from batchclf.cli.streams import as_lines, print_result, say
from batchclf.cli.words import duration, size

if TYPE_CHECKING:
    from batchclf.commands.validate import Checked
    from batchclf.engines.trial import Trial
    from batchclf.spec.job import JobSpec
    from batchclf.spec.options import RunOptions

MAX_FORMATS, MAX_LABELS = 6, 5


@click.command("validate")
@job_options
@click.option(
    "--trial",
    is_flag=True,
    help="Classify a sample for 10 s, to tell how long a run will take and how much it will write.",
)
@json_option("Print what was found as one JSON object.")
def command(job: Path, sets: tuple[str, ...], trial: bool, as_json: bool, **direct: Any) -> None:
    """Check JOB without running it: spec, provider, model, images found.

    With --trial, which builds the model where that is not done yet, a sample of the images is
    classified and its records are thrown away.

    \b
      batchclf validate jobs/cpu.yaml
      batchclf validate jobs/cpu.yaml --trial
    """
    from batchclf.spec.options import RunOptions

    preview(job, load_to_look(job, sets, direct), RunOptions(), with_trial=trial, as_json=as_json)


def preview(
    job: Path, spec: "JobSpec", options: "RunOptions", *, with_trial: bool, as_json: bool
) -> None:
    """Print what a run will do, and what to look at before.

    Raises:
        BatchclfError: what would end the run.
    """
    import json

    from batchclf.commands.validate import check_job, disk_warning

    def log(text: str) -> None:
        say(f"batchclf: {text}")

    checked, trial = check_job(spec, options, log), None
    warnings = list(checked.warnings)
    if with_trial:
        from batchclf.engines.trial import try_job

        trial = try_job(spec, checked.sample, log, located=checked.located)
        warnings += trial.warnings()
        full = disk_warning(spec, trial.output_bytes(checked.num_images))
        if full is not None:
            warnings = [full, *(one for one in warnings if not one.startswith("output: the disk"))]
    if as_json:
        text = json.dumps(_answer(checked, trial, warnings))
    else:
        text = as_lines(*_lines(spec, checked, trial), *(f"WARNING:  {one}" for one in warnings))
    print_result(text, f"{job} is valid")


def _answer(checked: "Checked", trial: "Trial | None", warnings: list[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "valid": True,
        "num_images": checked.num_images,
        "num_bytes": checked.num_bytes,
        "num_left_out": checked.num_left_out,
        "left_out": checked.left_out,
        "provider": checked.provider,
        "model": checked.model,
        "sampled": None if checked.glance is None else asdict(checked.glance),
        "warnings": warnings,
    }
    if trial is not None:
        answer["trial"] = asdict(trial) | {
            "duration_s": round(trial.duration_s(checked.num_images), 1),
            "output_bytes": trial.output_bytes(checked.num_images),
        }
    return answer


def _lines(spec: "JobSpec", checked: "Checked", trial: "Trial | None") -> Iterator[str]:
    from batchclf.spec.input import shown

    yield f"images:   {checked.num_images:,} in {shown(spec.input)}"
    if checked.num_left_out:
        yield f"left out: {checked.left_out}"
    if checked.glance is not None and checked.glance.num_images:
        formats = list(checked.glance.formats.items())
        told = ", ".join(f"{count:,} {name}" for name, count in formats[:MAX_FORMATS])
        more = f", {len(formats) - MAX_FORMATS} more" if len(formats) > MAX_FORMATS else ""
        if checked.num_bytes is not None:
            yield f"bytes:    about {size(checked.num_bytes)}"
        yield f"formats:  {told}{more} of {checked.glance.num_images:,} sampled"
    yield f"model:    {checked.model if trial is None else _model(trial)}"
    yield f"provider: {checked.provider if trial is None else _provider(trial)}"
    yield f"output:   {spec.output}"
    if trial is not None:
        yield from _forecast(checked, trial)


def _model(trial: "Trial") -> str:
    labels = list(trial.labels)
    more = f", ... ({len(labels):,})" if len(labels) > MAX_LABELS else ""
    return f"{trial.model}: {', '.join(labels[:MAX_LABELS])}{more}"


def _provider(trial: "Trial") -> str:
    check, told = trial.precision_check, ""
    if check is not None:
        told = f", the same top class as fp32 on {check.top1_agreement:.1%}"
    return f"{trial.provider.active} ({trial.provider.device}), {trial.precision}{told}"


def _forecast(checked: "Checked", trial: "Trial") -> Iterator[str]:
    codes = "".join(f", {count:,} {code}" for code, count in trial.errors_by_code.items())
    yield (
        f"trial:    {trial.num_images:,} images, {trial.num_errors:,} errors{codes}; "
        f"{trial.images_per_s:,.1f} images/s"
    )
    yield f"duration: about {duration(trial.duration_s(checked.num_images))}"
    yield f"records:  about {size(trial.output_bytes(checked.num_images))}"
