"""Every code that a record may hold is explained, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from batchclf.results.codes import ERROR_CODES, WARNING_CODES
from tests.conftest import ROOT

FAILURES = ("Failure", "BadImage")
NOTES = ("images/notes.py", "images/deep.py", "images/decode.py", "images/jpeg.py")
NOTE = re.compile(
    r"(16bit|jpeg|missing|has|extension|exif)_[a-z]+|icc_ignored|(animated|pages|16bit_range):"
)
"""How a warning's text begins or is."""


def modules() -> Iterator[Path]:
    return (ROOT / "batchclf").rglob("*.py")


def first_texts(tree: ast.AST) -> Iterator[str]:
    """The codes that calls which make a failure are given as they stand."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = node.args[:1] if name in FAILURES else []
        given += [one.value for one in node.keywords if one.arg == "code"]
        yield from (
            one.value
            for one in given
            if isinstance(one, ast.Constant) and isinstance(one.value, str)
        )


def test_every_error_code_is_explained_and_no_other() -> None:
    made = {text for module in modules() for text in first_texts(ast.parse(module.read_bytes()))}
    assert made == set(ERROR_CODES)


def test_every_warning_is_explained_and_no_other() -> None:
    texts = {
        node.value
        for module in NOTES
        for node in ast.walk(ast.parse((ROOT / "batchclf" / module).read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    made = {text for text in texts if NOTE.fullmatch(text)}
    told = {re.sub(r"[A-Z-]+$", "", code) for code in WARNING_CODES}
    assert made == told
