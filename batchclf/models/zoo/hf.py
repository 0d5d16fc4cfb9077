"""Image classifiers of Hugging Face's transformers, as its `save_pretrained` wrote them.

No code but that of transformers itself is run, whatever a folder or a repository holds.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from batchclf.errors import ModelError
from batchclf.models.activation import settled
from batchclf.models.checkpoints import examples_of, first_line, require_safe_torch
from batchclf.models.export import BuiltModel, count_outputs
from batchclf.models.own_files import own_file, own_files, says
from batchclf.models.zoo import fetch
from batchclf.models.zoo.hf_processor import MALFORMED, read_preprocess
from batchclf.results.records import Activation, Preprocess
from batchclf.spec.job import ModelSpec
from batchclf.system.children import available_memory

Log = Callable[[str], None]

_CONFIG = "config.json"
_SETTINGS = (_CONFIG, "preprocessor_config.json", "processor_config.json")
_SAFE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_UNSERVED = {
    "quantization_config": "save the model without quantisation; batchclf quantises by precision",
    "transformers_weights": "call the file it names model.safetensors and take the key out",
    "adapter_config": "merge the adapter (`model.merge_and_unload()`) and save the model",
}
_LAYERS = re.compile(
    r"(^|_)(layers?|depths?|blocks?|stages?|repeats|convs|levels)$"
    r"|^(depth_coefficient|num_self_attends_per_block)$"
)
"""Keys that say how often something is built."""
_CLASSES = re.compile(r"^num_(labels|classes)$")
_MOST = ((_LAYERS, 1000), (_CLASSES, 1_000_000))
"""Beyond these no classifier was seen; transformers makes lists of so many names at once."""
_HARMLESS = re.compile(
    r"(^|\.)(pooler\.dense\.(weight|bias)|mask_token|position_ids|num_batches_tracked"
    r"|relative_position_index)$"
)
"""Tensors that a classifier may do without: of pretraining, of a backbone's other output (both are
left over where a classifier was made of them), and what a model computes itself."""
_ACTIVATIONS: Mapping[str | None, Activation] = {
    None: "softmax",
    "single_label_classification": "softmax",
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


@dataclass(frozen=True, slots=True)
class _Read:
    """What the files beside the weights say."""

    config: Any
    labels: tuple[str, ...]
    activation: Activation
    preprocess: Preprocess


def build(spec: ModelSpec, log: Log = lambda text: None) -> BuiltModel:
    """Build an image classifier of transformers from a folder, or from the hub.

    `log` is told of a download.

    Raises:
        ModelError: no such folder or repository, one that does not hold an image classifier, or
            preprocessing that is more than resizing, a centre crop and an affine normalisation.
        WeightsUnavailable: the download failed.
    """
    _refuse_foreign_keys(spec)
    folder = spec.folder if spec.folder is not None else _downloaded(spec, log)
    own_files(folder, _SETTINGS)
    read = _read(spec, folder, log)
    with _refusing(f"model.name: {folder}: the model cannot be built as {_CONFIG} says"):
        _require_room(read.config)
        is_random = spec.weights == "none"
        model = _random(read.config) if is_random else _load(folder, read.config, log)
        module = Logits(model).eval().float()
        num_outputs = count_outputs(module, read.preprocess, f"model.name: {folder}")
    if num_outputs != len(read.labels):
        raise ModelError(
            f"model.name: {folder / _CONFIG}: id2label names {len(read.labels)} classes, but the "
            f"model gives {num_outputs} numbers per image"
        )
    return BuiltModel(module, read.preprocess, read.labels, read.activation)


def check(spec: ModelSpec) -> None:
    """Refuse what `build` would refuse of a folder, as far as it can be told without its tensors.

    What is on the hub is not asked for.

    Raises:
        ModelError: as `build`.
    """
    _refuse_foreign_keys(spec)
    if spec.folder is not None:
        own_files(spec.folder, _SETTINGS)
        if spec.weights != "none":
            _read_json(spec.folder / _CONFIG)
            _require_weights(spec.folder)
        _read(spec, spec.folder, lambda text: None)


def _read(spec: ModelSpec, folder: Path, log: Log) -> _Read:
    """What the files beside the weights say, and whether it goes with the job.

    Raises:
        ModelError: it does not, or is not served.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = _read_config(folder)
    labels = _labels(folder, config)
    if spec.num_classes not in (None, len(labels)):
        raise ModelError(
            f"model.num_classes: found {spec.num_classes}, but {folder / _CONFIG} names "
            f"{len(labels)} classes (id2label)"
        )
    if not isinstance(config.problem_type, str | None) or config.problem_type not in _ACTIVATIONS:
        raise ModelError(
            f"model.name: {folder / _CONFIG}: problem_type: found {config.problem_type!s:.80}; "
            f"allowed: {', '.join(filter(None, _ACTIVATIONS))}"
        )
    activation = _ACTIVATIONS[config.problem_type]
    settled(spec.activation, len(labels), f"model.name: {spec.display_name}", activation)
    return _Read(config, labels, activation, read_preprocess(folder, spec.preprocess, log))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say what transformers cannot use; what it and torch only warn of is compared or refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (*MALFORMED, SafetensorError) as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


