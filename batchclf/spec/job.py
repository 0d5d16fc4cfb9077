"""The job: what every key of a job file may hold, as the validated, frozen `JobSpec`."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from batchclf.results.records import (
    Activation,
    Channels,
    DecodeBackend,
    DecodeMode,
    Interpolation,
    Precision,
    SixteenBit,
)
from batchclf.spec.input import BUCKETS, InputSpec, OutputSpec, as_path, can_name_a_file

MAX_INTEGER = 2**53
"""Largest whole number that every reader of JSON keeps, so the largest that run.json holds."""
MAX_WORKERS = 100_000
MAX_COUNT = 1024
"""Most threads, streams or batches that a key may ask for: a typo must not start a million."""
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
LIBRARIES = ("torchvision", "timm", "hf")
"""Whose models a name may be of; those of the first have no prefix."""
PIXEL_RANGE = 255
"""White, where pixels are not scaled to 0..1: means of such pixels are as many times larger."""


# ---- the types of single values ------------------------------------------------------------------


def _auto_or_count(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_COUNT):
        return value
    raise PydanticCustomError("auto_or_count", f"`auto` or a whole number from 1 to {MAX_COUNT}")


def _auto_or_bytes(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_INTEGER):
        return value
    raise PydanticCustomError("auto_or_bytes", "`auto` or a whole number of bytes")


def _error_limit(value: object) -> object:
    if value is None or (type(value) is int and 0 <= value <= MAX_INTEGER):
        return value
    rate = re.fullmatch(r"(\d+(?:\.\d+)?)%", value) if isinstance(value, str) else None
    if rate and float(rate[1]) <= 100:
        return value
    raise PydanticCustomError(
        "error_limit", 'null (no limit), a count of images such as 100, or a rate such as "2%"'
    )


def _edge_or_size(value: object) -> object:
    if isinstance(value, list):
        value = tuple(value)
    edges = value if isinstance(value, tuple) else (value,)
    if len(edges) in (1, 2) and all(type(edge) is int and 1 <= edge <= 8192 for edge in edges):
        return value
    raise PydanticCustomError(
        "edge_or_size", "pixels as a whole number from 1 to 8192, or [height, width]"
    )


def _per_channel(value: object) -> object:
    numbers = value if isinstance(value, list | tuple) else (value,)
    if len(numbers) in (1, 3) and all(
        type(v) in (int, float) and math.isfinite(v) for v in numbers
    ):
        return tuple(float(v) for v in numbers) * (3 // len(numbers))
    raise PydanticCustomError("per_channel", "three numbers, one per channel, or one for all")


def _per_channel_schema(least: dict[str, JsonValue]) -> dict[str, JsonValue]:
    number: dict[str, JsonValue] = {"type": "number", **least, "maximum": 3}
    several: dict[str, JsonValue] = {"type": "array", "items": number, "minItems": 1, "maxItems": 3}
    return {"anyOf": [number, several]}


def is_weights_path(value: str) -> bool:
    """Whether `model.weights` names a file rather than a torchvision weights enum member."""
    return value.endswith(WEIGHT_SUFFIXES) or os.sep in value


def _file_or_name(value: str) -> str:
    if not can_name_a_file(value):
        raise PydanticCustomError("path", "a name, or a path, as text")
    return value


def _as_float(value: object) -> object:
    return float(value) if type(value) is int else value


def _provider_option(value: object) -> object:
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= MAX_INTEGER):
        return value
    raise PydanticCustomError("provider_option", "text, a number, true or false")


def _devices(value: object) -> object:
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple) or len(set(map(repr, value))) == len(value):
        return value
    raise PydanticCustomError("devices", "each GPU once, such as [0, 1]")


def _name_to_mapping(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


AutoOrCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_COUNT}]}
    ),
]
AutoOrBytes = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_bytes),
    WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER}]}
    ),
]
ErrorLimit = Annotated[
    int | str | None,
    BeforeValidator(_error_limit),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^0*(100(\.0+)?|\d{1,2}(\.\d+)?)%$"},
            ]
        }
    ),
]
EdgeOrSize = Annotated[
    int | tuple[int, int],
    BeforeValidator(_edge_or_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 8192},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1, "maximum": 8192},
                    "minItems": 2,
                    "maxItems": 2,
                },
            ]
        }
    ),
]
PerChannel = Annotated[
    tuple[float, float, float],
    BeforeValidator(_per_channel),
    WithJsonSchema(_per_channel_schema({"minimum": -3})),
]
PerChannelAboveZero = Annotated[
    tuple[float, float, float],
    BeforeValidator(_per_channel),
    WithJsonSchema(_per_channel_schema({"exclusiveMinimum": 0})),
]
DeviceId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
ProviderOption = Annotated[str | int | float | bool, BeforeValidator(_provider_option)]
FilePath = Annotated[
    Path, BeforeValidator(as_path), WithJsonSchema({"type": "string", "minLength": 1})
]
FileOrName = Annotated[str, Field(min_length=1), AfterValidator(_file_or_name)]
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]


# ---- the job -------------------------------------------------------------------------------------


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_LARGEST_OF_UNIT_PIXELS = 3.0
"""A mean of pixels in 0..1 is at most 1, and nobody's std is 3 times that range."""


