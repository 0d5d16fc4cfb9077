"""The job file: YAML text to a validated `JobSpec`.

Paths in the file are relative to the file; paths in command-line overrides are relative to the
current folder. Every error names the file (and line), the key, what was found, what is allowed
and, where there is one, the nearest valid name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from batchclf.errors import JobFileError
from batchclf.spec.explain import Document, describe, shortened, yaml_problem
from batchclf.spec.input import STDIN, is_address
from batchclf.spec.job import JobSpec, is_weights_path
from batchclf.system.paths import nearest, require_readable

MAX_JOB_FILE_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 10_000
"""Keys, values and lists: reading them costs 30 us each, and a job has a few dozen."""
MAX_SCALAR_CHARS = 8192
"""A path has 4,096 bytes at most; long numbers in base 60 take quadratic time to read."""
MAX_PROBLEMS = 20
"""As many are told at once: a file of junk has one a line."""
PATH_KEYS = (
    *("input", "output", "model.name", "model.weights", "model.labels", "model.onnx"),
    "model.bundle",
)
FOLDER_PREFIX = "hf/"
"""What a model's name begins with where it may go on with a folder."""
NAMED_KEYS = ("provider", "engine")
"""Keys that take either a plain name or a mapping with `name` in it."""

# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Override:
    """A key set on the command line: `key` is dotted, `option` is how the user wrote it."""

    key: str
    value: object
    option: str


def load_job(
    path: str | os.PathLike[str], overrides: Sequence[Override] | Mapping[str, object] = ()
) -> JobSpec:
    """Read and validate a job file.

    `overrides` are keys to replace, dotted, such as `{"loader.workers": 8}`; paths among their
    values are relative to the current folder.

    Raises:
        JobFileError: with every problem found, one a line.
        UsageError, EnvironmentFailed: the file cannot even be looked at.
    """
    if isinstance(overrides, Mapping):
        overrides = [Override(key, value, f"{key}={value}") for key, value in overrides.items()]
    path = Path(path)
    document = _parse(path)
    _resolve_paths(document, path.absolute().parent)
    for override in overrides:
        _apply(document, override)
    try:
        return JobSpec.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [describe(detail, document) for detail in details[:MAX_PROBLEMS]]
        if len(details) > MAX_PROBLEMS:
            lines.append(f"{document.name}: and {len(details) - MAX_PROBLEMS:,} more problems")
        raise JobFileError("\n".join(dict.fromkeys(lines))) from None


def read_data(path: Path) -> dict[str, Any]:
    """The data of a job file as it stands there: neither validated nor with paths resolved.

    Raises:
        JobFileError: the file cannot be read, or is not the YAML of a mapping.
    """
    return _parse(path).data


def parse_set(text: str) -> Override:
    """`loader.workers=8` as an override; the value is read as YAML.

    Raises:
        JobFileError: without `=`, or with a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    option = f"--set {shortened(text)}"
    if not equals or not key.strip():
        found = "no key before the `=`" if equals else "no `=`"
        raise JobFileError(f"{option}: found {found}; write --set key=value, such as top_k=3")
    if key.count(".") >= MAX_DEPTH:
        raise JobFileError(f"{option}: nested deeper than {MAX_DEPTH} levels")
    try:
        return Override(key.strip(), yaml.load(value, _JobLoader), option)  # noqa: S506
    except _NOT_YAML as error:
        raise JobFileError(f"{option}: the value is not YAML: {yaml_problem(str(error))}") from None


def _resolve_paths(document: Document, base: Path) -> None:
    """Make the path-valued keys absolute, in place; values of a wrong type are left to pydantic."""
    for key in PATH_KEYS:
        *parents, leaf = key.split(".")
        node: Any = document.data
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and leaf in node:
            node[leaf] = _resolve_all(key, node[leaf], base, document.origins[key])


def _resolve_all(key: str, value: Any, base: Path, origin: str) -> Any:
    """A path-valued key's value with the paths in it absolute: an input may hold several."""
    if isinstance(value, str):
        return _resolve(key, value, base, origin) if value else value
    if key == "input" and isinstance(value, list):
        return [_resolve_all(key, one, base, origin) for one in value]
    if key == "input" and isinstance(value, dict) and "parquet" in value:
        return value | {"parquet": _resolve_all(key, value["parquet"], base, origin)}
    return value


