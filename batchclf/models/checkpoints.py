"""Weights files that trainers leave: read as tensors only, without the wrappers around them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from batchclf.errors import ModelError

SAFE_TORCH = (2, 10)
"""Files could run code in spite of weights_only=True before (CVE-2025-32434, CVE-2026-24747)."""
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "model_ema")
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)
"""Names in torchvision's own DenseNet files, which its builders rename."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a weights file, without the wrappers that trainers put around it."""
    what = f"model.weights: {path}"
    if not path.is_file():
        raise ModelError(f"{what}: no such file")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            require_safe_torch(what)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{what}: holds more than tensors, which could run code when loaded, or is no "
            f"PyTorch file ({first_line(error)}); save `model.state_dict()`, or safetensors"
        ) from error
    except (RuntimeError, EOFError, SafetensorError, ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"{what}: damaged or not a weights file ({path.stat().st_size:,} bytes): "
            f"{first_line(error)}; download or save it again"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ModelError(f"{what}: holds a {type(loaded).__name__}, not a state dict")
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state:
        raise ModelError(f"{what}: holds no tensors")
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def require_safe_torch(what: str) -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        raise ModelError(
            f"{what}: torch {torch.__version__} may run code that is hidden in a file of tensors; "
            f"give a .safetensors file, or pip install 'torch>={SAFE_TORCH[0]}.{SAFE_TORCH[1]}'"
        )


def misfit(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> str:
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    resized = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", missing),
            ("unknown", foreign),
            ("of another shape", resized),
        )
        if keys
    ]
    return f"does not fit {name}: tensors {'; '.join(parts)}; is it a checkpoint of another model?"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
