"""Writing settings back into a job file, beside its comments.

ruamel.yaml reads the file and writes it again; the job file's own loader has the last word on
whether that is still the same job. Spacing may be evened out, such as that within braces.
"""

import io
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken

from batchclf.errors import JobFileError
from batchclf.spec.file import MAX_JOB_FILE_BYTES, read_data
from batchclf.spec.job import JobSpec

Settings = Mapping[str, int | str]
"""Keys of a job file, dotted and at most two deep, and their values."""
_BY_HAND = "leave --apply out and write the settings into the file yourself"
_BOM = "\ufeff"
_PARTS = re.compile(r"(.*?^---[ \t]*\n)?(.*?)(^\.\.\.\s.*)?", re.DOTALL | re.MULTILINE)
"""What precedes the document, which may be comments, the document, and what follows it."""


def write_settings(path: Path, settings: Settings) -> None:
    """Set keys of a job file; its comments stay, each with its key.

    An absent key is added only where its default is something else.

    Raises:
        JobFileError: the file does not parse, cannot be written, or would lose something.
    """
    with _edited(path, settings) as copy:
        os.replace(copy, path.resolve())  # a link to the file stays one


def require_editable(path: Path) -> None:
    """Find out whether settings can be written into a job file, before there are any.

    Raises:
        JobFileError: as `write_settings`.
    """
    with _edited(path, {}):
        pass


@contextmanager
def _edited(path: Path, settings: Settings) -> Iterator[Path]:
    """A copy of the file beside it, with the settings; gone afterwards."""
    expected = read_data(path)
    changes = {}
    for key, value in settings.items():
        parent, _, leaf = key.rpartition(".")
        held = expected.get(parent) if parent else expected
        if value != _default(key) or (isinstance(held, dict) and leaf in held):
            _holder(expected, parent)[leaf] = changes[key] = value
    target = path.resolve()
    try:
        before = target.read_bytes().decode()
        after = _with_settings(path, before, changes)
        # In a folder of its own, whose name nobody can foresee: others may write to this one.
        with tempfile.TemporaryDirectory(prefix=".batchclf-", dir=target.parent) as folder:
            copy = Path(folder, target.name)
            copy.write_bytes(after.encode())
            shutil.copymode(target, copy)
            _require_the_same(path, read_data(copy) == expected, before, after)
            yield copy
    except OSError as error:
        raise JobFileError(f"{path}: cannot be written: {error.strerror}; {_BY_HAND}") from error


def _require_the_same(path: Path, is_expected: bool, before: str, after: str) -> None:
    lost = list(Counter(_remarks(before)) - Counter(_remarks(after)))
    if lost or not is_expected:
        what = f"losing `{lost[0]}`" if lost else "changing more of it"
        raise JobFileError(
            f"{path}: cannot be edited without {what}; move comments out of braces, or {_BY_HAND}"
        )


def _remarks(text: str) -> list[str]:
    """Everything behind a `#`, up to its line's end."""
    return [" ".join(one.split()) for one in re.findall("#.*", text)]


def _holder(data: Any, parent: str) -> Any:
    """The mapping at a key, a new one where there is none; the whole without a key."""
    if not parent:
        return data
    if not isinstance(data.get(parent), dict):
        data[parent] = type(data)()
    return data[parent]


def _default(key: str) -> object:
    parent, _, leaf = key.rpartition(".")
    spec: type[BaseModel] = type(JobSpec.model_fields[parent].default) if parent else JobSpec
    return spec.model_fields[leaf].default


# ---- through ruamel.yaml -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _AsWritten:
    """A number, null and the like, which is written as it was read: `~`, `0x10`, `1e-3`."""

    tag: str
    text: str


class _Constructor(RoundTripConstructor):
    """Leaves what is no string as it is written."""

    def construct_as_written(self, node: ScalarNode) -> _AsWritten:
        return _AsWritten(node.tag or "", node.value)


class _Representer(RoundTripRepresenter):
    """Writes it again."""

    def represent_as_written(self, scalar: _AsWritten) -> ScalarNode:
        return self.represent_scalar(scalar.tag, scalar.text)


for _kind in ("null", "bool", "int", "float", "timestamp"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_kind}", _Constructor.construct_as_written)
_Representer.add_representer(_AsWritten, _Representer.represent_as_written)


def _with_settings(path: Path, text: str, changes: Settings) -> str:
    parts = _PARTS.fullmatch(text.removeprefix(_BOM).replace("\r\n", "\n"))
    assert parts is not None
    head, body, tail = parts.groups("")
    yaml = YAML()
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.preserve_quotes = True
    yaml.width = MAX_JOB_FILE_BYTES  # no line is folded
    try:
        root = yaml.load(body)
    except YAMLError as error:
        told = " ".join(str(error).split())
        raise JobFileError(f"{path}: cannot be edited: {told}; {_BY_HAND}") from None
    steps = dict(reversed(list(_steps(root))))  # the first of each decides
    offset = steps.get(CommentedSeq, 0)
    yaml.indent(mapping=steps.get(CommentedMap, 2), sequence=offset + 2, offset=offset)
    for key, value in changes.items():
        _put(root, key, value)
    stream = io.StringIO()
    yaml.dump(root, stream)
    edited = head + stream.getvalue() + tail
    if text.startswith(_BOM):
        edited = _BOM + edited
    return edited.replace("\n", "\r\n") if "\r\n" in text else edited


def _steps(mapping: CommentedMap) -> Iterator[tuple[type, int]]:
    """How far the mappings and lists in block style are indented."""
    for value in mapping.values():
        is_collection = isinstance(value, CommentedMap | CommentedSeq) and len(value) > 0
        if is_collection and not value.fa.flow_style():
            yield type(value), value.lc.col - mapping.lc.col
            if isinstance(value, CommentedMap):
                yield from _steps(value)


def _put(root: CommentedMap, key: str, value: int | str) -> None:
    # A file that is all in braces may be JSON, and stays it.
    string = DoubleQuotedScalarString if root.fa.flow_style() else str
    parent, leaf = (string(part) for part in key.rpartition(".")[::2])
    if root.get(parent) == {}:
        root[parent].fa.set_flow_style()  # ruamel.yaml takes `{}` for either style
    holder = _holder(root, parent)
    if isinstance(value, str):
        value = string(value)
    if leaf in holder or not parent:
        holder[leaf] = value  # quoted as it was
    else:  # at its beginning: behind its last key stand the comments on what follows it
        _lower_comments(root, parent)
        holder.insert(0, leaf, value)


def _lower_comments(root: CommentedMap, parent: str) -> None:
    """Give the comments between a key and its block to the first key of the block.

    ruamel.yaml keeps a key's comments as a list: [2] is what stands behind it, with the lines that
    follow, [3] what stands before its block; [1] is what stands before the key itself.
    """
    holder, comments = root[parent], root.ca.items.get(parent)
    if holder.fa.flow_style() or not holder or comments is None:
        return
    above = comments[3] or []
    comments[3] = holder.ca.comment = None
    if comments[2] is not None:
        behind, newline, rest = comments[2].value.partition("\n")
        comments[2].value = behind + newline
        above = [CommentToken(rest, CommentMark(0)), *above]
    first = holder.ca.items.setdefault(next(iter(holder)), [None, None, None, None])
    first[1] = above + (first[1] or [])
