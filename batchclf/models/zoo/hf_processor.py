"""What an image processor of transformers does, in terms of resize, centre crop and normalisation.

Its keys are read, and then it is run: three images of odd shapes must come out of it with the very
pixels that the reading promises. So a key that is not known, or a processor with steps of its own,
is refused and never ignored.

Array shapes: H rows, W columns, C = 3 (RGB).
"""

import pickle
from collections.abc import Callable, Mapping
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

Log = Callable[[str], None]
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
_LARGEST_EDGE = 8192
"""As in a job (`PreprocessSpec`)."""
_LARGEST_NUMBER = 1e6
"""Of means, standard deviations and factors, and of their reciprocals."""
MALFORMED = (
    *(OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError, AssertionError),
    *(ArithmeticError, LookupError, EOFError, pickle.UnpicklingError, StrictDataclassError),
)
"""What transformers raises on keys that it cannot use, when it reads them or when it runs."""
_YOURSELF = (
    "; or give resize, crop, mean and std in model.preprocess, and the processor is asked for "
    "no more than interpolation and channels"
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
        if key in ("size", "crop_size"):
            value = _stated(value) or value
        return ModelError(f"{self.where}: {key}: found {value!s:.200}; {why}")

    def edges(self, key: str) -> dict[str, int]:
        """The edges that a size says, of all that it could."""
        edges = _stated(self.get(key))
        for edge in edges.values():
            if type(edge) is not int or not 1 <= edge <= _LARGEST_EDGE:
                raise self.refusal(key, f"allowed: whole numbers from 1 to {_LARGEST_EDGE}")
        return edges

    def numbers(self, key: str, count: int, least: float) -> np.ndarray[Any, Any]:
        """`count` numbers, or one for all, whose magnitude is from `least` to the largest."""
        value = self.get(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        if len(numbers) not in (1, count) or not all(
            type(one) in (int, float) and least <= abs(one) <= _LARGEST_NUMBER for one in numbers
        ):
            some = "a number" if count == 1 else f"{count} numbers, or one for all,"
            raise self.refusal(key, f"allowed: {some} from {least:g} to {_LARGEST_NUMBER:g}")
        return np.broadcast_to(np.array(numbers, np.float64), 3)


def _stated(size: Any) -> dict[str, Any]:
    try:
        return {key: value for key, value in dict(size or {}).items() if value is not None}
    except (TypeError, ValueError):
        return {}


def read_preprocess(
    folder: Path, overrides: PreprocessSpec | None, log: Log = lambda text: None
) -> Preprocess:
    """What the processor saved in `folder` does (its Pillow variant), with the user's parts.

    `log` is told what is taken where a job gives so much itself that the processor need not be one
    that is served.

    Raises:
        ModelError: there is none, or it does what cannot be expressed.
    """
    given = overrides or PreprocessSpec()
    crop = given.crop_size
    if given.resize and crop and given.mean and given.std:
        asked = Preprocess(given.resize, crop, "bilinear", given.mean, given.std)
        own = _completed(asked, folder, given, log)
    else:
        try:
            own = _served(_opened(folder))
        except ModelError as error:
            raise ModelError(f"{error}{_YOURSELF}") from error
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


def _completed(asked: Preprocess, folder: Path, given: PreprocessSpec, log: Log) -> Preprocess:
    """With interpolation, channels and crop rounding of the processor, as far as it says them."""
    try:
        settings = _opened(folder)
        asked = replace(asked, channels=_channels(settings), crop_rounding="down")
        asked = replace(asked, interpolation=_interpolation(settings))
        _served(settings)
    except ModelError as error:
        log(
            f"{error}; the job's own resize, crop, mean and std are used, with "
            f"interpolation: {given.interpolation or asked.interpolation}, "
            f"channels: {given.channels or asked.channels} (if the model was trained with others, "
            "write them under model.preprocess)"
        )
    return asked


def _opened(folder: Path) -> _Settings:
    """The processor saved in `folder`.

    Raises:
        ModelError: there is none, or transformers cannot make it.
    """
    where = f"model.name: {folder}: image processor"
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except MALFORMED as error:
        raise ModelError(
            f"{where}: cannot be read: {first_line(error)}; save it beside the model with "
            "`processor.save_pretrained(folder)`"
        ) from error
    settings = _Settings(processor, f"{where} ({type(processor).__name__})")
    if settings.get("backend") != "pil":
        raise settings.refusal("backend", "only processors with a Pillow variant are served")
    return settings


def _served(settings: _Settings) -> Preprocess:
    """What the processor does, read and tried.

    Raises:
        ModelError: it cannot be expressed.
    """
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
    interpolation = _interpolation(settings)
    resize, crop = _sizes(settings)
    mean, std = _normalisation(settings)
    return Preprocess(
        resize, crop, interpolation, mean, std, _channels(settings), crop_rounding="down"
    )


def _interpolation(settings: _Settings) -> Interpolation:
    resample = settings.get("resample")
    if not isinstance(resample, int) or resample not in _FILTERS:
        raise settings.refusal(
            "resample", f"allowed: {', '.join(f'{n} ({f})' for n, f in _FILTERS.items())}"
        )
    return _FILTERS[int(resample)]


def _channels(settings: _Settings) -> Channels:
    return "bgr" if settings.get("do_flip_channel_order") else "rgb"


def _sizes(settings: _Settings) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Resize and crop, from `size`, `crop_size` and what the class makes of them."""
    size = settings.edges("size")
    crop: tuple[int, int] | None = None
    resize: int | tuple[int, int]
    if set(size) == {"height", "width"}:
        resize = crop = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"}:
        resize = size["shortest_edge"]
    else:
        raise settings.refusal("size", "allowed: height and width, or shortest_edge")
    kind, edge = type(settings.processor).__name__, next(iter(size.values()))
    if kind.startswith("ConvNext"):
        crop = (edge, edge)
        resize = _enlarged(settings, edge) if edge < _CROPLESS_FROM else crop
    elif kind.startswith("PoolFormer") and len(set(size.values())) == 1:
        resize = _enlarged(settings, edge)
    elif kind.startswith("Levit") and isinstance(resize, int):
        resize = int(_LEVIT_ENLARGES * edge)
    if settings.get("do_center_crop"):
        kept = settings.edges("crop_size")
        if set(kept) != {"height", "width"}:
            raise settings.refusal("crop_size", "allowed: height and width, or one number")
        crop = (kept["height"], kept["width"])
    if crop is None:
        raise settings.refusal(
            "do_center_crop", f"with size {size} images come out in shapes of their own"
        )
    return resize, crop


def _enlarged(settings: _Settings, edge: int) -> int:
    """What is resized to, for a crop of `crop_pct` of it to leave `edge`."""
    if settings.get("crop_pct") is None:
        return edge
    resize = int(edge / settings.numbers("crop_pct", 1, 1e-3)[0])
    if not 1 <= resize <= _LARGEST_EDGE:
        raise settings.refusal("crop_pct", f"images would be resized to {resize}")
    return resize


def _normalisation(settings: _Settings) -> tuple[_PerChannel, _PerChannel]:
    """Mean and std, of pixels in 0..1, of all that scales and shifts: y = factor * x + shift."""
    factor, shift = np.ones(3), np.zeros(3)
    least = 1 / _LARGEST_NUMBER
    if settings.get("do_rescale"):
        factor = factor * settings.numbers("rescale_factor", 1, least)
        shift = shift - (1 if settings.get("rescale_offset") else 0)
    if settings.get("do_normalize"):
        mean, std = settings.numbers("image_mean", 3, 0), settings.numbers("image_std", 3, least)
        factor, shift = factor / std, (shift - mean) / std
    if settings.get("include_top"):  # EfficientNet's divides once more
        std = settings.numbers("image_std", 3, least)
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
        levels_HWC = _levels(settings, expressed, image_HWC)
        expected_HWC = _decoded(image_HWC, expressed)
        if expressed.channels == "bgr":
            expected_HWC = expected_HWC[..., ::-1]
        if levels_HWC.shape != expected_HWC.shape:
            what = f"gives {levels_HWC.shape[:2]} pixels, not {expected_HWC.shape[:2]}"
        elif not (worst := float(np.abs(levels_HWC - expected_HWC).max())) <= _LEAST_LEVEL:
            what = f"gives other pixels than its keys say (up to {worst:.3g} of 255)"
        else:
            continue
        raise ModelError(
            f"{settings.where}: {what}, for an image of {height} x {width}; it has steps of its "
            "own that are not served"
        )


def _levels(
    settings: _Settings, expressed: Preprocess, image_HWC: Pixels
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the processor makes of the image, with the normalisation taken back."""
    try:
        with np.errstate(all="ignore"):  # what comes of odd keys is compared
            given = settings.processor(images=image_HWC, return_tensors="np")
            found_HWC = np.moveaxis(np.asarray(given["pixel_values"][0], np.float64), 0, -1)
            levels_HWC: np.ndarray[Any, np.dtype[np.float64]]
            levels_HWC = 255 * (found_HWC * np.array(expressed.std) + np.array(expressed.mean))
    except MALFORMED as error:
        raise ModelError(
            f"{settings.where}: does not take an image of {image_HWC.shape[0]} x "
            f"{image_HWC.shape[1]}: {first_line(error)}"
        ) from error
    return levels_HWC


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