class PreprocessSpec(_Spec):
    """Overrides of the preprocessing that comes with the weights; every key is optional."""

    resize: EdgeOrSize | None = Field(
        None, description="Shorter edge in pixels after resizing, or [height, width]."
    )
    crop: EdgeOrSize | None = Field(None, description="Centre crop: the model's input size.")
    mean: PerChannel | None = Field(
        None,
        description="Of pixels in 0..1, in the order of `channels`; one number for all of them.",
    )
    std: PerChannelAboveZero | None = Field(None, description="As `mean`.")
    channels: Channels | None = Field(
        None,
        description="As the model takes them: rgb, bgr, or grey (one, or three that are equal).",
    )
    interpolation: Interpolation | None = Field(None, description="Resampling filter of resize.")
    exif_transpose: bool = Field(
        False, description="Turn the image as its EXIF orientation says; torchvision does not."
    )

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """`crop` as height and width."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @model_validator(mode="after")
    def _std_divides(self) -> "PreprocessSpec":
        if self.std is not None and min(self.std) <= 0:
            raise PydanticCustomError("std", "`std` above zero, since pixels are divided by it")
        return self

    @model_validator(mode="after")
    def _pixels_in_0_to_1(self) -> "PreprocessSpec":
        """Refuse what other libraries write for pixels in 0..255: no image would be recognised."""
        given = {"mean": self.mean or (), "std": self.std or ()}
        if all(abs(value) <= _LARGEST_OF_UNIT_PIXELS for one in given.values() for value in one):
            return self
        ours = []
        for key, values in given.items():
            by = PIXEL_RANGE if max(values, default=0) >= 1 else 1
            if values:
                ours.append(f"{key}: [{', '.join(f'{value / by:.6g}' for value in values)}]")
        raise PydanticCustomError(
            "pixel_range",
            "`mean` and `std` of pixels in 0..1; these are of pixels in 0..255, so write {ours}",
            {"ours": ", ".join(ours)},
        )


_MODEL_SOURCES = ("name", "onnx", "bundle")
_BELONGS = {
    "weights": "name",
    "num_classes": "name",
    "transform_input": "name",
    "layout": "onnx",
    "output_name": "onnx",
}
"""Keys of a model that go with one source only."""


class ModelSpec(_Spec):
    """The model: `name` (a library's), or `onnx` (your own file), or `bundle` (exported before)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "required": [source],
                    "properties": {
                        **{other: {"type": "null"} for other in _MODEL_SOURCES if other != source},
                        **{key: False for key, owner in _BELONGS.items() if owner != source},
                        source: {"type": "string"},
                    },
                }
                for source in _MODEL_SOURCES
            ]
        }
    )

    name: FileOrName | None = Field(
        None,
        description="Any torchvision classification model, such as resnet50; timm/NAME, one of "
        "timm's; hf/FOLDER, what transformers' save_pretrained wrote, or hf/OWNER/NAME of the "
        "Hugging Face hub.",
    )
    weights: FileOrName = Field(
        "DEFAULT",
        description="The library's name for them, path to a .pth or .safetensors file, or none.",
    )
    labels: FileOrName | None = Field(
        None, description="`imagenet`, or a text file with one name per line."
    )
    num_classes: Count | None = Field(
        None, description="Classes of the head; inferred from a weights file when absent."
    )
    transform_input: bool | None = Field(
        None,
        description="googlenet and inception_v3 with weights from a file: whether they normalise "
        "their input once more, as torchvision's own weights expect it.",
    )
    activation: Activation | None = Field(
        None,
        description="What makes scores of the model's output: softmax (classes that exclude each "
        "other), sigmoid (labels that do not, or one output for two classes), none. Default: "
        "softmax, or what an ONNX file's last operators say.",
    )
    onnx: FilePath | None = Field(None, description="Your own ONNX classifier.")
    layout: Literal["NCHW", "NHWC"] | None = Field(
        None, description="Layout of the ONNX file's input, where it cannot be told from its shape."
    )
    output_name: str | None = Field(
        None,
        description="Which output of the ONNX file, or tensor inside it, holds the class scores.",
    )
    bundle: FilePath | None = Field(None, description="Folder that `batchclf export` wrote.")
    preprocess: PreprocessSpec | None = Field(
        None, description="Default: the transforms that come with the weights."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSpec":
        given = [key for key in _MODEL_SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise PydanticCustomError(
                "one_source",
                "exactly one of name, onnx and bundle; found {found}",
                {"found": found},
            )
        for key, owner in _BELONGS.items():
            if key in self.model_fields_set and given != [owner]:
                raise PydanticCustomError(
                    "foreign_key",
                    "`{key}` goes with `{owner}`, not with `{given}`",
                    {"key": key, "owner": owner, "given": given[0]},
                )
        return self

    @property
    def weights_path(self) -> Path | None:
        """The weights file, where `weights` names a file rather than a torchvision enum member."""
        return Path(self.weights) if is_weights_path(self.weights) else None

    @property
    def library(self) -> str:
        """Whose model `name` is: one of `LIBRARIES`."""
        prefix, slash, _ = (self.name or "").partition("/")
        return prefix if slash and prefix in LIBRARIES[1:] else LIBRARIES[0]

    @property
    def folder(self) -> Path | None:
        """The folder that transformers wrote the model to, where `name` is of one: `hf//a/b`."""
        path = (self.name or "").partition("/")[2]
        return Path(path) if self.library == "hf" and os.path.isabs(path) else None

    @property
    def display_name(self) -> str:
        """`name` as messages say it: of a folder, its path alone."""
        return str(self.folder or self.name)

    @property
    def labels_path(self) -> Path | None:
        """The label file, where `labels` names one."""
        return None if self.labels in (None, "imagenet") else Path(self.labels)


class ProviderSpec(_Spec):
    """Where inference runs; a plain name means the provider's defaults."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {key: {"type": kind}}, "required": [key]},
                    "then": {"properties": {"name": {"const": owner}}},
                }
                for key, kind, owner in (
                    ("device_type", "string", "openvino"),
                    ("devices", "array", "cuda"),
                )
            ]
        }
    )

    name: Literal["cpu", "cuda", "openvino"]
    device_type: str | None = Field(
        None, description="openvino only: CPU, GPU, GPU.1, NPU, AUTO:GPU,CPU, ...; default CPU."
    )
    devices: Annotated[tuple[DeviceId, ...], BeforeValidator(_devices)] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="cuda only: the GPUs to use, such as [0, 1]; default the first.",
        json_schema_extra={"uniqueItems": True},
    )
    options: dict[str, ProviderOption] = Field(
        default_factory=dict, description="Passed to the ONNX Runtime provider verbatim."
    )
    allow_fallback: bool = Field(
        False,
        description="Run on the CPU, and say so, where the provider does not work here; "
        "otherwise the job ends with exit code 4.",
    )

    @model_validator(mode="after")
    def _keys_of_one_provider(self) -> "ProviderSpec":
        for key, owner in (("device_type", "openvino"), ("devices", "cuda")):
            if getattr(self, key) is not None and self.name != owner:
                raise PydanticCustomError(
                    "provider_key",
                    "`{key}` goes with {owner} only",
                    {"key": key, "owner": owner},
                )
        return self


class LoaderSpec(_Spec):
    """How images are read and decoded."""

    workers: AutoOrCount = Field("auto", description="Images decoded at once; auto: usable cores.")
    backend: DecodeBackend | Literal["auto"] = Field(
        "auto",
        description="Threads, or processes; auto: these where more than 4 workers feed a GPU.",
    )
    prefetch: AutoOrCount = Field(
        "auto", description="Batches decoded ahead of the streams; bounds the memory."
    )
    decode: DecodeMode = Field(
        "exact", description="exact: torchvision's pixels; fast: scaled JPEG decoding, close to it."
    )
    max_pixels: Count = Field(
        89_478_485,
        description="A larger image is recorded as too_large; the default is Pillow's own limit.",
    )
    max_bytes: Count = Field(
        2**31, description="A larger file is recorded as too_large_bytes, unread."
    )
    max_memory: AutoOrBytes = Field(
        "auto",
        description="Bytes that images of more than about 8 megapixels, and members of archives "
        "that inflate to as much, may take at once, until they are decoded; one after another "
        "beyond it; auto: a quarter of the memory that is available.",
    )
    max_seconds: Annotated[float, Field(gt=0, le=86_400), BeforeValidator(_as_float)] = Field(
        60.0,
        description="An image that takes longer to read and decode, also when tried once more by "
        "itself, is recorded as timeout.",
    )
    strict: bool = Field(
        False,
        description="Record damaged images that can still be decoded as corrupt, instead of a "
        "prediction with a warning.",
    )
    sixteen_bit: SixteenBit = Field(
        "scale",
        description="16-bit grey: scale: white is what the file says, or the most that its bits "
        "hold; stretch: each image from its darkest to its lightest value; clip: white from 255 "
        "on, as Pillow and torchvision have it.",
    )
    allow_outside_links: bool = Field(
        False, description="Follow symbolic links that lead out of the input folder."
    )


class RuntimeSpec(_Spec):
    """How inference uses the machine."""

    streams: AutoOrCount = Field("auto", description="Batches inferred at the same time.")
    threads: AutoOrCount = Field("auto", description="Threads within one batch's inference.")
    part: AutoOrCount = Field(
        "auto",
        description="On a CPU: images of a batch that are inferred at once; auto: what is fastest "
        "for the model, measured here once. Other devices infer whole batches.",
    )


class ErrorsSpec(_Spec):
    """How many bad images a job survives."""

    max: ErrorLimit = Field(None, description='null: record them all; a count, or a rate ("2%").')


def _workers(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_WORKERS):
        return value
    raise PydanticCustomError(
        "workers", "`auto` or a whole number from 1 to {most}", {"most": MAX_WORKERS}
    )


_ADDRESS = r"^(auto|local|(ray://)?[a-zA-Z0-9_.\-\[\]:]+:[0-9]{1,5})$"
"""In the words that Python and the JSON Schema's ECMAScript share."""


def _address(value: str) -> str:
    if re.fullmatch(_ADDRESS, value):
        return value
    raise PydanticCustomError("ray_address", "`auto`, `local`, HOST:PORT or ray://HOST:PORT")


_OF_RAY = (
    *("address", "workers", "num_cpus", "num_gpus", "resources", "max_retries", "runtime_env"),
    *("allow_fewer", "wait_for_nodes"),
)
"""Keys of an engine that go with ray only."""
Amount = Annotated[float, Field(gt=0, le=MAX_COUNT), BeforeValidator(_as_float)]
"""Of something that Ray deals out."""


class EngineSpec(_Spec):
    """Where the job's work is done: on this machine, or on the nodes of a Ray cluster."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"anyOf": [{"required": [key]} for key in _OF_RAY]},
            "then": {"properties": {"name": {"const": "ray"}}},
        }
    )

    name: Literal["local", "ray"]
    address: Annotated[
        str,
        AfterValidator(_address),
        WithJsonSchema({"type": "string", "pattern": _ADDRESS}),
    ] = Field(
        "auto",
        description="ray only: auto: the cluster that this machine is of; local: one of this "
        "machine alone, for this job; HOST:PORT of its head; ray://HOST:PORT of Ray's client.",
    )
    workers: Annotated[
        int | Literal["auto"],
        BeforeValidator(_workers),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "auto"},
                    {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS},
                ]
            }
        ),
    ] = Field("auto", description="ray only: at once; auto: as many as its nodes have room for.")
    num_cpus: Amount | None = Field(
        None,
        description="ray only: cores of each worker; default 4, or its node's share for a GPU.",
    )
    num_gpus: Annotated[float, Field(ge=0, le=64), BeforeValidator(_as_float)] | None = Field(
        None, description="ray only: GPUs of each worker; default 1 with provider cuda, else 0."
    )
    resources: dict[str, Amount] = Field(
        default_factory=dict, description="ray only: custom resources that each worker takes."
    )
    max_retries: Annotated[int, Field(ge=0, le=MAX_COUNT)] = Field(
        5, description="ray only: how often a range of images may be begun anew on other workers."
    )
    runtime_env: dict[str, JsonValue] = Field(
        default_factory=dict, description="ray only: Ray's runtime environment of the workers."
    )
    allow_fewer: bool = Field(
        False,
        description="ray only: go on without nodes where the job cannot run; otherwise it ends.",
    )
    wait_for_nodes: Annotated[float, Field(ge=0, le=86_400), BeforeValidator(_as_float)] | None = (
        Field(
            None,
            description="ray only: seconds to wait for a node with what a worker takes, which an "
            "autoscaler may start: at the start, and where all nodes are lost. Default 300; at the "
            "start 0 where there are nodes, though none with that.",
        )
    )

    @model_validator(mode="after")
    def _keys_of_ray(self) -> "EngineSpec":
        usual = EngineSpec.model_construct(name="local")
        given = [key for key in _OF_RAY if getattr(self, key) != getattr(usual, key)]
        if self.name != "ray" and given:  # run.json tells the usual values, too
            raise PydanticCustomError("engine_key", "`{key}` goes with ray only", {"key": given[0]})
        return self


class JobSpec(_Spec):
    """One job: classify the images of `input` with `model` and write records to `output`."""

    model_config = ConfigDict(
        json_schema_extra={  # what `_suits_ray` says
            "if": {
                "required": ["engine"],
                "properties": {
                    "engine": {
                        "anyOf": [
                            {"const": "ray"},
                            {"required": ["name"], "properties": {"name": {"const": "ray"}}},
                        ]
                    }
                },
            },
            "then": {
                "properties": {
                    "output": {"not": {"pattern": f"^({'|'.join(BUCKETS)})://"}},
                    "provider": {"properties": {"devices": {"type": "null"}}},
                }
            },
        }
    )

    input: InputSpec = Field(
        description="Folder (walked recursively), one image, glob, .txt or .jsonl list, `-` (a "
        "list on stdin), .tar, .zip or .parquet; s3://, gs://, az:// or https://; or a list of any."
    )
    output: OutputSpec = Field(
        description="Folder for the results, created; or an address in a bucket."
    )
    model: ModelSpec
    provider: Annotated[
        ProviderSpec,
        BeforeValidator(
            _name_to_mapping,
            json_schema_input_type=Literal["cpu", "cuda", "openvino"] | ProviderSpec,
        ),
    ] = Field(ProviderSpec(name="cpu"), description="Where inference runs.")
    precision: Precision = Field(
        "fp32", description="cpu: fp32, int8; cuda: fp32, fp16; openvino: fp32, bf16, fp16, int8."
    )
    min_agreement: Annotated[float, Field(ge=0, le=1), BeforeValidator(_as_float)] = Field(
        0.93,
        description="Least share of a sample of the images whose top class at a reduced precision "
        "must be that at fp32; otherwise the job ends with exit code 5.",
    )
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(
        16,
        description="Images that are decoded and handed over together; a GPU infers them all at "
        "once and wants 64 or more.",
    )
    top_k: Count = Field(5, description="Classes per record, best first.")
    loader: LoaderSpec = LoaderSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    stall_timeout: Annotated[float, Field(gt=0, le=86_400), BeforeValidator(_as_float)] = Field(
        120.0,
        description="Seconds without progress after which the job's process is started again; ten "
        "times as many while it keeps a core busy.",
    )
    errors: ErrorsSpec = ErrorsSpec()
    engine: Annotated[
        EngineSpec,
        BeforeValidator(
            _name_to_mapping, json_schema_input_type=Literal["local", "ray"] | EngineSpec
        ),
    ] = EngineSpec(name="local")

    @model_validator(mode="after")
    def _suits_ray(self) -> "JobSpec":
        if self.engine.name == "ray" and self.provider.devices is not None:
            raise PydanticCustomError(
                "not_with_ray",
                "no `provider.devices` with engine ray, which deals the GPUs out: "
                "`engine.num_gpus` says how many each worker gets",
            )
        if self.engine.name == "ray" and isinstance(self.output, str):
            raise PydanticCustomError(
                "not_with_ray",
                "a folder as `output` with engine ray, which all nodes reach by one path; buckets "
                "are written to by engine local",
            )
        return self


def recorded_job(told: Mapping[str, Any]) -> JobSpec:
    """The job that run.json tells, with every key, also those that do not go with each other."""
    model = {key: value for key, value in told["model"].items() if value is not None}
    if "name" not in model:
        del model["weights"]  # the default
    return JobSpec.model_validate({**told, "model": model})


def runs_on_cpu(provider: ProviderSpec) -> bool:
    """Whether inference shares the cores with decoding; OpenVINO's default device is the CPU."""
    return provider.name == "cpu" or (
        provider.name == "openvino" and provider.device_type in (None, "CPU")
    )


def has_processes(provider: ProviderSpec) -> bool:
    """Whether a job has a process for each of its devices: one needs none."""
    return len(provider.devices or ()) > 1


def gpus_of(provider: ProviderSpec) -> tuple[int, ...]:
    """The numbers of the NVIDIA GPUs that a job runs on."""
    return (provider.devices or (0,)) if provider.name == "cuda" else ()


def auto(value: int | str, default: int) -> int:
    """A key's own number, or `default` where it says `auto`."""
    return value if isinstance(value, int) else default
