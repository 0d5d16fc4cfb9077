"""The job file: YAML text to a validated, frozen `JobSpec`.

Paths in the file are relative to the file; paths in command-line overrides are relative to the
current folder. Every error names the file (and line), the key, what was found, what is allowed
and, where there is one, the nearest valid name.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from batchclf.errors import JobFileError
from batchclf.results.records import DecodeMode, Interpolation

MAX_JOB_FILE_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_INTEGER = 2**53
"""Largest whole number that every reader of JSON keeps, so the largest that run.json holds."""
MAX_COUNT = 1024
"""Most threads, streams or batches that a key may ask for: a typo must not start a million."""
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
PATH_KEYS = ("input", "output", "model.weights", "model.labels", "model.onnx", "model.bundle")
NAMED_KEYS = ("provider", "engine")
"""Keys that take either a plain name or a mapping with `name` in it."""


# ---- the types of single values ------------------------------------------------------------------


def _auto_or_count(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_COUNT):
        return value
    raise PydanticCustomError("auto_or_count", f"`auto` or a whole number from 1 to {MAX_COUNT}")


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
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) == 3 and all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
        return tuple(float(v) for v in numbers)
    raise PydanticCustomError("per_channel", "three numbers, for red, green and blue")


def _path(value: object) -> object:
    if isinstance(value, Path) or (isinstance(value, str) and value and _can_name_a_file(value)):
        return Path(value)
    raise PydanticCustomError("path", "a path, as text")


def _can_name_a_file(value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _file_or_name(value: str) -> str:
    if not _can_name_a_file(value):
        raise PydanticCustomError("path", "a name, or a path, as text")
    return value


def _provider_option(value: object) -> object:
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) <= MAX_INTEGER):
        return value
    raise PydanticCustomError("provider_option", "text, a number, true or false")


def _name_to_mapping(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


AutoOrCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_COUNT}]}
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
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}),
]
PerChannelAboveZero = Annotated[
    tuple[float, float, float],
    BeforeValidator(_per_channel),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0},
            "minItems": 3,
            "maxItems": 3,
        }
    ),
]
ProviderOption = Annotated[str | int | float | bool, BeforeValidator(_provider_option)]
FilePath = Annotated[
    Path, BeforeValidator(_path), WithJsonSchema({"type": "string", "minLength": 1})
]
FileOrName = Annotated[str, Field(min_length=1), AfterValidator(_file_or_name)]
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]


# ---- the job -------------------------------------------------------------------------------------


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PreprocessSpec(_Spec):
    """Overrides of the preprocessing that comes with the weights; every key is optional."""

    resize: EdgeOrSize | None = Field(
        None, description="Shorter edge in pixels after resizing, or [height, width]."
    )
    crop: EdgeOrSize | None = Field(None, description="Centre crop: the model's input size.")
    mean: PerChannel | None = Field(None, description="Per channel (RGB), of pixels in 0..1.")
    std: PerChannelAboveZero | None = Field(
        None, description="Per channel (RGB), of pixels in 0..1."
    )
    interpolation: Interpolation | None = Field(None, description="Resampling filter of resize.")
    exif_transpose: bool = Field(
        False, description="Turn the image as its EXIF orientation says; torchvision does not."
    )

    @model_validator(mode="after")
    def _std_divides(self) -> "PreprocessSpec":
        if self.std is not None and min(self.std) <= 0:
            raise PydanticCustomError("std", "`std` above zero, since pixels are divided by it")
        return self


_MODEL_SOURCES = ("name", "onnx", "bundle")
_BELONGS = {"weights": "name", "num_classes": "name", "layout": "onnx", "output_name": "onnx"}
"""Keys of a model that go with one source only."""


class ModelSpec(_Spec):
    """The model: `name` (torchvision), or `onnx` (your own file), or `bundle` (exported before)."""

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

    name: str | None = Field(
        None, min_length=1, description="Any torchvision classification model, such as resnet50."
    )
    weights: FileOrName = Field(
        "DEFAULT",
        description="torchvision weights name, path to a .pth or .safetensors file, or none.",
    )
    labels: FileOrName | None = Field(
        None, description="`imagenet`, or a text file with one name per line."
    )
    num_classes: Count | None = Field(
        None, description="Classes of the head; inferred from a weights file when absent."
    )
    onnx: FilePath | None = Field(None, description="Your own ONNX classifier.")
    layout: Literal["NCHW", "NHWC"] | None = Field(
        None, description="Layout of the ONNX file's input, where it cannot be told from its shape."
    )
    output_name: str | None = Field(
        None, description="Which output of the ONNX file holds the class scores, if several could."
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
        return Path(self.weights) if _is_weights_path(self.weights) else None

    @property
    def labels_path(self) -> Path | None:
        """The label file, where `labels` names one."""
        return None if self.labels in (None, "imagenet") else Path(self.labels)


class ProviderSpec(_Spec):
    """Where inference runs; a plain name means the provider's defaults."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"device_type": {"type": "string"}}, "required": ["device_type"]},
            "then": {"properties": {"name": {"const": "openvino"}}},
        }
    )

    name: Literal["cpu", "cuda", "openvino"]
    device_type: str | None = Field(None, description="openvino only: CPU, GPU, GPU.1, NPU, ...")
    options: dict[str, ProviderOption] = Field(
        default_factory=dict, description="Passed to the ONNX Runtime provider verbatim."
    )

    @model_validator(mode="after")
    def _device_type_is_openvinos(self) -> "ProviderSpec":
        if self.device_type is not None and self.name != "openvino":
            raise PydanticCustomError("device_type", "`device_type` goes with openvino only")
        return self


