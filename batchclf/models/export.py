"""torchvision models to ONNX: the only place that imports torch and torchvision.

The exported graph takes uint8 pixels NHWC and holds layout change, scaling and normalisation. It
is accepted only when ONNX Runtime gives PyTorch's logits at several batch sizes: an exporter may
bake the example's batch size into the graph without a word.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import contextlib
import difflib
import http.client
import math
import os
import pickle
import re
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models as zoo

from batchclf.errors import ModelError, WeightsUnavailable
from batchclf.models.bundle import MAX_PROTOBUF_BYTES, MODEL_FILE, sha256_of
from batchclf.models.checks import OpenReference, Run, assert_same_scores, sample_pixels, tiled
from batchclf.models.download import downloaded
from batchclf.results.records import Interpolation, Preprocess
from batchclf.spec.job import ModelSpec, PreprocessSpec

OPSET = 18
"""Read by every ONNX Runtime since 1.14, so also by the OpenVINO flavour, which lags behind."""
MAX_BATCH = 65536
SAFE_TORCH = (2, 10)
"""Files could run code in spite of weights_only=True before (CVE-2025-32434, CVE-2026-24747)."""
_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""As torchvision names its files: the beginning of their SHA-256."""

_FEEDS_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""Models whose pretrained weights expect `transform_input=True` (torchvision's builders set it)."""
_VIT_POSITIONS = "encoder.pos_embedding"
"""Of shape (1, 1 + patches, width): tells for which image size a ViT was trained."""
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "model_ema")
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)
"""Names in torchvision's own DenseNet files, which its builders rename."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


@dataclass(frozen=True, slots=True)
class TorchvisionModel:
    """A built model in eval mode, and what comes with its weights."""

    module: nn.Module
    preprocess: Preprocess
    labels: tuple[str, ...]


def build_torchvision(
    spec: ModelSpec, log: Callable[[str], None] = lambda text: None
) -> TorchvisionModel:
    """Build a torchvision classification model with pretrained, own or random weights.

    `log` is told of a download.

    Raises:
        ModelError: unknown model or weights, or a file that does not fit the model.
        WeightsUnavailable: the download failed.
    """
    name, num_classes = _known_name(spec), spec.num_classes
    enum = zoo.get_model_weights(name)
    if spec.weights_path is not None:
        state = _read_state(spec.weights_path)
        module = _build_from_state(name, state, spec.weights_path, num_classes)
        labels = None
        member = _reference_weights(enum, module)
    elif spec.weights == "none":
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same random model on every machine
            module = _bare(name, num_classes or 1000)
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
        labels = tuple(str(index) for index in range(_num_outputs(module, preprocess, name)))
    return TorchvisionModel(module, preprocess, labels)


def check_torchvision(spec: ModelSpec) -> None:
    """Refuse an unknown model or weights name, or a weights file that does not read.

    Raises:
        ModelError: with the nearest names.
    """
    name = _known_name(spec)
    if spec.weights_path is not None:
        _read_state(spec.weights_path)
    elif spec.weights != "none":
        _weights_member(name, zoo.get_model_weights(name), spec.weights)


def export_torchvision(
    model: TorchvisionModel, folder: Path, *, batch_size: int, open_reference: OpenReference
) -> tuple[int, ...]:
    """Export to `folder`/model.onnx and check it against PyTorch; returns the batch sizes checked.

    Raises:
        ModelError: the exporter fails, or the exported model gives other answers.
    """
    wrapped = _PixelsToLogits(model.module, model.preprocess).eval()
    path = folder / MODEL_FILE
    crop_h, crop_w = model.preprocess.crop
    pixels_NHWC = sample_pixels(crop_h, crop_w)
    # The fused attention path of nn.MultiheadAttention has no ONNX counterpart.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.inference_mode():
        try:
            expected_NK = wrapped(torch.from_numpy(pixels_NHWC)).numpy()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModelError(
                f"the model does not take {crop_h} x {crop_w} pixels "
                f"(model.preprocess.crop): {_first_line(error)}"
            ) from error
    _export(wrapped, path, example=torch.from_numpy(pixels_NHWC[:2].copy()))
    run = open_reference(path)
    checked = tuple(sorted({1, 2, 3, batch_size}))
    for size in checked:
        found_NK = run(tiled(pixels_NHWC, size))
        assert_same_scores(found_NK, tiled(expected_NK, size), f"exported model, batch of {size}")
    return checked


def eager(model: TorchvisionModel, threads: int) -> Run:
    """The model in PyTorch, uint8 pixels NHWC to float32 logits NK, on `threads` CPU threads."""
    wrapped = _PixelsToLogits(model.module, model.preprocess).eval()
    torch.set_num_threads(threads)

    def run(pixels_NHWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            logits_NK: np.ndarray[Any, Any] = wrapped(torch.from_numpy(pixels_NHWC)).numpy()
        return logits_NK

    return run


# ---- building ------------------------------------------------------------------------------------


def _known_name(spec: ModelSpec) -> str:
    name, names = spec.name, zoo.list_models(module=zoo)
    assert name is not None
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
        raise ModelError(f"model.name: torchvision has no classification model {name!r}; {hint}")
    return name


def _bare(name: str, num_classes: int, **options: object) -> nn.Module:
    if name in _FEEDS_OWN_NORMALISATION:
        options = {"aux_logits": False, "init_weights": True} | options
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    return module


def _build_pretrained(name: str, member: zoo.WeightsEnum, log: Callable[[str], None]) -> nn.Module:
    _require_safe_torch(f"weights {member}")
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
            what = f"cannot be downloaded: {type(error).__name__}: {_first_line(error)}"
        else:
            what = f"cannot be loaded: {_first_line(error)}"
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


def _require_safe_torch(what: str) -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        raise ModelError(
            f"{what}: torch {torch.__version__} may run code that is hidden in a file of tensors; "
            f"give a .safetensors file, or pip install 'torch>={SAFE_TORCH[0]}.{SAFE_TORCH[1]}'"
        )


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


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a weights file, without the wrappers that trainers put around it."""
    what = f"model.weights: {path}"
    if not path.is_file():
        raise ModelError(f"{what}: no such file")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            _require_safe_torch(what)
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{what}: holds more than tensors, which could run code when loaded, or is no "
            f"PyTorch file ({_first_line(error)}); save `model.state_dict()`, or safetensors"
        ) from error
    except (RuntimeError, EOFError, SafetensorError, ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"{what}: damaged or not a weights file ({path.stat().st_size:,} bytes): "
            f"{_first_line(error)}; download or save it again"
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


def _build_from_state(
    name: str, state: Mapping[str, Tensor], path: Path, num_classes: int | None
) -> nn.Module:
    options: dict[str, object] = {}
    if name in _FEEDS_OWN_NORMALISATION:
        has_aux = any(key.lower().startswith("aux") for key in state)
        options = {"transform_input": True, "aux_logits": has_aux}
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
        raise ModelError(f"model.weights: {path}: {_misfit(name, module, state)}") from error
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


def _misfit(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> str:
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
    )


def _num_outputs(module: nn.Module, preprocess: Preprocess, name: str) -> int:
    with torch.inference_mode():
        try:
            logits_NK = module(torch.zeros(2, 3, *preprocess.crop))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModelError(
                f"{name} does not take {preprocess.crop[0]} x {preprocess.crop[1]} pixels "
                f"(model.preprocess.crop): {_first_line(error)}"
            ) from error
    return int(logits_NK.shape[1])


# ---- exporting -----------------------------------------------------------------------------------


class _PixelsToLogits(nn.Module):
    """uint8 pixels NHWC to logits NK: `ToTensor` and `Normalize` as one multiply and one add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        assert preprocess.mean is not None
        assert preprocess.std is not None
        mean_C = torch.tensor(preprocess.mean, dtype=torch.float64)
        std_C = torch.tensor(preprocess.std, dtype=torch.float64)
        self.module = module
        self.register_buffer("scale", (1 / (255 * std_C)).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean_C / std_C).float().view(1, 3, 1, 1))

    def forward(self, pixels_NHWC: Tensor) -> Tensor:
        pixels_NCHW = pixels_NHWC.permute(0, 3, 1, 2).float()
        logits_NK: Tensor = self.module(pixels_NCHW * self.scale + self.shift)
        return logits_NK


def _export(module: nn.Module, path: Path, *, example: Tensor) -> None:
    """Export with a dynamic batch axis; the example's batch of 2 keeps 0 and 1 unspecialised."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["pixels"],
                output_names=["scores"],
                opset_version=OPSET,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be exported to ONNX: {type(error).__name__}: {_first_line(error)}"
        ) from error
    assert program is not None
    num_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    _forget_origins(program)
    program.save(path, external_data=num_bytes > MAX_PROTOBUF_BYTES)


def _forget_origins(program: Any) -> None:
    """Drop stack traces and the like: they hold this machine's paths and this file's line numbers,
    and would make the same model another one elsewhere."""
    model = program.model
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
    model.metadata_props.clear()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
