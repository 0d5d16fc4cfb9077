"""torchvision's classification models: built with pretrained, own or random weights."""

import contextlib
import difflib
import http.client
import math
import os
import pickle
import re
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from batchclf.errors import ModelError, WeightsUnavailable
from batchclf.models.bundle import sha256_of
from batchclf.models.checkpoints import first_line, misfit, read_state, require_safe_torch
from batchclf.models.download import downloaded
from batchclf.models.export import BuiltModel, count_outputs
from batchclf.results.records import Interpolation, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""As torchvision names its files: the beginning of their SHA-256."""
_FEEDS_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""Models whose pretrained weights expect `transform_input=True` (torchvision's builders set it)."""
_VIT_POSITIONS = "encoder.pos_embedding"
"""Of shape (1, 1 + patches, width): tells for which image size a ViT was trained."""


def build(spec: ModelSpec, log: Callable[[str], None] = lambda text: None) -> BuiltModel:
    """Build a torchvision classification model with pretrained, own or random weights.

    `log` is told of a download.

    Raises:
        ModelError: unknown model or weights, or a file that does not fit the model.
        WeightsUnavailable: the download failed.
    """
    name, num_classes = _known_name(spec), spec.num_classes
    enum = zoo.get_model_weights(name)
    if spec.weights_path is not None:
        state = read_state(spec.weights_path)
        options = _own_normalisation(spec, default=True)
        module = _build_from_state(name, state, spec.weights_path, num_classes, options)
        labels = None
        member = _reference_weights(enum, module)
    elif spec.weights == "none":
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same random model on every machine
            module = _bare(name, num_classes or 1000, **_own_normalisation(spec, default=False))
        labels = None
        member = _reference_weights(enum, module)
    else:
        member = _weights_member(name, enum, spec.weights)
        if num_classes is not None and num_classes != len(member.meta["categories"]):
            raise ModelError(
                f"model.num_classes: found {num_classes}, but {member} has "
                f"{len(member.meta['categories'])}; it goes with weights from a file, or none"
            )
        module = _build_pretrained(name, member, log)
        labels = tuple(member.meta["categories"])
    module = module.eval().float()
    preprocess = _preprocess(member, spec.preprocess)
    if labels is None:
        labels = tuple(str(index) for index in range(count_outputs(module, preprocess, name)))
    return BuiltModel(module, preprocess, labels)


def check(spec: ModelSpec) -> None:
    """Refuse an unknown model or weights name, or a weights file that does not read.

    Raises:
        ModelError: with the nearest names.
    """
    name = _known_name(spec)
    if spec.weights_path is not None:
        read_state(spec.weights_path)
    elif spec.weights != "none":
        _weights_member(name, zoo.get_model_weights(name), spec.weights)


def _known_name(spec: ModelSpec) -> str:
    name, names = spec.name, zoo.list_models(module=zoo)
    assert name is not None
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
        raise ModelError(f"model.name: torchvision has no classification model {name!r}; {hint}")
    return name


def _own_normalisation(spec: ModelSpec, *, default: bool) -> dict[str, object]:
    """The option of the models that may normalise their input once more.

    Raises:
        ModelError: the job gives it to another model.
    """
    given = spec.transform_input
    if spec.name in _FEEDS_OWN_NORMALISATION:
        return {"transform_input": default if given is None else given}
    if given is not None:
        raise ModelError(
            f"model.transform_input: found {given}, but {spec.name} has no such option; "
            f"{' and '.join(_FEEDS_OWN_NORMALISATION)} have"
        )
    return {}


def _bare(name: str, num_classes: int, **options: object) -> nn.Module:
    if name in _FEEDS_OWN_NORMALISATION:
        options = {"aux_logits": False, "init_weights": True} | options
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    return module


def _build_pretrained(name: str, member: zoo.WeightsEnum, log: Callable[[str], None]) -> nn.Module:
    require_safe_torch(f"weights {member}")
    path = Path(torch.hub.get_dir(), "checkpoints", Path(member.url).name)
    try:
        with _tensors_only():
            if path.exists():
                _require_hash(path, path.name)
            else:
                _download(member.url, path, log)
            module: nn.Module = zoo.get_model(name, weights=member)
        return module
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        http.client.HTTPException,
    ) as error:
        if isinstance(error, urllib.error.HTTPError | urllib.error.URLError | TimeoutError):
            what = f"cannot be downloaded: {error.reason if hasattr(error, 'reason') else error}"
        elif "invalid hash value" in str(error):
            what = "were damaged in the download (wrong hash); a proxy may have answered instead"
        elif isinstance(error, http.client.HTTPException):
            what = f"cannot be downloaded: {type(error).__name__}: {first_line(error)}"
        else:
            what = f"cannot be loaded: {first_line(error)}"
        raise WeightsUnavailable(
            f"weights {member} {what}\n"
            f"  from: {member.url}\n"
            f"  to:   {path}\n"
            "  Check the network and the proxy, or put the file there by hand (delete a damaged "
            "one first), or name a file of your own in model.weights."
        ) from error


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """torchvision's builders leave torch.hub its default, which is to run the code in a file."""
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def _download(url: str, path: Path, log: Callable[[str], None]) -> None:
    """Put weights where torch.hub looks for them, whose own download may wait for ever."""
    log(f"downloading {url}")
    with downloaded(url, path.parent) as partial:
        _require_hash(partial, path.name)
        os.replace(partial, path)


