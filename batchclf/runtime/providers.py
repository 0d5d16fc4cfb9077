"""Job-file provider names to ONNX Runtime execution providers; refuses what is not there.

ONNX Runtime falls back to the CPU silently in several ways. Nothing here does: what is not
installed or not compiled in is an error that names the command which mends it. What a session
really runs on is proven in sessions.py.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchclf.errors import ProviderError, UsageError

if TYPE_CHECKING:  # it imports NumPy, for which `--version` has no time
    from batchclf.results.records import Precision

FLAVOURS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
"""Distributions that own the same Python package; two of them side by side break each other."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider as the job file names it, and what ONNX Runtime calls it."""

    name: str
    execution_provider: str
    extra: str
    """The extra of this package that installs the right ONNX Runtime flavour."""
    distribution: str
    precisions: "tuple[Precision, ...]"
    """What it runs, fp32 first."""


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", "cpu", "onnxruntime", ("fp32", "int8")),
        Provider("cuda", "CUDAExecutionProvider", "gpu", "onnxruntime-gpu", ("fp32", "fp16")),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "openvino",
            "onnxruntime-openvino",
            ("fp32", "bf16", "fp16", "int8"),
        ),
    )
}


def installed_flavours() -> dict[str, str]:
    """Installed ONNX Runtime distributions and their versions."""
    found: dict[str, str] = {}
    for flavour in FLAVOURS:
        try:
            found[flavour] = importlib.metadata.version(flavour)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flavour_problem() -> str | None:
    """What is wrong with the installed flavours, and the command that mends it; None: nothing."""
    found = installed_flavours()
    if not found:
        return (
            "ONNX Runtime is not installed; install one flavour: "
            "pip install 'batchclf[cpu]' (or [gpu], or [openvino])"
        )
    if len(found) == 1:
        return None
    folders = {name: _folder_of(name) for name in found}
    if len({*folders.values()}) > 1:
        return _hiding_each_other(found, folders)
    names = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{names} are installed side by side in {folders.popitem()[1]} and overwrite each other's "
        f"files, so neither is whole; keep one: pip uninstall -y {' '.join(found)} && "
        "pip install 'batchclf[cpu]' (or [gpu], or [openvino])"
    )


def _folder_of(flavour: str) -> Path:
    return Path(str(importlib.metadata.distribution(flavour).locate_file("")))


def _hiding_each_other(found: Mapping[str, str], folders: Mapping[str, Path]) -> str:
    """Each is whole, so it is enough that one goes."""
    names = " and ".join(f"{name} {found[name]} in {folders[name]}" for name in found)
    provider_of = {one.distribution: one.name for one in PROVIDERS.values()}
    ways = ", ".join(
        f"for provider {provider_of[kept]} "
        + " && ".join(f"pip uninstall -y {name}" for name in found if name != kept)
        for kept in found
    )
    aside = "; ".join(
        f"mv {folders[name] / 'onnxruntime'} "
        f"{folders[name] / name.replace('-', '_')}-{found[name]}.dist-info ASIDE/"
        for name in found
    )
    return (
        f"{names} are both found, and the first hides the other; keep one: {ways}; or, where pip "
        f"may not uninstall it (an image, a folder in PYTHONPATH), put the other aside: {aside}"
    )


def require_flavour() -> None:
    """Refuse an environment without ONNX Runtime, or with two flavours of it, before its import.

    Raises:
        ProviderError: with the command that mends it.
    """
    if problem := flavour_problem():
        raise ProviderError(problem)


def compiled_in() -> list[str]:
    """Execution providers that the installed ONNX Runtime was built with; they need not work.

    Raises:
        ProviderError: it is not there, or cannot be imported, as where a library that it needs
            is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        require_flavour()
        found = installed_flavours()
        names = " and ".join(f"{name} {version}" for name, version in found.items())
        raise ProviderError(
            f"{names} is installed and cannot be imported: {error}; install the library that is "
            f"missing, or the package again: pip install --force-reinstall {next(iter(found))}"
        ) from error
    return list(onnxruntime.get_available_providers())


def require_provider(name: str) -> Provider:
    """The provider called `name`, if the installed ONNX Runtime has it compiled in.

    Raises:
        ProviderError: no flavour, two flavours, one that cannot be imported, or one without this
            provider.
    """
    provider = PROVIDERS[name]
    if problem := flavour_problem():
        raise ProviderError(f"provider {name}: {problem}")
    available = compiled_in()
    if provider.execution_provider not in available:
        flavour, version = next(iter(installed_flavours().items()))
        raise ProviderError(
            f"provider {name}: the installed {flavour} {version} has no "
            f"{provider.execution_provider} (it has {', '.join(available)}); "
            f"in an environment of its own: pip install 'batchclf[{provider.extra}]{_origin()}'"
        )
    return provider


def _origin() -> str:
    """` @ URL`, where this package came from a place of its own and no index (PEP 610)."""
    try:
        origin = importlib.metadata.distribution("batchclf").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    if origin is None:
        return ""
    told = json.loads(origin)
    if (vcs := told.get("vcs_info")) is not None:
        return f" @ {vcs['vcs']}+{told['url']}@{vcs['commit_id']}"
    return f" @ {told['url']}"


def require_precision(name: str, precision: "Precision") -> None:
    """Refuse a precision that the provider cannot run.

    Raises:
        UsageError: naming what can be had instead.
    """
    can = PROVIDERS[name].precisions
    if precision not in can:
        others = [one.name for one in PROVIDERS.values() if precision in one.precisions]
        raise UsageError(
            f"precision: found {precision}; provider {name} runs {' or '.join(can)}, "
            f"and {precision} runs on provider {' or '.join(others)}"
        )
