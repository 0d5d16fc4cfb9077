"""The records that pass between the rooms: frozen, and free of any library's types but NumPy's.

Array shapes are suffixes: N images of a batch, H rows, W columns, C colour channels (RGB),
K classes. `pixels_NHWC` is uint8, `logits_NK` and `scores_NK` are float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float32]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
DecodeMode = Literal["exact", "fast"]
SixteenBit = Literal["scale", "stretch", "clip"]
DecodeBackend = Literal["threads", "processes"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Channels = Literal["rgb", "bgr", "grey"]
CropRounding = Literal["even", "down"]
Activation = Literal["softmax", "sigmoid", "none"]
"""What makes scores of a model's output: none where it gives scores already."""


class Entry(NamedTuple):
    """One image of an input, as it is listed."""

    path: bytes
    """Relative to the input folder, separated by `/`; bytes, since names need not be UTF-8."""
    location: bytes = b""
    """Where its bytes lie, for who listed it to find them again; empty: the path says it."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One entry of the frozen listing: its place in the whole job, its path as recorded."""

    index: int
    path: bytes
    location: bytes = b""
    """As of `Entry`."""


def refs_of(entries: Iterable[Entry], first: int = 0) -> Iterator[ImageRef]:
    """The entries of a listing, from the one with the number `first`."""
    return (ImageRef(index, *entry) for index, entry in enumerate(entries, first))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image has no prediction. `code` is stable and for programs, `message` for people."""

    code: str
    message: str


class Stretch(NamedTuple):
    """What of an archive can only be read in passing through what lies before it."""

    archive: bytes
    """With all that tells it from others."""
    start: int
    """The first unit, such as a byte or a row."""
    stop: int
    """The one behind the last."""

    def meets(self, other: "Stretch") -> bool:
        """Whether it has a unit of another."""
        is_same = self.archive == other.archive
        return is_same and self.start < other.stop and other.start < self.stop


Quarantined = Mapping[bytes | Stretch, Failure]
"""What crashes or hangs whoever loads it: images, by their paths in the listing, and stretches."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class of an image's top k; `score` is its probability, unless the job says otherwise."""

    label: str
    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of one image on its way into a slot: pixels, or a failure; with any warnings."""

    failure: Failure | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of the prefetcher; rows of `pixels_NHWC` beyond `len(refs)` are padding.

    Once it was inferred, its rows are those of the images that loaded, in their order.
    """

    sequence: int
    refs: tuple[ImageRef, ...]
    loaded: tuple[Loaded, ...]
    pixels_NHWC: Pixels


@dataclass(frozen=True, slots=True)
class Record:
    """One line of predictions.jsonl: the image, and its predictions or its failure."""

    ref: ImageRef
    outcome: tuple[Prediction, ...] | Failure
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` (from 0) of `count` contiguous parts of the frozen listing."""

    index: int = 0
    count: int = 1

    def bounds(self, num_images: int) -> tuple[int, int]:
        """First index and end index of this part in a listing of `num_images`."""
        return (
            self.index * num_images // self.count,
            (self.index + 1) * num_images // self.count,
        )

    @property
    def suffix(self) -> str:
        """What goes before a file's suffix: empty, or `-00003-of-00016`."""
        return "" if self.count == 1 else f"-{self.index:05d}-of-{self.count:05d}"


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a file's pixels become the model's input, in torchvision's terms.

    The order is: decode to RGB, resize, centre crop (both on uint8, done by the image room), then
    scale to 0..1, subtract `mean` and divide by `std` (per channel, done inside the graph).
    """

    resize: int | tuple[int, int]
    """Length of the shorter edge in pixels, or exact (height, width)."""
    crop: tuple[int, int]
    """Height and width of the centre crop in pixels: the model's input size."""
    interpolation: Interpolation
    mean: tuple[float, float, float] | None
    """None, as `std`: the model takes the 0..255 pixels as they are."""
    std: tuple[float, float, float] | None
    channels: Channels = "rgb"
    """As the model takes them, and as `mean` and `std` are given: grey is Pillow's `convert("L")`
    before the resize, in each of the three."""
    crop_rounding: CropRounding = "even"
    """Of half a margin that is odd, at the left and at the top of the crop: to the even number, as
    torchvision does, or down, as transformers does."""


@dataclass(frozen=True, slots=True)
class ActiveProvider:
    """The provider a session was proven to have opened with, as recorded in the summary."""

    requested: str
    active: str
    device: str
    """As the provider calls it: CPU, GPU.1, AUTO:GPU,CPU, or `0: NVIDIA H100` on CUDA."""
    nodes: Mapping[str, int] = field(default_factory=dict)
    """Number of graph nodes per execution provider, for example `{"CPUExecutionProvider": 60}`;
    where several devices do not agree, the largest."""
    cpu_nodes: tuple[str, ...] = ()
    """Nodes that another provider than the CPU left to the CPU, as `operator name`."""
    options: Mapping[str, str] = field(default_factory=dict)
    """All options the provider was opened with, the user's and the defaults of this program."""
    fallback: str | None = None
    """Why the requested provider does not run, where the job allowed the CPU in its place; of
    several devices, on which."""


_SLOW = 0.95
"""Two measurements of the same speed may differ by that much."""


@dataclass(frozen=True, slots=True)
class Part:
    """How many images of a batch are inferred at once, and how that was chosen."""

    num_images: int
    chosen: Literal["measured", "remembered", "asked", "whole"]
    """Measured now, or by an earlier run here; asked for by the job; whole: a batch is one part."""


@dataclass(frozen=True, slots=True)
class PrecisionCheck:
    """A reduced precision compared with fp32 on a sample of the job's own images."""

    num_images: int
    top1_agreement: float
    max_score_difference: float
    """Largest difference of one class's probability, 0 to 1."""
    speed: float | None = None
    """Times the images per second of the same sessions at fp32; None: not measured."""

    @property
    def is_slow(self) -> bool:
        """Whether the precision costs time as well as accuracy."""
        return self.speed is not None and self.speed < _SLOW


def precision_name(precision: str, check: PrecisionCheck | None) -> str:
    """What a job's precision is called: fp32 that was compared with fp32 is TF32."""
    return "TF32" if precision == "fp32" and check is not None else precision