class LoaderSpec(_Spec):
    """How images are read and decoded."""

    workers: AutoOrCount = Field("auto", description="Decoding threads; auto: the usable cores.")
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
    allow_outside_links: bool = Field(
        False, description="Follow symbolic links that lead out of the input folder."
    )


class RuntimeSpec(_Spec):
    """How inference uses the machine."""

    streams: AutoOrCount = Field("auto", description="Batches inferred at the same time.")
    threads: AutoOrCount = Field("auto", description="Threads within one batch's inference.")


class ErrorsSpec(_Spec):
    """How many bad images a job survives."""

    max: ErrorLimit = Field(None, description='null: record them all; a count, or a rate ("2%").')


class EngineSpec(_Spec):
    """What spreads the job; this version runs on one machine."""

    name: Literal["local"]


class JobSpec(_Spec):
    """One job: classify the images of `input` with `model` and write records to `output`."""

    input: FilePath = Field(description="Folder (walked recursively), glob, .txt or .jsonl list.")
    output: FilePath = Field(description="Folder for the results; created.")
    model: ModelSpec
    provider: Annotated[
        ProviderSpec,
        BeforeValidator(
            _name_to_mapping,
            json_schema_input_type=Literal["cpu", "cuda", "openvino"] | ProviderSpec,
        ),
    ] = Field(ProviderSpec(name="cpu"), description="Where inference runs.")
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(
        16, description="Images per batch; a CPU gains nothing from more, a GPU wants 64 or more."
    )
    top_k: Count = Field(5, description="Classes per record, best first.")
    loader: LoaderSpec = LoaderSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    errors: ErrorsSpec = ErrorsSpec()
    engine: Annotated[
        EngineSpec,
        BeforeValidator(_name_to_mapping, json_schema_input_type=Literal["local"] | EngineSpec),
    ] = EngineSpec(name="local")


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Override:
    """A key set on the command line: `key` is dotted, `option` is how the user wrote it."""

    key: str
    value: object
    option: str


@dataclass(slots=True)
class _Document:
    """A parsed file: its plain data, and where each dotted key was written."""

    name: str
    data: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)


def load_job(path: Path, overrides: Sequence[Override] = ()) -> JobSpec:
    """Read and validate a job file.

    Raises:
        JobFileError: with every problem found, one a line.
    """
    document = _parse(path)
    _resolve_paths(document, path.absolute().parent)
    for override in overrides:
        _apply(document, override)
    try:
        return JobSpec.model_validate(document.data)
    except ValidationError as error:
        lines = [_describe(detail, document) for detail in error.errors(include_url=False)]
        raise JobFileError("\n".join(dict.fromkeys(lines))) from None


