"""Intel hardware: how the OpenVINO execution provider is set up.

Settings go through `load_config`, a JSON text of OpenVINO properties per device; the provider's
own options for them are deprecated since ONNX Runtime 1.23. Property names are OpenVINO's:
https://docs.openvino.ai/2025/openvino-workflow/running-inference/optimize-inference.html
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from batchclf.errors import ProviderError, UsageError
from batchclf.results.records import Precision

DEFAULT_DEVICE = "CPU"
_DEVICE = r"(CPU|(GPU|NPU)(\.\d+)*)"
_DEVICE_TYPE = re.compile(rf"{_DEVICE}|(AUTO|MULTI|HETERO):{_DEVICE}(, *{_DEVICE})*")
_HINTS: Mapping[Precision, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
"""INFERENCE_PRECISION_HINT for what is not quantised; left out, a Xeon would choose bf16 and a GPU
f16 by themselves."""
_OWN_KEYS = {"device_type": "provider.device_type", "precision": "precision"}
"""Provider options that a key of the job file stands for."""
_DEPRECATED = {
    "num_streams": "NUM_STREAMS",
    "num_of_threads": "INFERENCE_NUM_THREADS",
    "cache_dir": "CACHE_DIR",
}
"""Options of the provider and the property that each sets: the user's comes before our default."""
_CPU_FLAGS: Mapping[Precision, tuple[tuple[str, ...], str]] = {
    "bf16": (("avx512bw", "amx_bf16", "avx_ne_convert"), "AVX-512, AMX or AVX-NE-CONVERT"),
    "fp16": (
        ("avx512_fp16", "amx_fp16", "avx_ne_convert"),
        "AVX-512 FP16, AMX FP16 or AVX-NE-CONVERT",
    ),
}
"""Any of these CPU flags lets OpenVINO's CPU plugin compute in a precision; without, it goes on in
fp32 and says nothing."""


def device_names(device_type: str) -> list[str]:
    """The devices in a `device_type`: GPU.1 is one, AUTO:GPU,CPU names two."""
    _, colon, listed = device_type.partition(":")
    return [name.strip() for name in listed.split(",")] if colon else [device_type]


def require_fitting(device_type: str, user: Mapping[str, str]) -> None:
    """Refuse a device that is none, and options that do not fit it.

    Raises:
        ProviderError: a `device_type` that the provider would accept, then run nothing on or pass
            over in a list.
        UsageError: an option that a key of the job file stands for, or a `load_config` that does
            not fit.
    """
    if not _DEVICE_TYPE.fullmatch(device_type):
        raise ProviderError(
            f"provider openvino: device_type {device_type} is none of OpenVINO's; give CPU, GPU, "
            "GPU.1, NPU, or AUTO, MULTI or HETERO with a list, such as AUTO:GPU,CPU"
        )
    for option, key in _OWN_KEYS.items():
        if option in user:
            raise UsageError(f"provider.options.{option}: found {user[option]}; use {key} for it")
    _user_config(user.get("load_config"), device_names(device_type))


def provider_options(
    device_type: str,
    precision: Precision,
    user: Mapping[str, str],
    *,
    streams: int,
    threads: int,
    cache: Path | None,
) -> dict[str, str]:
    """Options for `device_type`: ours, with the user's in their place.

    Args:
        streams: calls to `run` that will be in flight at once.
        threads: CPU threads for all of them together.
        cache: folder for compiled models; used where compiling takes long, so not by a CPU.

    Raises:
        ProviderError, UsageError: as `require_fitting`.
    """
    require_fitting(device_type, user)
    taken = {prop for option, prop in _DEPRECATED.items() if option in user}
    config: dict[str, dict[str, Any]] = {}
    for name in device_names(device_type):
        ours = {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
        if ":" not in device_type:  # AUTO, MULTI and HETERO choose the streams by themselves
            # Without it the provider sets one stream, whatever the hints say.
            ours["NUM_STREAMS"] = str(streams)
        if name == "CPU":
            ours["INFERENCE_NUM_THREADS"] = str(threads)
        elif cache is not None:
            ours["CACHE_DIR"] = str(cache)
        config[name] = {key: value for key, value in ours.items() if key not in taken}
    for name, properties in _user_config(user.get("load_config"), config).items():
        config[name] |= properties
    return {**user, "device_type": device_type, "load_config": json.dumps(config)}


def options_of_one(device: str, user: Mapping[str, str]) -> dict[str, str]:
    """The user's options for one device of several: only its own part of `load_config`."""
    if "load_config" not in user:
        return dict(user)
    config = json.loads(user["load_config"])
    return {**user, "load_config": json.dumps({device: config.get(device, {})})}


def _user_config(text: str | None, devices: Collection[str]) -> dict[str, dict[str, Any]]:
    if text is None:
        return {}
    what = "provider.options.load_config"
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{what}: not JSON: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(one, dict) for one in config.values()):
        raise UsageError(
            f'{what}: found {text}; allowed: JSON such as {{"CPU": {{"NUM_STREAMS": "4"}}}}'
        )
    if foreign := [name for name in config if name not in devices]:
        raise UsageError(
            f"{what}: found settings for {', '.join(foreign)}; the job's device_type is "
            f"{', '.join(devices)}, so nobody would read them"
        )
    if any("INFERENCE_PRECISION_HINT" in properties for properties in config.values()):
        raise UsageError(f"{what}: found INFERENCE_PRECISION_HINT; use precision for it")
    return config


def require_cpu_precision(
    device_type: str, precision: Precision, cpu_flags: frozenset[str]
) -> None:
    """Refuse a precision that this CPU would silently compute in fp32.

    Raises:
        ProviderError: naming the instructions that are missing.
    """
    if device_type != "CPU" or precision not in _CPU_FLAGS:
        return
    flags, what = _CPU_FLAGS[precision]
    if cpu_flags.isdisjoint(flags):
        raise ProviderError(
            f"provider openvino: precision {precision} needs a CPU with {what}; this one has "
            "none, so OpenVINO would compute in fp32 and say nothing. Use precision fp32 or int8"
        )
