"""`batchclf export`: write a job's model bundle."""

from pathlib import Path
from typing import Any

import click

from batchclf.cli.options import job_options, json_option, load
from batchclf.cli.streams import print_result


@click.command("export")
@job_options
@click.argument("folder", type=click.Path(path_type=Path, readable=False))
@json_option("Print what was written as one JSON object.")
def command(job: Path, folder: Path, sets: tuple[str, ...], as_json: bool, **direct: Any) -> None:
    """Write the model of JOB as a bundle into FOLDER.

    A job with `model: {bundle: FOLDER}` runs where torch is not installed. At a precision that
    needs another model file (int8; fp16 on cuda) the bundle holds that as well, int8 calibrated on
    a sample of JOB's images.

    \b
      batchclf export jobs/cpu.yaml exported/resnet50
      batchclf export jobs/cpu.yaml exported/resnet50 --precision int8
    """
    import json

    from batchclf.cli.progress import Progress

    spec = load(job, sets, direct)
    from batchclf.commands.export import export_job

    with Progress() as progress:
        bundle = export_job(spec, folder, progress.log)
        progress.log(f"bundle: {folder}: {bundle.meta.name}, {len(bundle.meta.labels):,} classes")
    if as_json:
        found = {"bundle": str(folder), "name": bundle.meta.name, "digest": bundle.digest}
        print_result(json.dumps(found), f"the bundle is complete: {folder}")
