"""timm's classification models: built with pretrained, own or random weights."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from safetensors import SafetensorError
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_data_config,
)
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.checkpoints import first_line, read_checkpoint, require_safe_torch
from batchclf.models.export import BuiltModel, count_outputs
from batchclf.models.matching import network_of
from batchclf.models.states import Found, find_state
from batchclf.models.zoo import fetch
from batchclf.results.records import Interpolation, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

Log = Callable[[str], None]

_PREFIX = "timm/"
_LARGEST_EMBEDDING = 1280
"""CLIP's image towers give an embedding of 384 to 1,280 numbers, and timm calls these classes."""
_SERVED_STEPS = ("Resize", "CenterCrop", "MaybeToTensor", "Normalize")
"""Of timm's transforms: torchvision's own, so of the same pixels."""
_EXPORTABLE = True
"""Without the fused attention, which ONNX has not for tensors of 5 dimensions (Hiera's)."""
_SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""What timm prefers to each file, where a repository has it (timm.models._hub)."""


def build(spec: ModelSpec, log: Log = lambda text: None) -> BuiltModel:
    """Build a timm classification model with pretrained, own or random weights.

    `log` is told of a download.

    Raises:
        ModelError: unknown model or weights, a file that does not fit the model, or preprocessing
            that is more than resizing, a centre crop and a normalisation.
        WeightsUnavailable: the download failed.
    """
    name = _known_name(spec)
    config = _config(name)
    options = _size_option(spec, config)
    labels: tuple[str, ...] = ()
    if spec.weights_path is not None:
        found = _find_weights(spec, spec.weights_path, log)
        with _building(name, options):
            module = _bare(name, found.num_classes, options)
        found.fill(module)
    elif spec.weights == "none":
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same random model on every machine
            with _building(name, options):
                module = _bare(name, _num_random(spec, config), options)
    else:
        _require_classes(name, spec, config)
        module = _build_pretrained(name, config, options, log)
        labels = _labels(config)
    module = module.eval().float()
    pretrained_cfg: Any = module.pretrained_cfg
    preprocess = _preprocess(name, pretrained_cfg, spec.preprocess)
    num_outputs = count_outputs(module, preprocess, f"{_PREFIX}{name}")
    if len(labels) != num_outputs:
        labels = tuple(str(index) for index in range(num_outputs))
    return BuiltModel(module, preprocess, labels)


def check(spec: ModelSpec) -> None:
    """Refuse what `build` would refuse, as far as it can be told without building or downloading.

    Raises:
        ModelError: unknown model or weights, a file that does not fit the model, preprocessing that
            is not served, or one output and no word of what it means.
    """
    name = _known_name(spec)
    config = _config(name)
    if spec.weights_path is not None:
        num_classes = _find_weights(spec, spec.weights_path, lambda text: None).num_classes
    elif spec.weights == "none":
        num_classes = _num_random(spec, config)
    else:
        _require_classes(name, spec, config)
        num_classes = config.num_classes
    settled(spec.activation, num_classes, f"model.name: {spec.name}")
    _preprocess(name, config.to_dict(), spec.preprocess)


# ---- names ---------------------------------------------------------------------------------------


def _known_name(spec: ModelSpec) -> str:
    """The model's name in timm: the architecture, and `.tag` where the job names the weights."""
    assert spec.name is not None
    name = spec.name.removeprefix(_PREFIX)
    if ":" in name:
        raise _not_by_source(spec.name, *name.split(":", 1))
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(_PREFIX + one for one in near)}? " if near else ""
        raise ModelError(
            f"model.name: timm {timm.__version__} has no model {architecture!r}; {hint}"
            "timm.list_models() has them all"
        )
    if spec.transform_input is not None:
        raise ModelError(
            f"model.transform_input: found {spec.transform_input}, but timm's {architecture} has "
            "no such option"
        )
    if spec.weights_path is None and spec.weights not in ("DEFAULT", "none"):
        if tag and tag != spec.weights:
            raise ModelError(
                f"model.weights: found {spec.weights!r}, but model.name says {tag!r}; give one"
            )
        tag = spec.weights
    tags = _tags(architecture)
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(
            f"model.{'name' if '.' in name else 'weights'}: timm's {architecture} has no weights "
            f"{tag!r}{hint} Known are {', '.join(tags) or 'none'}; or give a file, or none"
        )
    return f"{architecture}.{tag}" if tag else architecture