def _refuse_foreign_keys(spec: ModelSpec) -> None:
    if spec.weights not in ("DEFAULT", "none"):
        raise ModelError(
            f"model.weights: found {spec.weights}, but those of {spec.display_name} lie in its "
            "folder: DEFAULT, or none"
        )
    if spec.transform_input is not None:
        raise ModelError(
            f"model.transform_input: found {spec.transform_input}, but {spec.display_name} has "
            "no such option"
        )


def _downloaded(spec: ModelSpec, log: Log) -> Path:
    """The repository's files in the hub's own cache; pickled weights where it has no others."""
    assert spec.name is not None
    name = spec.name.partition("/")[2]
    folder = fetch.snapshot_from_hub(name, (*_SETTINGS, *_SAFE_WEIGHTS), log)
    if not own_files(folder, _SAFE_WEIGHTS) and spec.weights != "none":
        folder = fetch.snapshot_from_hub(name, (*_SETTINGS, *_PICKLED_WEIGHTS), log)
    log(
        f"{name}: taken is revision {folder.name}, for later runs too (another: "
        f"hf/{name.partition('@')[0]}@REVISION in model.name)"
    )
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
            f"timm/{written['architecture']}, {fetch.PARTS_OF_TIMM}"
        )
    if (folder / "adapter_config.json").exists():
        written["adapter_config"] = "adapter_config.json"
    for key, advice in _UNSERVED.items():
        if key in written:
            raise ModelError(f"{what}: {key}: found {written[key]!s:.80}, not served; {advice}")
    _require_bounded(what, written)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except MALFORMED as error:
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
            f"architectures: {_listed(written.get('architectures'))}"
        )
    num_channels = getattr(config, "num_channels", 3)
    if num_channels != 3:
        raise ModelError(f"{what}: num_channels: found {num_channels}; only models of 3 are served")
    return config


def _require_bounded(what: str, written: dict[str, Any]) -> None:
    """Refuse numbers with which transformers would take all time and memory to read the rest.

    Raises:
        ModelError: naming the key.
    """
    left: list[tuple[str, Any]] = list(written.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, one) for one in value]
        elif isinstance(value, int | float):
            for keys, most in _MOST:
                if keys.search(key) and value > most:
                    raise ModelError(f"{what}: {key}: found {value:,}; allowed: up to {most:,}")


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


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) and names else str(names)


