"""What is wrong with a job file, in words: where, which key, what was found, and what to write.

Some mistakes have advice of their own: those that the words of YAML or pydantic leave in the dark.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from batchclf.spec.input import TAGS
from batchclf.spec.job import JobSpec

MAX_SHOWN_CHARS = 300
_CONTRADICTIONS = ("one_source", "not_with_ray", "std", "secret")
"""Kinds of errors that are not about one value alone: what is allowed says it all."""
_BELONGINGS = ("foreign_key", "provider_key", "engine_key")
"""Kinds of errors that say themselves what goes with what."""
_MEANT = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "intel": "openvino",
    "float32": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}
"""What other programs call a value of ours, where no letters of it tell."""
_YAML_ADVICE = {
    r"'\t'": "YAML is indented with spaces, not with tabs",
    "cannot start any token": "write the value in quotes",
    "mapping values are not allowed": "write `key: value`, with a space after the colon and the "
    "keys of one mapping equally far indented; quote a value that has a colon in it",
    "could not find expected ':'": "write `key: value`, with a space after the colon",
    "unhashable key": "braces are YAML's own: fill the template in, or write the value in quotes",
    "escape": "within double quotes a backslash begins an escape: write the path in single quotes",
}
"""What to do about a problem, by words that YAML's parser uses for it; the first found decides."""


@dataclass(slots=True)
class Document:
    """A parsed file: its plain data, and where each dotted key was written."""

    name: str
    data: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)


def yaml_problem(problem: str) -> str:
    """What YAML's parser says, and what to do about it."""
    advice = next((told for words, told in _YAML_ADVICE.items() if words in problem), "")
    return shortened(problem) + (f"; {advice}" if advice else "")


def describe(detail: ErrorDetails, document: Document) -> str:
    """One validation error as a line: where, key, what was found, what is allowed."""
    location = [str(part) for part in detail["loc"] if part not in TAGS]
    key = shortened(".".join(location))
    origin, written = _written(location, document)
    if detail["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        hint = _nearest(location[-1], allowed)
        return f"{origin}: unknown key `{key}`; keys here: {', '.join(allowed)}{hint}"
    if detail["type"] == "missing":
        return f"{document.name}: the key `{key}` is missing: {_help_for(location)}"
    if detail["type"] in _BELONGINGS:
        return f"{origin}: {written or key}: {detail['msg']}"
    allowed_text = _allowed(detail, location)
    if detail["type"] in _CONTRADICTIONS:
        return f"{origin}: {written or key}: allowed: {allowed_text}"
    return f"{origin}: {written or key}: found {_show(detail['input'])}; allowed: {allowed_text}"


def _allowed(detail: ErrorDetails, location: Sequence[str]) -> str:
    """What may stand there, with what was probably meant."""
    kind, found = detail["type"], detail["input"]
    allowed = detail["msg"].removeprefix("Input should be ")
    if kind == "model_type":
        keys = _keys_at(location)
        allowed = f"a mapping with {', '.join(keys)}"
        if isinstance(found, str):
            allowed += f"; for the first of these write {{{keys[0]}: {_show(found)}}}"
    elif kind == "int_type" and isinstance(found, str) and found.isdecimal():
        allowed += ", without quotes"
    elif kind == "literal_error" and isinstance(found, str):
        allowed += _nearest(found, re.findall(r"'([^']+)'", allowed))
    return allowed


def _written(location: list[str], document: Document) -> tuple[str, str]:
    """Origin and dotted key of the innermost part of `location` that the user wrote."""
    for length in range(len(location), 0, -1):
        key = ".".join(location[:length])
        if key in document.origins:
            return document.origins[key], shortened(key)
    return document.name, ""


def _keys_at(location: Sequence[str]) -> list[str]:
    return list(_fields_at(location))


def _fields_at(location: Sequence[str]) -> Mapping[str, FieldInfo]:
    spec: type[BaseModel] = JobSpec
    for part in location:
        info = spec.model_fields.get(part)
        inner = None if info is None else _spec_in(info.annotation)
        if inner is None:
            return {}
        spec = inner
    return spec.model_fields


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_spec_in, get_args(annotation))), None)


def dotted_keys(location: Sequence[str] = ()) -> Iterator[str]:
    """Every key of a job file, with those that it lies in: `loader.workers`."""
    for name in _fields_at(location):
        yield ".".join((*location, name))
        yield from dotted_keys((*location, name))


def _help_for(location: Sequence[str]) -> str:
    info = _fields_at(location[:-1]).get(location[-1])
    if info is None:
        return "required"
    spec = _spec_in(info.annotation)
    return info.description or (spec.__doc__ if spec else None) or "required"


def _nearest(found: str, allowed: Sequence[str]) -> str:
    """Those that begin with what was found; else the one that is spelt most like it."""
    meant = _MEANT.get(found.lower(), found.lower())
    near = [one for one in allowed if meant and one.startswith(meant)]
    near = near or difflib.get_close_matches(meant, allowed, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else ""


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return shortened(text, 80)


def shortened(text: str, length: int = MAX_SHOWN_CHARS) -> str:
    """The beginning of a text, for a message: whoever wrote it may have made it huge."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