def _not_by_source(name: str, source: str, place: str) -> ModelError:
    """The error for what timm itself would take: `hf-hub:OWNER/NAME`, `local-dir:FOLDER`."""
    said = f"model.name: found {name}, but timm's models are served by architecture"
    if source == "hf-hub" and place.startswith(_PREFIX):
        return ModelError(f"{said}; this one is timm's own: give {place}")
    first = f"run `hf download {place}`, then give" if source == "hf-hub" else "give"
    return ModelError(
        f"{said}; {first} name: {_PREFIX}ARCHITECTURE (`architecture` in its config.json), "
        f"{fetch.PARTS_OF_TIMM}"
    )


def _config(name: str) -> Any:
    """What timm knows of a model's weights: those of its tag, or its first ones."""
    return get_pretrained_cfg(name) or PretrainedCfg()


def _num_random(spec: ModelSpec, config: Any) -> int:
    """The classes of a model of random weights."""
    return int(spec.num_classes or config.num_classes or 1000)


def _tags(architecture: str) -> list[str]:
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    return [str(name).partition(".")[2] for name in names]


def _require_classes(name: str, spec: ModelSpec, config: Any) -> None:
    """Refuse what timm has no weights for, and weights whose outputs are no classes."""
    num_classes = config.num_classes
    what = f"model.weights: timm's weights for {name}"
    if not (config.hf_hub_id or config.url):
        known = _tags(name.partition(".")[0])
        hint = f"give {' or '.join(known[:3])}, " if known else "give "
        raise ModelError(f"{what}: there are none; {hint}a file, or none")
    if not num_classes:
        raise ModelError(
            f"{what}: have no classes, only features; give a file with a head of your own"
        )
    has_names = config.label_names is not None or infer_imagenet_subset(config.to_dict())
    says_so = spec.num_classes is not None or spec.labels is not None
    if num_classes <= _LARGEST_EMBEDDING and not has_names and not says_so:
        raise ModelError(
            f"{what}: give {num_classes} numbers without names, probably an embedding (CLIP) and "
            "no classes; if they are classes, name them in model.labels"
        )
    if spec.num_classes not in (None, num_classes):
        raise ModelError(
            f"model.num_classes: found {spec.num_classes}, but {name} has {num_classes}; "
            "it goes with weights from a file, or none"
        )


def _labels(config: Any) -> tuple[str, ...]:
    """timm's own names of the classes of its weights; empty where it has none."""
    if config.label_names is not None:
        described = config.label_descriptions or {}
        return tuple(str(described.get(name, name)) for name in config.label_names)
    subset = infer_imagenet_subset(config.to_dict())
    return () if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


# ---- weights -------------------------------------------------------------------------------------


def _size_option(spec: ModelSpec, config: Any) -> dict[str, object]:
    """The image size to build for, where the job gives one to a model that has it built in."""
    crop = spec.preprocess.crop_size if spec.preprocess is not None else None
    return {"img_size": crop} if crop is not None and config.fixed_input_size else {}


