"""`batchclf export`: write a job's model bundle."""

from pathlib import Path
from typing import Any

import click

from batchclf.cli.options import job_options, json_option, load


@click.command("export")
@job_options
@click.argument("folder", type=click.Path(path_type=Path))
@json_option("Print what was written as one JSON object.")
def command(job: Path, folder: Path, sets: tuple[str, ...], as_json: bool, **direct: Any) -> None:
    """Write the model of JOB as a bundle into FOLDER.

    A job with `model: {bundle: FOLDER}` runs where torch is not installed.

    \b
      batchclf export jobs/cpu.yaml exported/resnet50
    """
    import json

    from batchclf.cli.progress import Progress

    spec = load(job, sets, direct)
    from batchclf.models.bundle import copy_bundle
    from batchclf.models.resolve import resolve_model
    from batchclf.runtime.classifier import open_reference
    from batchclf.runtime.providers import require_provider

    require_provider("cpu")  # what the exported model is checked with
    with Progress() as progress:
        model = resolve_model(
            spec.model,
            batch_size=spec.batch_size,
            open_reference=open_reference,
            log=progress.log,
        )
        bundle = copy_bundle(model.bundle, folder, labels=model.labels, preprocess=model.preprocess)
        progress.log(f"bundle: {folder}: {bundle.meta.name}, {len(bundle.meta.labels):,} classes")
    if as_json:
        found = {"bundle": str(folder), "name": bundle.meta.name, "digest": bundle.digest}
        click.echo(json.dumps(found))