def _labels(folder: Path, config: Any) -> tuple[str, ...]:
    names = config.id2label
    if not isinstance(names, dict) or not names or set(names) != set(range(len(names))):
        keys = f"the keys {_listed(list(names)[:5])}" if isinstance(names, dict) else str(names)
        raise ModelError(
            f"model.name: {folder / _CONFIG}: id2label: found {keys:.200}; allowed: 0 to the "
            "number of classes less 1, each once"
        )
    return tuple(str(names[index]) for index in range(len(names)))


# ---- the weights ---------------------------------------------------------------------------------


def _require_weights(folder: Path) -> bool:
    """Whether a folder's weights are safetensors, as they are where it has any; else pickled.

    Raises:
        ModelError: there are none, they are not the folder's own, or they are pickled and torch
            may run code in them.
    """
    if found := own_files(folder, _SAFE_WEIGHTS):
        _require_own_shards(folder, found, ".safetensors")
        return True
    if found := own_files(folder, _PICKLED_WEIGHTS):
        require_safe_torch(f"model.name: {found[0]}")
        _require_own_shards(folder, found, ".bin")
        return False
    raise ModelError(
        f"model.name: {folder}: holds neither model.safetensors nor pytorch_model.bin; save the "
        "model with `model.save_pretrained(folder)`"
    )


def _require_own_shards(folder: Path, files: list[Path], suffix: str) -> None:
    """Refuse an index that names files outside the folder: transformers would read them.

    Raises:
        ModelError: it does, or is none.
    """
    for index in files:
        if index.suffix == ".json":
            for name in sorted(_shards(index, suffix)):
                own_file(folder, name, says(f"model.name: {index}", name))


def _shards(index: Path, suffix: str) -> set[str]:
    """The files that an index of weights names."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(
            f"model.name: {index}: weight_map: found {names!s:.80}; allowed: the file of each "
            "tensor, by the tensor's name"
        )
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(suffix):
            raise ModelError(f"{says(f'model.name: {index}', str(name))}, which is no *{suffix}")
    return set(names.values())


def _require_room(config: Any) -> None:
    """Refuse a model that is too large for this machine, before memory is taken for it.

    Tensors that the files lack would be made as well, until they are missed.

    Raises:
        ValueError: it is.
    """
    with torch.device("meta"):
        sketch = _untrained(config)
    num_bytes = sum(4 * tensor.numel() for tensor in sketch.parameters())
    if num_bytes > (available := available_memory()):
        raise ValueError(
            f"its tensors take {num_bytes / 1e9:,.0f} GB, and {available / 1e9:,.1f} GB of memory "
            "are free; are the sizes and numbers of layers right?"
        )


def _untrained(config: Any) -> nn.Module:
    model: nn.Module = AutoModelForImageClassification.from_config(
        config, trust_remote_code=False, attn_implementation="eager"
    )
    return model


def _random(config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same random model on every machine
        return _untrained(config)


def _load(folder: Path, config: Any, log: Log) -> nn.Module:
    is_safe = _require_weights(folder)
    what = f"model.name: {folder}"
    with _refusing(f"{what}: its weights cannot be loaded"), fetch.tensors_only():
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
    kind = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{what}: {len(missing)} tensors of {kind} are missing ({examples_of(missing)}), which "
            "would stay random; was the model trained as an image classifier?"
        )
    _require_all_used(what, kind, sorted(info["unexpected_keys"]), log)
    built: nn.Module = model
    return built


def _require_all_used(what: str, kind: str, unexpected: list[str], log: Log) -> None:
    """Refuse tensors in the file that the model has no place for: it was trained with them.

    Raises:
        ModelError: naming some of them.
    """
    if left := [name for name in unexpected if not _HARMLESS.search(name)]:
        raise ModelError(
            f"{what}: {kind} has no place for {len(left)} of the tensors in its weights "
            f"({examples_of(left)}), and would give other answers without them; merge adapters "
            "(`model.merge_and_unload()`), or save the model as the class it was trained as"
        )
    if unexpected:
        log(f"{what}: {kind} does not need {examples_of(unexpected)} of its weights: left")
