"""`batchclf report`: a job's records as one HTML page."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchclf.cli.options import json_option, output_folder
from batchclf.cli.streams import as_lines, print_result
from batchclf.errors import UsageError

if TYPE_CHECKING:
    from batchclf.commands.report.report import Reported


@click.command("report")
@click.argument("output")
@click.option(
    "-o",
    "--output",
    "target",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),
    help="The page to write.",
)
@click.option(
    "--truth",
    metavar="TRUTH",
    help="True labels, as of `score`: accuracy, confusions, mistakes and calibration are added.",
)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="With --truth: leave out of these figures what has no true label that is a class.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file, where there is one.")
@json_option("Print what was written as one JSON object.")
def command(
    output: str,
    target: Path,
    truth: str | None,
    allow_unmatched: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write one HTML page about the job in OUTPUT, a folder or an address in a bucket.

    The job may still run. The page holds all that it shows, pictures too, and asks nothing of any
    network: speed over time, classes, scores, a gallery to filter, errors, the job.

    \b
      batchclf report runs/night -o night.html
      batchclf report runs/night -o night.html --truth photos --overwrite
    """
    import json
    from dataclasses import asdict

    if allow_unmatched and truth is None:
        raise UsageError("--allow-unmatched goes with --truth: give both")
    for name in ("jinja2", "matplotlib"):
        if find_spec(name) is None:
            raise UsageError(
                f"report needs {name}: pip install 'batchclf[report]'; score and convert do not"
            )
    from batchclf.commands.report.report import report_output

    with output_folder(output) as folder:
        reported = report_output(
            folder, target, truth=truth, allow_unmatched=allow_unmatched, overwrite=overwrite
        )
    text = json.dumps(asdict(reported)) if as_json else as_lines(*_lines(reported))
    print_result(text, f"the page is written: {reported.path}")


def _lines(reported: "Reported") -> Iterator[str]:
    so_far = (
        "" if reported.num_records == reported.num_images else f" of {reported.num_images:,} so far"
    )
    yield f"images:   {reported.num_records:,}{so_far}, {reported.num_errors:,} errors"
    yield f"pictures: {reported.num_pictures:,}"
    if reported.why_missing is not None:
        yield f"missing:  {reported.why_missing}"
    yield f"written:  {reported.path} ({reported.num_bytes:,} bytes)"
