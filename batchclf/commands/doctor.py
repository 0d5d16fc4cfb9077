"""What this machine can run, and why not the rest."""

import platform
from dataclasses import dataclass, field

from batchclf import __version__
from batchclf.errors import BatchclfError, ProviderError, UsageError
from batchclf.images.resampler import WHY_NOT, resampler_name
from batchclf.images.resize import require_pillow
from batchclf.models.bundle import cache_folder, list_cache, versions_of
from batchclf.runtime.providers import (
    PROVIDERS,
    compiled_in,
    flavour_problem,
    installed_flavours,
    require_provider,
)
from batchclf.system.machine import (
    CPU_FEATURES,
    cgroup_cpu_quota,
    cpu_name_and_flags,
    num_affinity_cores,
    usable_cores,
)

PACKAGES = (
    "numpy",
    "pillow",
    "pydantic",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "safetensors",
    "timm",
    "transformers",
    "openvino",
    "ray",
)
"""Packages whose version, or absence, explains what works."""


@dataclass(frozen=True, slots=True)
class ProviderState:
    """One provider: whether ONNX Runtime has it, and whether a session opens and runs on it."""

    execution_provider: str
    compiled_in: bool
    opens: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `batchclf doctor` reports; `None` for a package that is not installed."""

    batchclf: str
    python: str
    platform: str
    flavours: dict[str, str]
    flavour_problem: str | None
    providers: dict[str, ProviderState]
    resampler: str
    resampler_problem: str | None
    """Why exact pixels are not to be had, or take longer than they could."""
    cpu: str
    cpu_features: dict[str, bool]
    cores: dict[str, float | None]
    packages: dict[str, str | None]
    can_export: bool
    cache: dict[str, str | int | bool] = field(default_factory=dict)


def diagnose() -> Diagnosis:
    """Look at this machine; opens a session on every provider that is compiled in."""
    name, flags = cpu_name_and_flags()
    packages = versions_of(*PACKAGES)
    problem = flavour_problem()
    return Diagnosis(
        batchclf=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        flavours=installed_flavours(),
        flavour_problem=problem,
        providers={name: _provider_state(name) for name in PROVIDERS},
        resampler=resampler_name(),
        resampler_problem=_resampler_problem(),
        cpu=name or platform.processor(),
        cpu_features={text: flag in flags for flag, text in CPU_FEATURES.items()},
        cores={
            "affinity": num_affinity_cores(),
            "cgroup_quota": cgroup_cpu_quota(),
            "usable": usable_cores(),
        },
        packages=packages,
        can_export=all(packages[one] for one in ("torch", "torchvision", "onnx", "onnxscript")),
        cache=_cache(),
    )


def _provider_state(name: str) -> ProviderState:
    provider = PROVIDERS[name]
    if problem := flavour_problem():  # nothing, or two in each other's way: not to be imported
        return ProviderState(provider.execution_provider, False, False, problem)
    try:
        is_compiled_in = provider.execution_provider in compiled_in()
    except ProviderError as error:
        return ProviderState(provider.execution_provider, False, False, str(error))
    from batchclf.runtime.probe import require_working
    from batchclf.runtime.sessions import Target

    try:
        require_working([Target(require_provider(name))])
    except BatchclfError as error:
        problem = str(error)
    return ProviderState(provider.execution_provider, is_compiled_in, problem is None, problem)


def _resampler_problem() -> str | None:
    try:
        require_pillow("exact")
    except UsageError as error:
        return str(error)
    if WHY_NOT:
        return f"no native code, which gives the same pixels in less time: {WHY_NOT}"
    return None


def _cache() -> dict[str, str | int | bool]:
    num_bundles, num_bytes, is_writable = list_cache()
    return {
        "folder": str(cache_folder()),
        "num_bundles": num_bundles,
        "num_bytes": num_bytes,
        "writable": is_writable,
    }