def parse_set(text: str) -> Override:
    """`loader.workers=8` as an override; the value is read as YAML.

    Raises:
        JobFileError: without `=`, or with a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobFileError(f"--set {text}: found no `=`; write --set key=value, such as top_k=3")
    try:
        return Override(key.strip(), yaml.load(value, _JobLoader), f"--set {text}")  # noqa: S506
    except _NOT_YAML as error:
        raise JobFileError(f"--set {text}: the value is not YAML: {error}") from None


def _is_weights_path(value: str) -> bool:
    return value.endswith(WEIGHT_SUFFIXES) or os.sep in value


def _resolve_paths(document: _Document, base: Path) -> None:
    """Make the path-valued keys absolute, in place; values of a wrong type are left to pydantic."""
    for key in PATH_KEYS:
        *parents, leaf = key.split(".")
        node: Any = document.data
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(leaf), str) and node[leaf]:
            node[leaf] = _resolve(key, node[leaf], base, document.origins[key])


def _resolve(key: str, value: str, base: Path, origin: str) -> str:
    if key == "model.labels" and value == "imagenet":
        return value
    if key == "model.weights" and not _is_weights_path(value):
        return value
    try:
        return os.path.normpath(base / Path(value).expanduser())
    except RuntimeError:  # ~ of a user who is not there
        raise JobFileError(
            f"{origin}: {key}: found {value}; allowed: a path; there is no such user's home folder"
        ) from None


def _apply(document: _Document, override: Override) -> None:
    *parents, leaf = override.key.split(".")
    node = document.data
    for depth, parent in enumerate(parents, start=1):
        child = node.get(parent)
        if parent in NAMED_KEYS and child is None:
            child = JobSpec.model_fields[parent].default.name
        if parent in NAMED_KEYS and isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
            document.origins[".".join(parents[:depth])] = override.option
        if not isinstance(child, dict):
            raise JobFileError(f"{override.option}: `{parent}` holds a value, not further keys")
        node[parent] = node = child
    value = override.value
    if override.key in PATH_KEYS and isinstance(value, str) and value:
        value = _resolve(override.key, value, Path.cwd(), override.option)
    node[leaf] = value
    for key in [one for one in document.origins if one.startswith(f"{override.key}.")]:
        del document.origins[key]  # replaced with what held it
    document.origins[override.key] = override.option


_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)
"""What PyYAML raises; not YAMLError for a scalar its tag cannot build: 2024-99-99, !!int ''."""


class _JobLoader(yaml.SafeLoader):
    """Plain data: no aliases (they can be nested into a bomb), no duplicates, bounded depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (`*name`) are not allowed in a job file; write the value out",
                problem_mark=event.start_mark,
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                continue  # a collection as key: refused by the constructor
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key `{key_node.value}`; keep one of them",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> _Document:
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JOB_FILE_BYTES + 1)
    except OSError as error:
        raise JobFileError(
            f"{name}: cannot be read: {error.strerror}; `batchclf init {name}` writes one to start"
        ) from None
    if len(raw) > MAX_JOB_FILE_BYTES:
        raise JobFileError(f"{name}: larger than 1 MB; a job file is a page of YAML")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobFileError(
            f"{name}: not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}; "
            "save the job file as UTF-8"
        ) from None
    try:
        loader = _JobLoader(text)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.reader.ReaderError as error:
        raise JobFileError(
            f"{name}: not a text file: character {error.character:#x} at offset {error.position}; "
            "a job file is YAML text"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise JobFileError(f"{name}{line}: not a valid job file: {problem}") from None
    except _NOT_YAML as error:
        raise JobFileError(f"{name}: not a valid job file: {error}") from None
    if node is None or not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise JobFileError(
            f"{name}: found {found}; a job file is a mapping with input, output, model"
        )
    return _Document(name, {str(key): value for key, value in data.items()}, _origins(name, node))


def _origins(name: str, node: yaml.Node, prefix: str = "") -> dict[str, str]:
    """Where each dotted key stands, as `file:line`."""
    found: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            found[key] = f"{name}:{key_node.start_mark.line + 1}"
            found |= _origins(name, value_node, f"{key}.")
    return found


# ---- explaining ----------------------------------------------------------------------------------


def _describe(detail: ErrorDetails, document: _Document) -> str:
    """One validation error as a line: where, key, what was found, what is allowed."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    origin, written = _written(location, document)
    if detail["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        hint = _nearest(location[-1], allowed)
        return f"{origin}: unknown key `{key}`{hint}; keys here: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{document.name}: the key `{key}` is missing: {_help_for(location)}"
    allowed_text = detail["msg"].removeprefix("Input should be ")
    if detail["type"] == "model_type":
        allowed_text = f"a mapping with {', '.join(_keys_at(location))}"
    if detail["type"] in ("one_source", "foreign_key", "device_type", "std"):
        return f"{origin}: {written or key}: allowed: {allowed_text}"
    hint = ""
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        hint = _nearest(detail["input"], re.findall(r"'([^']+)'", allowed_text))
    return (
        f"{origin}: {written or key}: found {_show(detail['input'])}; allowed: {allowed_text}{hint}"
    )


def _written(location: list[str], document: _Document) -> tuple[str, str]:
    """Origin and dotted key of the innermost part of `location` that the user wrote."""
    for length in range(len(location), 0, -1):
        key = ".".join(location[:length])
        if key in document.origins:
            return document.origins[key], key
    return document.name, ""


def _keys_at(location: Sequence[str]) -> list[str]:
    return list(_fields_at(location))


def _fields_at(location: Sequence[str]) -> Mapping[str, FieldInfo]:
    spec: type[BaseModel] = JobSpec
    for part in location:
        inner = _spec_in(spec.model_fields[part].annotation)
        if inner is None:
            return {}
        spec = inner
    return spec.model_fields


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _help_for(location: Sequence[str]) -> str:
    info = _fields_at(location[:-1]).get(location[-1])
    if info is None:
        return "required"
    spec = _spec_in(info.annotation)
    return info.description or (spec.__doc__ if spec else None) or "required"


def _nearest(found: str, allowed: Sequence[str]) -> str:
    matches = difflib.get_close_matches(found, allowed, n=1, cutoff=0.5)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
