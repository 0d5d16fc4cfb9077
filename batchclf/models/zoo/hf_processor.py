"""What an image processor of transformers does, in terms of resize, centre crop and normalisation.

Its keys are read, and then it is run: three images of odd shapes must come out of it with the very
pixels that the reading promises. So a key that is not known, or a processor with steps of its own,
is refused and never ignored.

Array shapes: H rows, W columns, C = 3 (RGB).
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from torchvision.transforms import functional
from transformers import AutoImageProcessor

from batchclf.errors import ModelError
from batchclf.models.checkpoints import first_line
from batchclf.results.records import Channels, Interpolation, Pixels, Preprocess
from batchclf.spec.job import PreprocessSpec

_PerChannel = tuple[float, float, float]

_FILTERS: Mapping[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as in `resample`."""
_KNOWN_STEPS = (
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order"),
    *("do_convert_rgb", "do_reduce_labels"),
)
"""`do_convert_rgb` is always done; `do_reduce_labels` is of segmentation maps."""
_CROPLESS_FROM = 384
"""From this size on, ConvNeXT's processor does not crop (image_processing_convnext)."""
_LEVIT_ENLARGES = 256 / 224
"""LeViT's processor resizes by so much more than `size` says."""
_SHAPES_HW = ((150, 211), (301, 198), (67, 67))
_LEAST_LEVEL = 0.01
"""Of 255: differences below are of rounding in the normalisation."""
_YOURSELF = (
    "; or give resize, crop, mean and std in model.preprocess, and the processor is not asked"
)


@dataclass(frozen=True, slots=True)
class _Settings:
    """The attributes of a processor, where each key may be absent."""

    processor: Any
    where: str

    def get(self, key: str) -> Any:
        return getattr(self.processor, key, None)

    def refusal(self, key: str, why: str) -> ModelError:
        value = self.get(key)
        if key == "size":
            value = _given(value)
        return ModelError(f"{self.where}: {key}: found {value!s:.200}; {why}{_YOURSELF}")


def read_preprocess(folder: Path, overrides: PreprocessSpec | None) -> Preprocess:
    """What the processor saved in `folder` does (its Pillow variant), with the user's parts.

    Raises:
        ModelError: there is none, or it does what cannot be expressed.
    """
    given = overrides or PreprocessSpec()
    crop = (given.crop, given.crop) if isinstance(given.crop, int) else given.crop
    if given.resize and crop and given.mean and given.std:
        own = Preprocess(given.resize, crop, "bilinear", given.mean, given.std)
    else:
        own = _own_preprocess(folder)
    is_whole = own.resize == own.crop
    return replace(
        own,
        resize=given.resize or (crop if crop and is_whole else own.resize),
        crop=crop or own.crop,
        interpolation=given.interpolation or own.interpolation,
        mean=given.mean or own.mean,
        std=given.std or own.std,
        channels=given.channels or own.channels,
    )


def _own_preprocess(folder: Path) -> Preprocess:
    where = f"model.name: {folder}: image processor"
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError),
        *(EOFError, pickle.UnpicklingError, StrictDataclassError),
    ) as error:
        raise ModelError(
            f"{where}: cannot be read: {first_line(error)}; save it beside the model with "
            f"`processor.save_pretrained(folder)`{_YOURSELF}"
        ) from error
    settings = _Settings(processor, f"{where} ({type(processor).__name__})")
    if settings.get("backend") != "pil":
        raise settings.refusal("backend", "only processors with a Pillow variant are served")
    expressed = _expressed(settings)
    _require_same_pixels(settings, expressed)
    return expressed


# ---- reading -------------------------------------------------------------------------------------


def _expressed(settings: _Settings) -> Preprocess:
    for key in vars(settings.processor):
        if key.startswith("do_") and settings.get(key) and key not in _KNOWN_STEPS:
            raise settings.refusal(key, "this step is not served")
    if not settings.get("do_resize"):
        raise settings.refusal("do_resize", "images of any size do not fit into one batch")
    resample = settings.get("resample")
    if resample not in _FILTERS:
        raise settings.refusal(
            "resample", f"allowed: {', '.join(f'{n} ({f})' for n, f in _FILTERS.items())}"
        )
    resize, crop = _sizes(settings)
    mean, std = _normalisation(settings)
    channels: Channels = "bgr" if settings.get("do_flip_channel_order") else "rgb"
    return Preprocess(
        resize, crop, _FILTERS[int(resample)], mean, std, channels, crop_rounding="down"
    )


