"""`batchclf merge`: join the shards of a job."""

from pathlib import Path

import click

from batchclf.cli.options import json_option
from batchclf.cli.streams import as_lines, print_result


@click.command("merge")
@click.argument("output", type=click.Path(path_type=Path, readable=False))
@json_option("Print what was joined as one JSON object.")
def command(output: Path, as_json: bool) -> None:
    """Join the shards in the folder OUTPUT into one predictions.jsonl, stats.jsonl and run.json.

    All shards must be complete and of one job. Their own files stay.

    \b
      batchclf merge runs/night
    """
    import json
    from dataclasses import asdict

    from batchclf.commands.merge import merge_shards

    merged = merge_shards(output)
    if as_json:
        text = json.dumps(asdict(merged))
    else:
        codes = "".join(f", {count:,} {code}" for code, count in merged.errors_by_code.items())
        text = as_lines(
            f"shards:  {merged.num_shards:,}",
            f"images:  {merged.num_images:,}: {merged.num_ok:,} ok, {merged.num_errors:,} errors"
            + codes,
            f"records: {merged.predictions}",
        )
    print_result(text, f"the shards are merged: {merged.predictions}")