def _require_hash(path: Path, name: str) -> None:
    """torch.hub takes a file that is there as it is."""
    expected = _HASH_IN_NAME.search(name)
    if expected and not sha256_of(path).startswith(expected[1]):
        raise RuntimeError(f"invalid hash value of {path}")


def _weights_member(name: str, enum: Any, weights: str) -> zoo.WeightsEnum:
    wanted = weights.removeprefix(f"{enum.__name__}.")
    known = [member.name for member in enum]
    if wanted != "DEFAULT" and wanted not in known:
        near = difflib.get_close_matches(wanted.upper(), ["DEFAULT", *known], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(
            f"model.weights: {name} has no weights {weights!r}{hint} Known are DEFAULT, "
            f"{', '.join(known)}; or give a .pth or .safetensors file, or none"
        )
    member: zoo.WeightsEnum = enum[wanted]
    return member


def _reference_weights(enum: Any, module: nn.Module) -> zoo.WeightsEnum:
    """The weights whose transforms go with a module of own or random weights.

    IMAGENET1K_V1, or the model's first; for a ViT, whose image size is fixed, among those of its
    size if there are any.
    """
    size = getattr(module, "image_size", None)
    fitting = [member for member in enum if member.transforms().crop_size[0] == size]
    members = {member.name: member for member in fitting or enum}
    found: zoo.WeightsEnum = members.get("IMAGENET1K_V1", next(iter(members.values())))
    return found


def _build_from_state(
    name: str,
    state: Mapping[str, Tensor],
    path: Path,
    num_classes: int | None,
    options: dict[str, object],
) -> nn.Module:
    if name in _FEEDS_OWN_NORMALISATION:
        has_aux = any(key.lower().startswith("aux") for key in state)
        options |= {"aux_logits": has_aux}
    positions = state.get(_VIT_POSITIONS)
    if name.startswith("vit_") and positions is not None and positions.ndim == 3:
        patch = int(name.rpartition("_")[2])
        options["image_size"] = patch * math.isqrt(positions.shape[1] - 1)  # less the class token
    inferred = _infer_num_classes(name, state, options)
    if inferred is not None and num_classes not in (None, inferred):
        raise ModelError(
            f"model.num_classes: found {num_classes}, but the head in {path} has {inferred} classes"
        )
    module = _bare(name, inferred or num_classes or 1000, **options)
    versioned = OrderedDict(state)
    # MNASNet refuses a state dict of no version, and a file may not carry one.
    metadata = {"": {"version": module._version}}  # noqa: SLF001
    versioned._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001
    try:
        module.load_state_dict(versioned, strict=True)
    except RuntimeError as error:
        raise ModelError(f"model.weights: {path}: {misfit(name, module, state)}") from error
    return module


def _infer_num_classes(
    name: str, state: Mapping[str, Tensor], options: Mapping[str, object]
) -> int | None:
    """Classes of the head in `state`: the head is what changes shape with `num_classes`."""

    def shapes(count: int) -> dict[str, torch.Size]:
        own = _bare(name, count, **options).state_dict()
        return {key: value.shape for key, value in own.items()}

    try:
        with torch.device("meta"):
            one, other = shapes(1000), shapes(1001)
    except NotImplementedError:  # RegNet computes its widths with tensors
        one, other = shapes(1000), shapes(1001)
    for key, shape in one.items():
        if shape != other[key] and key in state and state[key].ndim:
            return int(state[key].shape[0])
    return None


def _preprocess(member: zoo.WeightsEnum, overrides: PreprocessSpec | None) -> Preprocess:
    """The transforms of `member`, with the user's parts in place of theirs."""
    preset = member.transforms()
    given = overrides or PreprocessSpec()
    crop = given.crop or preset.crop_size[0]
    interpolation: Interpolation = given.interpolation or preset.interpolation.value
    return Preprocess(
        resize=given.resize or preset.resize_size[0],
        crop=(crop, crop) if isinstance(crop, int) else crop,
        interpolation=interpolation,
        mean=given.mean or tuple(preset.mean),
        std=given.std or tuple(preset.std),
        channels=given.channels or "rgb",
    )
