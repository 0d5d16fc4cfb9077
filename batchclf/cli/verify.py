"""`batchclf verify`: compare the job's provider with PyTorch and native OpenVINO."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchclf.cli.options import job_options, json_option, load_to_look
from batchclf.cli.streams import as_lines, print_result

if TYPE_CHECKING:
    from batchclf.commands.verify import Backend, Verified


@click.command("verify")
@job_options
@click.option(
    "-n",
    "--num-images",
    type=click.IntRange(1, 10_000),
    default=32,
    show_default=True,
    help="Images of the job to compare on, evenly spread over its listing.",
)
@json_option("Print the comparison as one JSON object.")
def command(
    job: Path, sets: tuple[str, ...], num_images: int, as_json: bool, **direct: Any
) -> None:
    """Compare the provider of JOB with PyTorch and native OpenVINO on the same images.

    Speed, logits and classes. Ends with exit code 1 when they disagree: at fp32 beyond rtol 1e-3
    and atol 1e-4 on a logit, at another precision below min_agreement.

    \b
      batchclf verify jobs/sample.yaml
      batchclf verify jobs/sample.yaml --precision int8 --json
    """
    import json
    from dataclasses import asdict

    from batchclf.cli.progress import Progress

    spec = load_to_look(job, sets, direct)
    from batchclf.commands.verify import verify_job

    with Progress() as progress:
        found = verify_job(spec, num_images, progress.log)
    text = json.dumps(asdict(found)) if as_json else as_lines(*_table(found))
    verdict = "they agree" if found.agree else "they disagree"
    print_result(text, f"the comparison is complete: {verdict}")
    if not found.agree:
        sys.exit(1)


def _table(found: "Verified") -> list[str]:
    rows = [
        (
            "",
            "precision",
            "batch 1: ms (p95)",
            f"batch {found.batch_size}: ms (p95)",
            "images/s",
            "largest difference",
            *(f"rtol {one['rtol']:g} atol {one['atol']:g}" for one in found.tolerances.values()),
            "top 1",
            "top 5",
            "",
        ),
        *(_row(one, found.batch_size) for one in found.backends),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{found.model} on {found.num_images} images; reference: {found.reference}",
        *(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ),
    ]
    lines += [f"not compared: {name}: {why}" for name, why in found.left_out.items()]
    lines.append("they agree" if found.agree else "THEY DISAGREE")
    return lines


def _row(one: "Backend", batch_size: int) -> tuple[str, ...]:
    by_size = {latency.batch_size: latency for latency in one.latencies}
    latencies = [
        f"{by_size[size].median_ms:.1f} ({by_size[size].p95_ms:.1f})" if size in by_size else "-"
        for size in (1, batch_size)
    ]
    return (
        f"{one.name} ({one.device})",
        one.precision,
        *latencies,
        f"{one.images_per_s:,.1f}",
        "NaN" if one.largest_logit_difference is None else f"{one.largest_logit_difference:.1e}",
        *("holds" if holds else "no" for holds in one.is_close.values()),
        f"{one.top1_agreement:.1%}",
        f"{one.top5_agreement:.1%}",
        "" if one.agrees else "DISAGREES",
    )
