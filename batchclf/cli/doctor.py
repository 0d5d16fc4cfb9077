"""`batchclf doctor`: what this machine can run, and why not the rest."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from batchclf.cli.options import json_option
from batchclf.cli.streams import as_lines, print_result

if TYPE_CHECKING:
    from batchclf.commands.doctor import Diagnosis


@click.command("doctor")
@json_option("Print everything as one JSON object.")
def command(as_json: bool) -> None:
    """Tell what this machine can run, and why not the rest.

    \b
      batchclf doctor
      batchclf doctor --json
    """
    import orjson

    from batchclf.commands.doctor import diagnose

    found = diagnose()
    if as_json:
        print_result(orjson.dumps(asdict(found)).decode())
    else:
        print_result(as_lines(*_lines(found)))


def _lines(found: "Diagnosis") -> list[str]:
    flavours = ", ".join(f"{name} {version}" for name, version in found.flavours.items())
    features = [name for name, present in found.cpu_features.items() if present]
    absent = [name for name, present in found.cpu_features.items() if not present]
    quota = found.cores["cgroup_quota"]
    lines = [
        f"batchclf      {found.batchclf}, Python {found.python}, {found.platform}",
        f"ONNX Runtime  {flavours or 'none'}",
    ]
    if found.flavour_problem:
        lines.append(f"              PROBLEM: {found.flavour_problem}")
    for name, state in found.providers.items():
        verdict = "works" if state.opens else f"no: {state.problem}"
        lines.append(f"  {name:<11} {verdict}")
    lines.append(f"resizing      {found.resampler}")
    if found.resampler_problem:
        lines.append(f"              {found.resampler_problem}")
    lines += [
        f"CPU           {found.cpu}",
        f"  has         {', '.join(features) or 'none of the features that matter'}",
        f"  lacks       {', '.join(absent) or 'nothing that matters'}",
        f"cores         {found.cores['usable']:g} usable: {found.cores['affinity']:g} by affinity, "
        + (f"cgroup quota {quota:g}" if quota is not None else "no cgroup quota"),
        f"torch         {found.packages['torch'] or 'not installed'}"
        + (
            "; models can be exported"
            if found.can_export
            else "; only bundles can be run: pip install 'batchclf[export]' to export models"
        ),
    ]
    versions = [f"{name} {version or '-'}" for name, version in found.packages.items()]
    cache = found.cache
    lines += [
        f"packages      {', '.join(versions)}",
        f"model cache   {cache['folder']}: {cache['num_bundles']} bundles, "
        f"{int(cache['num_bytes']) / 1e6:,.1f} MB"
        + ("" if cache["writable"] else "; NOT WRITABLE: set BATCHCLF_CACHE_DIR"),
    ]
    return lines
