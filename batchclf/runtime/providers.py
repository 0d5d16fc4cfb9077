"""Job-file provider names to ONNX Runtime execution providers; refuses what is not there.

ONNX Runtime falls back to the CPU silently in several ways. Nothing here does: a provider is
installed, compiled in and first in the session's own list, or there is no session.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from batchclf.errors import ProviderError, UsageError

FLAVOURS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
"""Distributions that own the same Python package; two of them side by side break each other."""

PRECISIONS = ("fp32",)
"""Precisions this version runs, on every provider."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider as the job file names it, and what ONNX Runtime calls it."""

    name: str
    execution_provider: str
    extra: str
    """The extra of this package that installs the right ONNX Runtime flavour."""
    distribution: str


PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider("cpu", "CPUExecutionProvider", "cpu", "onnxruntime"),
    "cuda": Provider("cuda", "CUDAExecutionProvider", "gpu", "onnxruntime-gpu"),
    "openvino": Provider(
        "openvino", "OpenVINOExecutionProvider", "openvino", "onnxruntime-openvino"
    ),
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
    if len(found) > 1:
        names = " and ".join(f"{name} {version}" for name, version in found.items())
        return (
            f"{names} are installed side by side and overwrite each other's files; keep one: "
            f"pip uninstall -y {' '.join(found)} && "
            "pip install 'batchclf[cpu]' (or [gpu], or [openvino])"
        )
    return None


def compiled_in() -> list[str]:
    """Execution providers that the installed ONNX Runtime was built with; they need not work."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def require_provider(name: str) -> Provider:
    """The provider called `name`, if the installed ONNX Runtime has it compiled in.

    Raises:
        ProviderError: no flavour, two flavours, or one without this provider.
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
            f"in an environment of its own: pip install 'batchclf[{provider.extra}]'"
        )
    return provider


def require_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options that the provider would pass over in silence.

    Raises:
        UsageError: naming them.
    """
    if name == "cpu" and options:
        raise UsageError(
            f"provider.options: found {', '.join(options)}; provider cpu has none "
            "(runtime.threads and runtime.streams say how it uses the machine)"
        )


def require_precision(name: str, precision: str) -> None:
    """Refuse a precision that the provider cannot run.

    Raises:
        UsageError: naming what can be had instead.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision: found {precision}; provider {name} runs {' or '.join(PRECISIONS)} "
            "in this version"
        )
