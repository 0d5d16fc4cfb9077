"""`batchclf validate`: check a job without running it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from batchclf.cli.options import job_options, json_option, load_to_look
from batchclf.cli.streams import as_lines, print_result, say


@click.command("validate")
@job_options
@json_option("Print what was found as one JSON object.")
def command(job: Path, sets: tuple[str, ...], as_json: bool, **direct: Any) -> None:
    """Check JOB without running it: spec, provider, model, images found.

    \b
      batchclf validate jobs/cpu.yaml
    """
    import json

    spec = load_to_look(job, sets, direct)
    from batchclf.commands.validate import check_job
    from batchclf.spec.input import shown

    checked = check_job(spec, log=lambda text: say(f"batchclf: {text}"))
    if as_json:
        text = json.dumps({"valid": True, **asdict(checked)})
    else:
        left_out = [f"left out: {checked.left_out}"] if checked.num_left_out else []
        text = as_lines(
            f"images:   {checked.num_images:,} in {shown(spec.input)}",
            *left_out,
            f"model:    {checked.model}",
            f"provider: {checked.provider}",
            f"output:   {spec.output}",
        )
    print_result(text, f"{job} is valid")