def _resolve(key: str, value: str, base: Path, origin: str) -> str:
    if key == "model.labels" and value == "imagenet":
        return value
    if key in ("input", "output") and is_address(value):
        return value
    if key == "input" and value == STDIN:
        return value
    if key == "model.weights" and not is_weights_path(value):
        return value
    if key == "model.name":
        rest = value.removeprefix(FOLDER_PREFIX)
        if rest == value or not _is_folder(rest, base):
            return value
        return FOLDER_PREFIX + _resolve("model.name (hf)", rest, base, origin)
    try:
        return os.path.normpath(base / Path(value).expanduser())
    except RuntimeError:  # ~ of a user who is not there
        raise JobFileError(
            f"{origin}: {key}: found {shortened(value)}; allowed: a path; "
            "there is no such user's home folder"
        ) from None


def _is_folder(value: str, base: Path) -> bool:
    """Whether what follows `hf/` is a folder, or is at least written as a path, and no hub name."""
    if value.startswith(("/", "./", "../", "~")):
        return True
    try:
        return (base / value).is_dir()
    except (OSError, ValueError):
        return False


def _apply(document: Document, override: Override) -> None:
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
            raise JobFileError(
                f"{override.option}: `{shortened(parent)}` holds a value, not further keys"
            )
        node[parent] = node = child
    value = os.fspath(override.value) if isinstance(override.value, Path) else override.value
    if override.key in PATH_KEYS:
        value = _resolve_all(override.key, value, Path.cwd(), override.option)
    node[leaf] = value
    for key in [one for one in document.origins if one.startswith(f"{override.key}.")]:
        del document.origins[key]  # replaced with what held it
    document.origins[override.key] = override.option


_NOT_YAML = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)
"""What PyYAML raises; not YAMLError for a scalar its tag cannot build: 2024-99-99, !!int ''."""


class _JobLoader(yaml.SafeLoader):
    """Plain data: no aliases (they can be nested into a bomb), no duplicates, bounded in depth,
    in the number of nodes and in the length of each."""

    depth = 0
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (`*name`) are not allowed in a job file; write the value out",
                problem_mark=event.start_mark,
            )
        self.depth += 1
        self.num_nodes += 1
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for is_over, problem in (
            (self.depth > MAX_DEPTH, f"nested deeper than {MAX_DEPTH} levels"),
            (self.num_nodes > MAX_NODES, f"more than {MAX_NODES:,} keys and values"),
            (
                isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR_CHARS,
                f"found a text longer than {MAX_SCALAR_CHARS:,} characters",
            ),
        ):
            if is_over:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
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


def _parse(path: Path) -> Document:
    name = str(path)
    require_readable(path, "JOB")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JOB_FILE_BYTES + 1)
    except IsADirectoryError:
        raise JobFileError(
            f"{name}: is a folder; a job is a YAML file: "
            f"`batchclf init job.yaml -i {name}` writes one"
        ) from None
    except OSError as error:
        raise JobFileError(
            f"{name}: cannot be read: {error.strerror}; `batchclf init {name}` writes one to start"
            f"{nearest(path)}"
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
        problem = yaml_problem(" ".join(filter(None, (error.context, error.problem))))
        raise JobFileError(f"{name}{line}: not a valid job file: {problem}") from None
    except _NOT_YAML as error:
        raise JobFileError(f"{name}: not a valid job file: {shortened(str(error))}") from None
    if node is None or not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise JobFileError(
            f"{name}: found {found}; a job file is a mapping with input, output, model"
        )
    return Document(name, {str(key): value for key, value in data.items()}, _origins(name, node))


def _origins(name: str, node: yaml.Node, prefix: str = "") -> dict[str, str]:
    """Where each dotted key stands, as `file:line`."""
    found: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            found[key] = f"{name}:{key_node.start_mark.line + 1}"
            found |= _origins(name, value_node, f"{key}.")
    return found
