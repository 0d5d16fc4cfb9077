"""Class names that come with a user's own model: inside the file, or in a file beside it.

Ultralytics writes `names` into the model's metadata, Custom Vision and Keras' tools write a text
file beside it, Optimum's exports have transformers' config.json with `id2label`.
"""

import ast
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from batchclf.errors import ModelError
from batchclf.models.labels import MAX_LABELS_BYTES, read_labels

METADATA_KEYS = ("names", "class_names", "classes", "labels", "id2label")
"""Metadata of an ONNX file in which exporters write class names, Ultralytics' first."""
CONFIG_FILE = "config.json"
LABEL_FILES = ("labels.txt", "class_names.txt", "classes.txt")


def labels_in(text: str) -> tuple[str, ...]:
    """The class names that a metadata value holds; empty: none that can be read.

    A list of them or a dictionary from index to name, as JSON or as Python prints it.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():  # of odd backslashes in what is no source of ours
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ()
    return labels_of(value)


def labels_of(value: object) -> tuple[str, ...]:
    """Class names in the order of their index; empty: `value` does not name each class once."""
    if isinstance(value, Mapping):
        try:
            by_index = {int(index): name for index, name in value.items()}
        except (ValueError, TypeError, OverflowError):
            return ()
        if sorted(by_index) != list(range(len(value))):
            return ()
        value = [by_index[index] for index in range(len(by_index))]
    if not isinstance(value, list | tuple):
        return ()
    names = tuple(name.strip() if _is_text(name) else "" for name in value)
    return () if "" in names else names


def _is_text(name: object) -> TypeGuard[str]:
    """Whether a name can be written into a file: JSON and Python can hold half a character."""
    return isinstance(name, str) and not any("\ud800" <= one <= "\udfff" for one in name)


def labels_beside(model: Path) -> list[tuple[tuple[str, ...], Path]]:
    """The class names of each file beside a model that holds some, the likeliest first."""
    found = []
    folders = [model.parent]
    if model.parent.name == "onnx":  # as Optimum lays out a repository of the Hugging Face hub
        folders.append(model.parent.parent)
    for folder in folders:
        found.append((_id2label(folder / CONFIG_FILE), folder / CONFIG_FILE))
        for name in LABEL_FILES:
            found.append((_lines(folder / name), folder / name))
    return [(labels, path) for labels, path in found if labels]


def _id2label(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_LABELS_BYTES))
    except (OSError, ValueError, RecursionError):
        return ()  # not a file of transformers', and not one that the job names
    return labels_of(config.get("id2label")) if isinstance(config, Mapping) else ()


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return read_labels(path) if path.is_file() else ()
    except (ModelError, OSError):
        return ()