def _sizes(settings: _Settings) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Resize and crop, from `size`, `crop_size` and what the class makes of them."""
    size = _given(settings.get("size"))
    crop: tuple[int, int] | None = None
    resize: int | tuple[int, int]
    if set(size) == {"height", "width"}:
        resize = crop = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"}:
        resize = size["shortest_edge"]
    else:
        raise settings.refusal("size", "allowed: height and width, or shortest_edge")
    kind, edge = type(settings.processor).__name__, next(iter(size.values()))
    crop_pct = settings.get("crop_pct") or 1
    if kind.startswith("ConvNext"):
        crop = (edge, edge)
        resize = int(edge / crop_pct) if edge < _CROPLESS_FROM else crop
    elif kind.startswith("PoolFormer") and len(set(size.values())) == 1:
        resize = int(edge / crop_pct)
    elif kind.startswith("Levit") and isinstance(resize, int):
        resize = int(_LEVIT_ENLARGES * edge)
    if settings.get("do_center_crop"):
        kept = _given(settings.get("crop_size"))
        crop = (kept["height"], kept["width"])
    if crop is None:
        raise settings.refusal(
            "do_center_crop", f"with size {size} images come out in shapes of their own"
        )
    return resize, crop


def _given(size: Any) -> dict[str, int]:
    """The edges that a size says, of all that it could."""
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _normalisation(settings: _Settings) -> tuple[_PerChannel, _PerChannel]:
    """Mean and std, of pixels in 0..1, of all that scales and shifts: y = factor * x + shift."""
    factor, shift = np.ones(3), np.zeros(3)
    if settings.get("do_rescale"):
        factor *= settings.get("rescale_factor")
        shift -= 1 if settings.get("rescale_offset") else 0
    mean = np.broadcast_to(np.float64(settings.get("image_mean") or 0), 3)
    std = np.broadcast_to(np.float64(settings.get("image_std") or 1), 3)
    if settings.get("do_normalize"):
        factor, shift = factor / std, (shift - mean) / std
    if settings.get("include_top"):  # EfficientNet's divides once more
        factor, shift = factor / std, shift / std
    own_std = 1 / (255 * factor)
    return _rounded(-shift * own_std), _rounded(own_std)


def _rounded(values_C: np.ndarray[Any, Any]) -> _PerChannel:
    """As somebody would have written them: 0.485 for 0.48500000000000004."""
    first, second, third = (float(f"{value:.12g}") + 0.0 for value in values_C)
    return first, second, third


# ---- running -------------------------------------------------------------------------------------


def _require_same_pixels(settings: _Settings, expressed: Preprocess) -> None:
    rng = np.random.default_rng(0)
    for height, width in _SHAPES_HW:
        image_HWC = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found_CHW = settings.processor(images=image_HWC, return_tensors="np")["pixel_values"][0]
        expected_HWC = _decoded(image_HWC, expressed)
        found_HWC = np.moveaxis(np.asarray(found_CHW, np.float64), 0, -1)
        if expressed.channels == "bgr":
            expected_HWC = expected_HWC[..., ::-1]
        levels_HWC = 255 * (found_HWC * np.array(expressed.std) + np.array(expressed.mean))
        if levels_HWC.shape != expected_HWC.shape:
            what = f"gives {levels_HWC.shape[:2]} pixels, not {expected_HWC.shape[:2]}"
        elif (worst := float(np.abs(levels_HWC - expected_HWC).max())) > _LEAST_LEVEL:
            what = f"gives other pixels than its keys say (up to {worst:.3g} of 255)"
        else:
            continue
        raise ModelError(
            f"{settings.where}: {what}, for an image of {height} x {width}; it has steps of its "
            f"own that are not served{_YOURSELF}"
        )


def _decoded(image_HWC: Pixels, preprocess: Preprocess) -> Pixels:
    """What the image room makes of the image: written out apart from it."""
    image = functional.to_pil_image(image_HWC)
    resize = preprocess.resize if isinstance(preprocess.resize, int) else list(preprocess.resize)
    mode = functional.InterpolationMode(preprocess.interpolation)
    resized_HWC = np.asarray(functional.resize(image, resize, mode))
    crop_h, crop_w = preprocess.crop
    top, left = (resized_HWC.shape[0] - crop_h) // 2, (resized_HWC.shape[1] - crop_w) // 2
    padded_HWC = np.pad(
        resized_HWC, [(max(-top, 0), max(-top, 0)), (max(-left, 0), max(-left, 0)), (0, 0)]
    )
    top, left = max(top, 0), max(left, 0)
    return padded_HWC[top : top + crop_h, left : left + crop_w]
