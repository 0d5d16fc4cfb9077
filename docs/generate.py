"""MkDocs calls this while it builds: tables that the code knows take the place of their marks."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from batchclf.results.codes import ERROR_CODES, WARNING_CODES
from batchclf.spec.job import JobSpec

Schema = Mapping[str, Any]
_NOT_SHOWN = ("JsonValue",)
_IN_WORDS = {
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "`null`",
    "object": "a mapping",
}


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page with its marks filled in."""
    tables: dict[str, Callable[[], str]] = {
        "<!-- keys -->": keys,
        "<!-- errors -->": lambda: codes(ERROR_CODES),
        "<!-- warnings -->": lambda: codes(WARNING_CODES),
    }
    for mark, made in tables.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def codes(explained: Mapping[str, str]) -> str:
    """A table of codes, each with what it means."""
    return table(("code", "meaning"), ((f"`{code}`", text) for code, text in explained.items()))


def keys() -> str:
    """The keys of the job file: a table of those at the top, and one of each mapping below."""
    schema = JobSpec.model_json_schema()
    parts = [_table_of_keys(schema, schema, ())]
    for path, mapping in _mappings(schema, schema, ()):
        parts.append(f"## `{'.'.join(path)}`\n\n{mapping.get('description', '')}\n")
        parts.append(_table_of_keys(mapping, schema, path))
    return "\n".join(parts)


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _mappings(
    mapping: Schema, schema: Schema, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Schema]]:
    for key, value in mapping["properties"].items():
        for one in _alternatives(value):
            if found := _defined(one, schema):
                yield (*path, key), found
                yield from _mappings(found, schema, (*path, key))


def _table_of_keys(mapping: Schema, schema: Schema, path: tuple[str, ...]) -> str:
    required = mapping.get("required", ())
    return table(
        ("key", "values", "default", "what it does"),
        (
            (
                f"`{'.'.join((*path, key))}`",
                " or ".join(_values(one, schema) for one in _alternatives(value)),
                "required" if key in required else _shown(value.get("default")),
                _cell(value.get("description") or _defined(value, schema).get("description", "")),
            )
            for key, value in mapping["properties"].items()
        ),
    )


def _alternatives(value: Schema) -> list[Schema]:
    found: list[Schema] = value.get("anyOf") or value.get("oneOf") or [value]
    return [deeper for one in found for deeper in ([one] if one is value else _alternatives(one))]


def _defined(value: Schema, schema: Schema) -> Schema:
    """The mapping that a schema refers to; empty: it is none of our own."""
    name = str(value.get("$ref", "")).rpartition("/")[2]
    found: Schema = {} if name in ("", *_NOT_SHOWN) else schema["$defs"][name]
    return found


def _values(value: Schema, schema: Schema) -> str:
    if _defined(value, schema):
        return "a mapping"
    if "const" in value or "enum" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    kind = str(value.get("type", "any"))
    if kind in ("integer", "number"):
        return _numbers(value, "whole number" if kind == "integer" else "number")
    if kind == "array":
        return f"list of {_values(value.get('items', {}), schema)}"
    return _IN_WORDS.get(kind, kind)


def _numbers(value: Schema, name: str) -> str:
    above = "above " if "exclusiveMinimum" in value else ""
    least = value.get("exclusiveMinimum", value.get("minimum"))
    most = value.get("maximum")
    if most is not None and most >= 2**31 and isinstance(most, int):
        most = None  # what integers reach, no limit that anybody meets
    if least is None:
        return name if most is None else f"{name} up to {most:,}"
    return f"{name} {above}{least:,}" + (" or more" if most is None else f" to {most:,}")


def _shown(default: object) -> str:
    if isinstance(default, Mapping):
        return "as below" if default else ""
    if default is None:
        return ""
    text = yaml.safe_dump(default, default_flow_style=True).partition("\n")[0]
    return f"`{text}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
