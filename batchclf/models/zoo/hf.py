"""Image classifiers of Hugging Face's transformers, as its `save_pretrained` wrote them.

No code but that of transformers itself is run, whatever a folder or a repository holds.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.checkpoints import first_line, require_safe_torch
from batchclf.models.export import BuiltModel, count_outputs
from batchclf.models.zoo import fetch
from batchclf.models.zoo.hf_processor import read_preprocess
from batchclf.results.records import Activation
from batchclf.spec.job import ModelSpec

Log = Callable[[str], None]

_CONFIG = "config.json"
_SETTINGS = (_CONFIG, "preprocessor_config.json", "processor_config.json")
_SAFE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_UNSERVED = {
    "quantization_config": "save the model without quantisation; batchclf quantises by precision",
    "adapter_config": "merge the adapter (`model.merge_and_unload()`) and save the model",
}
_MALFORMED = (
    *(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError),
    *(EOFError, pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
"""What transformers raises on a configuration or weights that it cannot use."""
_ACTIVATIONS: Mapping[str | None, Activation] = {
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
"""By `problem_type`, as transformers' image-classification pipeline applies them."""


class Logits(nn.Module):
    """A classifier of transformers as a plain function: pixels NCHW to logits NK."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.model(pixel_values=pixels_NCHW, return_dict=True).logits
        return logits_NK


def build(spec: ModelSpec, log: Log = lambda text: None) -> BuiltModel:
    """Build an image classifier of transformers from a folder, or from the hub.

    `log` is told of a download.

    Raises:
        ModelError: no such folder or repository, one that does not hold an image classifier, or
            preprocessing that is more than resizing, a centre crop and an affine normalisation.
        WeightsUnavailable: the download failed.
    """
    _refuse_foreign_keys(spec)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = spec.folder if spec.folder is not None else _downloaded(spec, log)
    config = _read_config(folder)
    labels = _labels(folder, config, spec)
    model = _random(config) if spec.weights == "none" else _load(folder, config)
    module = Logits(model).eval().float()
    preprocess = read_preprocess(folder, spec.preprocess)
    num_outputs = count_outputs(module, preprocess, str(spec.name))
    if num_outputs != len(labels):
        raise ModelError(
            f"model.name: {folder / _CONFIG}: id2label names {len(labels)} classes, but the model "
            f"gives {num_outputs} numbers per image"
        )
    return BuiltModel(module, preprocess, labels, _activation(config))


def check(spec: ModelSpec) -> None:
    """Refuse a folder that holds no image classifier; what is on the hub is not asked for.

    Raises:
        ModelError: with what is missing.
    """
    _refuse_foreign_keys(spec)
    if spec.folder is not None:
        config = _read_config(spec.folder)
        labels = _labels(spec.folder, config, spec)
        settled(spec.activation, len(labels), f"model.name: {spec.name}", own=_activation(config))
        if spec.weights != "none":
            _weights_files(spec.folder)


def _refuse_foreign_keys(spec: ModelSpec) -> None:
    if spec.weights not in ("DEFAULT", "none"):
        raise ModelError(
            f"model.weights: found {spec.weights}, but those of {spec.name} lie in its folder: "
            "DEFAULT, or none"
        )
    if spec.transform_input is not None:
        raise ModelError(
            f"model.transform_input: found {spec.transform_input}, but {spec.name} has no such "
            "option"
        )


def _downloaded(spec: ModelSpec, log: Log) -> Path:
    """The repository's files in the hub's own cache; pickled weights where it has no others."""
    assert spec.name is not None
    name = spec.name.partition("/")[2]
    folder = fetch.snapshot_from_hub(name, (*_SETTINGS, *_SAFE_WEIGHTS), log)
    if not _fitting(folder, _SAFE_WEIGHTS) and spec.weights != "none":
        folder = fetch.snapshot_from_hub(name, (*_SETTINGS, *_PICKLED_WEIGHTS), log)
    return folder


# ---- the configuration ---------------------------------------------------------------------------


def _read_config(folder: Path) -> Any:
    """The configuration of a model whose architecture is transformers' own.

    Raises:
        ModelError: there is none, or it asks for what is not served.
    """
    what = f"model.name: {folder / _CONFIG}"
    written = _read_json(folder / _CONFIG)
    model_type = written.get("model_type")
    if model_type is None and "architecture" in written:
        raise ModelError(
            f"{what}: written by timm, not by transformers; give name: "
            f"timm/{written['architecture']} and the folder's weights file in model.weights"
        )
    if (folder / "adapter_config.json").exists():
        written["adapter_config"] = "adapter_config.json"
    for key, advice in _UNSERVED.items():
        if key in written:
            raise ModelError(f"{what}: {key}: found {written[key]!s:.80}, not served; {advice}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _MALFORMED as error:
        own_code = "; its own code (auto_map) is not run" if "auto_map" in written else ""
        raise ModelError(
            f"{what}: transformers {transformers.__version__} cannot read it{own_code}: "
            f"{first_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        own_code = " without code of the model's own (auto_map)" if "auto_map" in written else ""
        raise ModelError(
            f"{what}: transformers {transformers.__version__} has no image classifier of "
            f"model_type {model_type!r}{own_code}; "
            f"architectures: {', '.join(written.get('architectures') or ['none'])}"
        )
    num_channels = getattr(config, "num_channels", 3)
    if num_channels != 3:
        raise ModelError(f"{what}: num_channels: found {num_channels}; only models of 3 are served")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.name: {path}: no such file; give the folder that `save_pretrained` wrote, or "
            "the name of a repository on the Hugging Face hub (owner/model)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model.name: {path}: cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"model.name: {path}: found a {type(found).__name__}, not a mapping")
    return found


def _activation(config: Any) -> Activation:
    return _ACTIVATIONS.get(config.problem_type, "softmax")


def _labels(folder: Path, config: Any, spec: ModelSpec) -> tuple[str, ...]:
    names = config.id2label
    if not names or set(names) != set(range(len(names))):
        raise ModelError(
            f"model.name: {folder / _CONFIG}: id2label: found the keys "
            f"{', '.join(str(key) for key in list(names)[:5])}; allowed: 0 to the number of "
            "classes less 1, each once"
        )
    if spec.num_classes not in (None, len(names)):
        raise ModelError(
            f"model.num_classes: found {spec.num_classes}, but {folder / _CONFIG} names "
            f"{len(names)} classes (id2label)"
        )
    return tuple(str(names[index]) for index in range(len(names)))


# ---- the weights ---------------------------------------------------------------------------------


def _fitting(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _weights_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors where there are any.

    Raises:
        ModelError: there are none, or they are pickled and torch may run code in them.
    """
    if found := _fitting(folder, _SAFE_WEIGHTS):
        return found
    if found := _fitting(folder, _PICKLED_WEIGHTS):
        require_safe_torch(f"model.name: {found[0]}")
        return found
    raise ModelError(
        f"model.name: {folder}: holds neither model.safetensors nor pytorch_model.bin; save the "
        "model with `model.save_pretrained(folder)`"
    )


def _random(config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same random model on every machine
        model: nn.Module = AutoModelForImageClassification.from_config(
            config, trust_remote_code=False, attn_implementation="eager"
        )
    return model


def _load(folder: Path, config: Any) -> nn.Module:
    is_safe = _weights_files(folder)[0].name.startswith("model")
    what = f"model.name: {folder}"
    try:
        with fetch.tensors_only():
            # Eager attention: another name might be that of code on the hub.
            model, info = AutoModelForImageClassification.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=is_safe,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except _MALFORMED as error:
        raise ModelError(f"{what}: its weights cannot be loaded: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{what}: {len(missing)} tensors of {type(model).__name__} are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), which would stay "
            "random; was the model trained as an image classifier?"
        )
    built: nn.Module = model
    return built
