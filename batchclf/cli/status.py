"""`batchclf status`: how far a job is, from another shell or machine."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchclf.cli.options import json_option, require_no_file
from batchclf.cli.streams import as_lines, print_result
from batchclf.system.words import duration

if TYPE_CHECKING:
    from batchclf.commands.status import Part, Status

WATCH_S = 2.0
WATCH_BUCKET_S = 10.0
"""Its objects are asked for anew each time, and are news every 30 s only."""


@click.command("status")
@click.argument("output")
@click.option(
    "--watch",
    is_flag=True,
    help=f"Again every {WATCH_S:.0f} s ({WATCH_BUCKET_S:.0f} s: a bucket), until nothing runs.",
)
@json_option("Print it as one JSON object; with --watch, a line each time.")
def command(output: str, watch: bool, as_json: bool) -> None:
    """Tell how far the job that writes to OUTPUT is, and each of its shards.

    OUTPUT is a folder, or an address in a bucket, where news come every 30 s.

    \b
      batchclf status runs/night
      batchclf status s3://bucket/night --watch
    """
    import json
    from dataclasses import asdict

    from batchclf.commands.status import status_of
    from batchclf.spec.input import is_address

    is_far = is_address(output)
    if not is_far:
        require_no_file(Path(output))
    while True:
        status = status_of(output if is_far else Path(output))
        if as_json:
            print_result(json.dumps(asdict(status)))
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            print_result(as_lines(*_lines(status)))
        if not watch or all(part.state != "running" for part in status.parts):
            return
        time.sleep(WATCH_BUCKET_S if is_far else WATCH_S)


def _lines(status: "Status") -> Iterator[str]:
    of = "" if status.num_images is None else f" of {status.num_images:,}"
    codes = "".join(f", {count:,} {code}" for code, count in status.errors_by_code.items())
    yield f"state:   {status.state}" + _where(status.parts)
    yield f"images:  {status.num_done:,}{of}, {status.num_errors:,} errors{codes}"
    if status.images_per_s is not None:
        yield f"speed:   {_speed(status)}"
    if len(status.parts) == 1:
        (part,) = status.parts
        if part.bottleneck is not None:
            yield f"limit:   {part.bottleneck}, on {part.device}"
        for node, images_per_s in sorted(part.nodes.items()):
            yield f"node:    {node}: {images_per_s:,.1f} images/s"
        if part.error is not None:
            yield f"ended:   {part.error}"
        return
    yield from _shards(status.parts)


def _where(parts: "Sequence[Part]") -> str:
    if len(parts) > 1:
        return f", {len(parts):,} shards"
    (part,) = parts
    return _who(part)


def _who(part: "Part") -> str:
    who = "" if part.host is None else f" on host {part.host} (pid {part.pid})"
    if part.state == "stale":
        ago = "" if part.seconds_since_news is None else f", last heard of {_ago(part)} ago"
        return f"{who}{ago}: nobody is at work; run the same command to resume"
    return who


def _shards(parts: "Sequence[Part]") -> Iterator[str]:
    """Those that are at work, or were, a line each; the others by their numbers."""
    from batchclf.system.text import spans

    for state in ("complete", "not begun"):
        numbers = [number for number, part in enumerate(parts) if part.state == state]
        if numbers:
            yield f"{state}: {spans(numbers)}"
    for part in parts:
        if part.state in ("complete", "not begun"):
            continue
        of = "" if part.num_images is None else f" of {part.num_images:,}"
        speed = "" if part.images_per_s is None else f", {_speed(part)}"
        errors = f", {part.num_errors:,} errors" if part.num_errors else ""
        why = "" if part.error is None else f": {part.error}"
        yield f"{part.shard} {part.state}{_who(part)}: {part.num_done:,}{of}{errors}{speed}{why}"


def _speed(of: "Status | Part") -> str:
    now = "" if of.images_per_s_now is None else f", {of.images_per_s_now:,.1f} now"
    left = "" if of.left_s is None else f", {duration(of.left_s)} left"
    return f"{of.images_per_s:,.1f} images/s{now}{left}"


def _ago(part: "Part") -> str:
    return duration(part.seconds_since_news or 0.0)
