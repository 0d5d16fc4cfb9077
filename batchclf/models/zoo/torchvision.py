"""torchvision's classification models: built with pretrained, own or random weights."""

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as zoo

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.bundle import sha256_of
from batchclf.models.checkpoints import read_checkpoint, require_safe_torch
from batchclf.models.export import BuiltModel, count_outputs
from batchclf.models.matching import network_of, tensors_named
from batchclf.models.states import Found, find_state
from batchclf.models.zoo import fetch
from batchclf.results.records import Interpolation, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

_FEEDS_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""Models whose pretrained weights expect `transform_input=True` (torchvision's builders set it)."""
_TRAINING_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Of the same models; not computed at inference, and often left at another number of classes."""
_VIT_POSITIONS = "encoder.pos_embedding"
"""Of shape (1, 1 + patches, width): tells for which image size a ViT was trained."""


def build(spec: ModelSpec, log: Callable[[str], None] = lambda text: None) -> BuiltModel:
    """Build a torchvision classification model with pretrained, own or random weights.

    `log` is told of a download, and of what was taken from a file.

    Raises:
        ModelError: unknown model or weights, or a file that does not fit the model.
        WeightsUnavailable: the download failed.
    """
    name = _known_name(spec)
    enum = zoo.get_model_weights(name)
    normalisation: Mapping[str, list[float]] = {}
    if spec.weights_path is not None:
        found, options = _find_weights(spec, spec.weights_path, log)
        module = _bare(name, found.num_classes, **options)
        found.fill(module)
        normalisation = found.normalisation
        labels = None
        member = _reference_weights(enum, module)
    elif spec.weights == "none":
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same random model on every machine
            module = _bare(name, _num_random(spec), **_own_normalisation(spec, default=False))
        labels = None
        member = _reference_weights(enum, module)
    else:
        member = _pretrained(spec, enum)
        module = _build_pretrained(name, member, log)
        labels = tuple(member.meta["categories"])
    module = module.eval().float()
    preprocess = _preprocess(member, spec.preprocess)
    _require_same_normalisation(normalisation, preprocess, spec)
    if labels is None:
        labels = tuple(str(index) for index in range(count_outputs(module, preprocess, name)))
    return BuiltModel(module, preprocess, labels)


def check(spec: ModelSpec) -> None:
    """Refuse an unknown model or weights name, or a weights file that does not fit.

    Raises:
        ModelError: with the nearest names, or with what does not fit.
    """
    name = _known_name(spec)
    if spec.weights_path is not None:
        found, _ = _find_weights(spec, spec.weights_path, lambda text: None)
        settled(spec.activation, found.num_classes, f"model.name: {name}")
    elif spec.weights == "none":
        settled(spec.activation, _num_random(spec), f"model.name: {name}")
    else:
        _pretrained(spec, zoo.get_model_weights(name))


def _known_name(spec: ModelSpec) -> str:
    name, names = spec.name, zoo.list_models(module=zoo)
    assert name is not None
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
        raise ModelError(f"model.name: torchvision has no classification model {name!r}; {hint}")
    if spec.transform_input is not None and name not in _FEEDS_OWN_NORMALISATION:
        raise ModelError(
            f"model.transform_input: found {spec.transform_input}, but {name} has no such option; "
            f"{' and '.join(_FEEDS_OWN_NORMALISATION)} have"
        )
    return name


def _own_normalisation(spec: ModelSpec, *, default: bool) -> dict[str, object]:
    """The option of the models that may normalise their input once more."""
    if spec.name not in _FEEDS_OWN_NORMALISATION:
        return {}
    given = spec.transform_input
    return {"transform_input": default if given is None else given}


def _num_random(spec: ModelSpec) -> int:
    """The classes of a model of random weights."""
    return spec.num_classes or 1000


def _bare(name: str, num_classes: int, **options: object) -> nn.Module:
    if name in _FEEDS_OWN_NORMALISATION:
        options = {"aux_logits": False, "init_weights": True} | options
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    return module


def _build_pretrained(name: str, member: zoo.WeightsEnum, log: Callable[[str], None]) -> nn.Module:
    require_safe_torch(f"weights {member}")
    try:
        with fetch.tensors_only():
            fetch.from_url(member.url, log)
            module: nn.Module = zoo.get_model(name, weights=member)
        return module
    except fetch.LOADING_ERRORS as error:
        path = fetch.path_of(member.url)
        raise fetch.unavailable(error, str(member), member.url, path) from error


def _pretrained(spec: ModelSpec, enum: Any) -> zoo.WeightsEnum:
    """torchvision's own weights that the job names.

    Raises:
        ModelError: there are no such weights, or the job says of them what they are not.
    """
    assert spec.name is not None
    member = _weights_member(spec.name, enum, spec.weights)
    own = len(member.meta["categories"])
    if spec.num_classes not in (None, own):
        raise ModelError(
            f"model.num_classes: found {spec.num_classes}, but {member} has {own}; it goes with "
            "weights from a file, or none"
        )
    if spec.transform_input is False:
        raise ModelError(
            f"model.transform_input: found False, but {member} was trained with True; leave it "
            "out: False goes with weights from a file, or none"
        )
    return member


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


def _find_weights(
    spec: ModelSpec, path: Path, log: Callable[[str], None]
) -> tuple[Found, dict[str, object]]:
    """The model's tensors in a file, and the options it has to be built with."""
    name = _known_name(spec)
    loaded = read_checkpoint(path)
    options = _own_normalisation(spec, default=True)
    if options:
        options |= {"init_weights": False}  # every tensor comes from the file
        if spec.transform_input is None and not _is_torchvisions_own(name, path):
            log(
                f"{path}: whether {name} was trained with transform_input is not in the file; "
                "taken is true, which fits weights fine-tuned from torchvision's own. If they "
                "were trained from scratch, write `transform_input: false` under model"
            )
    for positions in tensors_named(loaded, _VIT_POSITIONS) if name.startswith("vit_") else ():
        if positions.ndim == 3:
            patch = int(name.rpartition("_")[2])
            options["image_size"] = patch * math.isqrt(positions.shape[1] - 1)  # less class token
    network = network_of(name, lambda count: _bare(name, count, **options), _TRAINING_HEADS)
    found = find_state(loaded, network, path, log)
    found.require_num_classes(spec.num_classes, path)
    return found, options


def _is_torchvisions_own(name: str, path: Path) -> bool:
    """Whether a file, whatever its name, is one that torchvision publishes."""
    urls = [member.url for member in zoo.get_model_weights(name)]
    digest = sha256_of(path)
    return any(digest.startswith(one) for url in urls if (one := fetch.hash_in(url)) is not None)


def _require_same_normalisation(
    own: Mapping[str, list[float]], preprocess: Preprocess, spec: ModelSpec
) -> None:
    """A network with `mean` and `std` of its own does what is done before this one.

    Raises:
        ModelError: they are others than those in force, and the job does not say which hold.
    """
    given = spec.preprocess or PreprocessSpec()
    for key, values in own.items():
        in_force = getattr(preprocess, key)
        is_same = all(
            math.isclose(a, b, abs_tol=1e-3) for a, b in zip(values, in_force, strict=True)
        )
        if not is_same and getattr(given, key) is None:
            raise ModelError(
                f"model.weights: {spec.weights_path}: its network normalises the pixels itself, "
                f"with {key} {[round(value, 6) for value in values]}, and not {list(in_force)}; "
                f"write model.preprocess.{key}, of pixels in 0..1"
            )


def _preprocess(member: zoo.WeightsEnum, overrides: PreprocessSpec | None) -> Preprocess:
    """The transforms of `member`, with the user's parts in place of theirs."""
    preset = member.transforms()
    given = overrides or PreprocessSpec()
    interpolation: Interpolation = given.interpolation or preset.interpolation.value
    return Preprocess(
        resize=given.resize or preset.resize_size[0],
        crop=given.crop_size or (preset.crop_size[0], preset.crop_size[0]),
        interpolation=interpolation,
        mean=given.mean or tuple(preset.mean),
        std=given.std or tuple(preset.std),
        channels=given.channels or "rgb",
    )
