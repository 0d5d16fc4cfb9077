"""`batchclf merge`: join the shards of a job."""

import click

from batchclf.cli.options import json_option, output_folder
from batchclf.cli.streams import as_lines, print_result


@click.command("merge")
@click.argument("output")
@json_option("Print what was joined as one JSON object.")
def command(output: str, as_json: bool) -> None:
    """Join the shards in OUTPUT into one predictions.jsonl, stats.jsonl and run.json.

    OUTPUT is a folder, or an address in a bucket, for which they are fetched and sent. All shards
    must be complete and of one job. Their own files stay.

    \b
      batchclf merge runs/night
    """
    import json
    from dataclasses import asdict, replace

    from batchclf.commands.merge import merge_shards
    from batchclf.results.files import RunFiles
    from batchclf.results.mirror import send_merged
    from batchclf.spec.input import is_address

    with output_folder(output) as folder:
        merged = merge_shards(folder)
        if is_address(output):
            send_merged(output, RunFiles(folder))
            merged = replace(merged, predictions=f"{output.rstrip('/')}/predictions.jsonl")
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
