"""Class names: ImageNet's, with their ids, or a text file with one name per line."""

from importlib import resources
from pathlib import Path

from batchclf.errors import ModelError
from batchclf.system.paths import unread

MAX_LABELS_BYTES = 64_000_000
"""A million long names, twice over."""


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 ImageNet-1k names in index order, as torchvision's weights carry them."""
    return _lines_of("imagenet_labels.txt")


def imagenet_synsets() -> tuple[str, ...]:
    """Their WordNet ids, such as n01440764, in the same order; the folders of ImageNet's files."""
    return _lines_of("imagenet_synsets.txt")


def _lines_of(name: str) -> tuple[str, ...]:
    text = resources.files("batchclf.models").joinpath(name).read_text("utf-8")
    return tuple(text.splitlines())


def read_labels(path: Path) -> tuple[str, ...]:
    """One name per line, in index order; a last empty line is none.

    Raises:
        ModelError: the file cannot be read, is too large or not UTF-8, or has an empty line in it.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_LABELS_BYTES + 1)
        if len(raw) > MAX_LABELS_BYTES:
            raise ModelError(
                f"model.labels: {path}: larger than {MAX_LABELS_BYTES:,} bytes; "
                "the file holds one class name per line"
            )
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(
            f"model.labels: {path}: cannot be read: {unread(path, error)}, or say `imagenet`"
        ) from None
    except UnicodeDecodeError as error:
        raise ModelError(
            f"model.labels: {path}: not UTF-8 text (byte at offset {error.start}); save it as UTF-8"
        ) from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    labels = tuple(line.strip() for line in lines)
    if "" in labels:
        raise ModelError(
            f"model.labels: {path}:{labels.index('') + 1}: found an empty line; "
            "the file holds one class name per line, in index order"
        )
    return labels


def require_label_count(labels: tuple[str, ...], num_classes: int, origin: str) -> None:
    """Refuse labels that would be shifted against the model's classes.

    Raises:
        ModelError: when the counts differ.
    """
    if len(labels) == num_classes:
        return
    hint = ""
    if labels and labels[0].startswith(("{", "[")):
        hint = f"; it looks like JSON ({labels[0][:40]!r}): write one name per line"
    elif len(labels) == 1:
        hint = f"; its one line is {labels[0][:40]!r}: write one name per line"
    elif len(labels) == num_classes + 1:
        hint = f"; is the first line ({labels[0][:80]!r}) a background class that this model lacks?"
    classes = "class" if num_classes == 1 else "classes"
    raise ModelError(
        f"model.labels: {origin}: found {len(labels):,} names for a model of "
        f"{num_classes:,} {classes}; give one name per class, in index order{hint}"
    )
