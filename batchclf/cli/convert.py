"""`batchclf convert`: a job's records as CSV or Parquet, or its images in folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from batchclf.cli.options import json_option, output_folder
from batchclf.cli.streams import as_lines, print_result

if TYPE_CHECKING:
    from batchclf.commands.convert.convert import Converted

MAX_FOLDERS = 20


@click.command("convert")
@click.argument("output")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["csv", "parquet", "folders"]),
    help="csv: the top k in columns. parquet: as lists. folders: the images, one folder per label.",
)
@click.option(
    "-o",
    "--output",
    "target",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path, readable=False),
    help="File or folder to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file, or folder of a conversion.")
@click.option(
    "--min-score",
    type=float,
    help="folders: put images whose top score is lower into _unsure.",
)
@click.option("--copy", is_flag=True, help="folders: copy the images instead of linking them.")
@click.option("--hard-links", is_flag=True, help="folders: hard links instead of symbolic ones.")
@json_option("Print what was written as one JSON object.")
def command(
    output: str,
    to: Literal["csv", "parquet", "folders"],
    target: Path,
    overwrite: bool,
    min_score: float | None,
    copy: bool,
    hard_links: bool,
    as_json: bool,
) -> None:
    """Write the records in OUTPUT in another form; whole, or not at all.

    OUTPUT is a folder, or an address in a bucket. In CSV, text that a spreadsheet would take for a
    formula has an apostrophe before it. In folders, images that failed are in _failed; those in
    archives or buckets are copied.

    \b
      batchclf convert runs/night --to csv -o night.csv
      batchclf convert runs/night --to folders -o sorted --min-score 0.8
    """
    import json
    from dataclasses import asdict

    from batchclf.commands.convert.convert import convert_output
    from batchclf.commands.convert.folders import Choice
    from batchclf.errors import UsageError

    for name, is_given in (
        ("--min-score", min_score is not None),
        ("--copy", copy),
        ("--hard-links", hard_links),
    ):
        if is_given and to != "folders":
            raise UsageError(f"{name}: goes with --to folders, not with --to {to}")
    if copy and hard_links:
        raise UsageError("--copy, --hard-links: give one of them")
    way: Literal["symlinks", "hard links", "copies"] = "copies" if copy else "symlinks"
    choice = Choice("hard links" if hard_links else way, min_score)
    with output_folder(output) as folder:
        converted = convert_output(folder, to, target, overwrite=overwrite, choice=choice)
    text = json.dumps(asdict(converted)) if as_json else as_lines(*_lines(converted))
    print_result(text, f"the records are converted: {converted.path}")


def _lines(converted: "Converted") -> Iterator[str]:
    so_far = (
        ""
        if converted.num_records == converted.num_images
        else (f" of {converted.num_images:,} so far")
    )
    yield f"images:   {converted.num_records:,}{so_far}, {converted.num_errors:,} errors"
    for name, count in list(converted.folders.items())[:MAX_FOLDERS]:
        yield f"  {count:>7,}  {name}"
    if len(converted.folders) > MAX_FOLDERS:
        yield f"           and {len(converted.folders) - MAX_FOLDERS:,} folders more"
    if converted.num_written_out:
        yield f"copied:   {converted.num_written_out:,} that lie in archives or on other machines"
    for code, count in converted.left_out.items():
        yield f"left out: {count:,} that could not be had: {code}"
    yield f"written:  {converted.path}"