@contextmanager
def _building(name: str, options: Mapping[str, object]) -> Iterator[None]:
    """Say which model, with which options, timm does not build."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        given = ", ".join(f"{key} {value}" for key, value in options.items())
        raise ModelError(
            f"model.name: timm cannot build {name}{' with ' + given if given else ''}: "
            f"{first_line(error)}"
        ) from error


def _bare(name: str, num_classes: int, options: Mapping[str, object]) -> nn.Module:
    module: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, exportable=_EXPORTABLE, **options
    )
    return module


def _find_weights(spec: ModelSpec, path: Path, log: Log) -> Found:
    """The model's tensors in a file."""
    name = _known_name(spec)
    config = get_pretrained_cfg(name)
    options = _size_option(spec, config)
    loaded = read_checkpoint(path)
    with _building(name, options):
        network = network_of(name, lambda count: _bare(name, count, options))
    try:
        found = find_state(loaded, network, path, log)
    except ModelError as error:
        if config.fixed_input_size and "of another shape" in str(error):
            raise ModelError(
                f"{error} If it was trained with images of another size, give model.preprocess.crop"
            ) from error
        raise
    found.require_num_classes(spec.num_classes, path)
    return found


def _build_pretrained(name: str, config: Any, options: Mapping[str, object], log: Log) -> nn.Module:
    """Build with timm's own weights, downloaded first: its own download may wait for ever."""
    require_safe_torch(f"weights {_PREFIX}{name}")
    if config.hf_hub_id:
        wanted = config.hf_hub_filename or "pytorch_model.bin"
        safe = _SAFE_NAMES.get(wanted, f"{wanted.removesuffix('.bin')}.safetensors")
        files = (safe, wanted) if wanted.endswith(".bin") else (wanted,)
        url, path = f"hub: {config.hf_hub_id}", fetch.file_from_hub(config.hf_hub_id, files, log)
        needs_loader = config.hf_hub_filename is not None and config.custom_load == "hf"
    else:
        url, path = config.url, fetch.path_of(config.url)
        needs_loader = bool(config.custom_load)
    try:
        with fetch.tensors_only():
            if not config.hf_hub_id:
                fetch.from_url(url, log)
            source = {"file": str(path), "custom_load": needs_loader}
            module: nn.Module = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay=source,
                exportable=_EXPORTABLE,
                **options,
            )
    except (*fetch.LOADING_ERRORS, SafetensorError, KeyError, ValueError) as error:
        raise fetch.unavailable(error, f"{_PREFIX}{name}", url, path) from error
    return module


# ---- preprocessing -------------------------------------------------------------------------------


def _preprocess(
    name: str, pretrained_cfg: Mapping[str, Any], overrides: PreprocessSpec | None
) -> Preprocess:
    """The steps of timm's own transforms for evaluation, with the user's parts in their place.

    As with timm's `--img-size`, a crop that the user gives changes the resize with it.
    """
    given = overrides or PreprocessSpec()
    own_crop = given.crop_size
    arguments = {"input_size": (3, *own_crop)} if own_crop is not None else None
    config = resolve_data_config(arguments, pretrained_cfg=pretrained_cfg)
    if config["input_size"][0] != 3:
        raise ModelError(
            f"model.name: {_PREFIX}{name} takes images of {config['input_size'][0]} channels; "
            "only models of 3 are served"
        )
    steps = {type(step).__name__: step for step in create_transform(**config).transforms}
    foreign = [kind for kind in steps if kind not in _SERVED_STEPS]
    if foreign and (given.resize is None or own_crop is None):
        raise ModelError(
            f"model.name: timm prepares images for {name} with {', '.join(foreign)} (crop_mode: "
            f"{config['crop_mode']}, input_size: {config['input_size']}), which is not served; "
            "to have them resized and cropped instead, give model.preprocess.resize and crop"
        )
    interpolation = given.interpolation or config["interpolation"]
    if interpolation not in get_args(Interpolation):
        raise ModelError(
            f"model.name: timm resizes images for {name} with {interpolation}, which is not "
            f"served; give model.preprocess.interpolation: {', '.join(get_args(Interpolation))}"
        )
    return Preprocess(
        resize=given.resize or _as_resize(steps["Resize"].size),
        crop=own_crop or tuple(config["input_size"][1:]),
        interpolation=interpolation,
        mean=given.mean or tuple(config["mean"]),
        std=given.std or tuple(config["std"]),
        channels=given.channels or "rgb",
    )


def _as_resize(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    height, width = size
    return int(height), int(width)
