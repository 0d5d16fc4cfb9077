"""`batchclf validate`: check a job without running it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from batchclf.cli.options import job_options, json_option, load, to_look
from batchclf.cli.streams import as_lines, print_result, say
from batchclf.system.words import duration, size

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

    spec = load(job, sets, direct)
    preview(job, spec, RunOptions(), trial_by="--trial" if trial else None, as_json=as_json)


def preview(
    job: Path,
    spec: "JobSpec",
    options: "RunOptions",
    *,
    trial_by: Literal["--trial", "--dry-run"] | None,
    as_json: bool,
) -> None:
    """Print what a run will do, and what to look at before; `trial_by`: what asks for a trial.

    Raises:
        BatchclfError: what would end the run.
    """
    import json

    from batchclf.commands.validate import check_job

    if trial_by is not None:
        from batchclf.engines.trial import require_local

        require_local(spec, trial_by)
    looked = to_look(spec)
    checked, forecast = check_job(looked, options, _log), None
    warnings = list(checked.warnings)
    if trial_by is not None:
        num_kept = _num_kept(spec, options, warnings) if trial_by == "--dry-run" else 0
        forecast = _tried(looked, checked, num_kept, warnings)
    if as_json:
        text = json.dumps(_answer(checked, forecast, warnings))
    else:
        lines = _lines(looked, checked, forecast)
        text = as_lines(*lines, *(f"WARNING:  {one}" for one in warnings))
    print_result(text, f"{job} is valid")


def _log(text: str) -> None:
    say(f"batchclf: {text}")


@dataclass(frozen=True, slots=True)
class _Forecast:
    """What a trial lets expect of a run."""

    trial: "Trial"
    num_kept: int
    """Images that have a record already."""
    num_left: int

    @property
    def duration_s(self) -> float:
        return self.trial.duration_s(self.num_left)

    @property
    def output_bytes(self) -> int:
        """Of the records that are to be written."""
        return self.trial.output_bytes(self.num_left)


def _num_kept(spec: "JobSpec", options: "RunOptions", warnings: list[str]) -> int:
    """How many images have a record in the output.

    Raises:
        BatchclfError: a run could not go on from there.
    """
    from batchclf.run.look import num_recorded

    if isinstance(spec.output, str):
        warnings.append(
            f"output: {spec.output} is not looked into: what follows is of a run that begins there"
        )
        return 0
    return num_recorded(spec, options, _log)


def _tried(spec: "JobSpec", checked: "Checked", num_kept: int, warnings: list[str]) -> _Forecast:
    """What a trial tells; what to look at is added to the warnings."""
    from batchclf.commands.validate import DISK, disk_warning
    from batchclf.engines.trial import try_job

    trial = try_job(spec, checked.sample, _log, located=checked.located)
    found = _Forecast(trial, num_kept, max(0, checked.num_images - num_kept))
    warnings += trial.warnings()
    full = disk_warning(spec, found.output_bytes)
    if full is not None:
        warnings[:] = [full, *(one for one in warnings if not one.startswith(DISK))]
    return found


def _answer(checked: "Checked", forecast: _Forecast | None, warnings: list[str]) -> dict[str, Any]:
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
    if forecast is not None:
        answer["trial"] = asdict(forecast.trial) | {
            "num_kept": forecast.num_kept,
            "duration_s": round(forecast.duration_s, 1),
            "output_bytes": forecast.output_bytes,
        }
    return answer


def _lines(spec: "JobSpec", checked: "Checked", forecast: _Forecast | None) -> Iterator[str]:
    from batchclf.spec.input import shown

    trial = None if forecast is None else forecast.trial
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
    if forecast is not None:
        yield from _forecast_lines(forecast)


def _model(trial: "Trial") -> str:
    labels = list(trial.labels)
    more = f", ... ({len(labels):,})" if len(labels) > MAX_LABELS else ""
    return f"{trial.model}: {', '.join(labels[:MAX_LABELS])}{more}"


def _provider(trial: "Trial") -> str:
    from batchclf.results.records import precision_name

    check, told = trial.precision_check, ""
    name = precision_name(trial.precision, check)
    if check is not None:
        told = f", the same top class as fp32 on {check.top1_agreement:.1%}"
    return f"{trial.provider.active} ({trial.provider.device}), {name}{told}"


def _forecast_lines(forecast: _Forecast) -> Iterator[str]:
    trial = forecast.trial
    codes = "".join(f", {count:,} {code}" for code, count in trial.errors_by_code.items())
    yield (
        f"trial:    {trial.num_images:,} images, {trial.num_errors:,} errors{codes}; "
        f"{trial.images_per_s:,.1f} images/s"
    )
    if forecast.num_kept:
        yield f"kept:     {forecast.num_kept:,} images have a record already; of the others:"
    yield f"duration: about {duration(forecast.duration_s)}"
    yield f"records:  about {size(forecast.output_bytes)}"
