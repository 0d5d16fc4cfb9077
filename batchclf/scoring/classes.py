"""The classes of a model, and which of them the name of a true label means."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from batchclf.errors import EnvironmentFailed, ModelError
from batchclf.models.bundle import Bundle, digest_of, find_cached, open_bundle
from batchclf.models.found_labels import labels_beside
from batchclf.models.labels import imagenet_labels, imagenet_synsets, read_labels
from batchclf.results.output import Output

How = Literal["exact", "index", "synset", "spelling", "synonym"]
"""spelling: but for case, underscores, hyphens and spaces; synonym: one of several names, which
commas separate."""
SAME_NAMES = 0.95
"""Of the classes known: if so many have ImageNet's name at their index, they are ImageNet's."""

_AS_IMAGENET = "which has 1,000 classes without names: they are taken for ImageNet's"
_FROM_RECORDS = (
    "the records, so only classes that stand in these are known: the model's bundle is not in the "
    "cache"
)


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model, as far as they are known."""

    labels: Mapping[int, str]
    """By their index."""
    num_classes: int | None
    """None: only those are known that stand in records."""
    origin: str
    """Where they are from, in words."""

    @property
    def are_nameless(self) -> bool:
        """Whether each is called by its index, as those of a model whose names nobody gave."""
        return all(label == str(index) for index, label in self.labels.items())

    @property
    def names(self) -> Mapping[int, str]:
        """What true labels may call them: a thousand that are nameless, as ImageNet does."""
        if self.are_nameless and self.num_classes == 1000:
            return dict(enumerate(imagenet_labels()))
        return self.labels


class Name(NamedTuple):
    """A true label, as it is written."""

    text: str
    is_index: bool = False
    """Whether it is meant as the index of a class: a number in JSON, a column of indices."""


@dataclass(frozen=True, slots=True)
class Match:
    """The class that a name means."""

    index: int
    how: How


@dataclass(frozen=True, slots=True)
class NoMatch:
    """Why a name means no class, and what might be meant."""

    why: str


def classes_of(output: Output) -> Classes:
    """The model's classes: those of its bundle, where that is at hand; else those in the records.

    Nothing is built or downloaded. Labels are the job's own if they have the digest that its run
    noted.

    Raises:
        EnvironmentFailed: the records cannot be read.
    """
    digest = output.record.fingerprint.labels
    for read, origin in _places(output):
        try:
            labels = read()
        except (ModelError, EnvironmentFailed):  # it has gone, is damaged, or may be anybody's
            continue
        if digest_of(labels) == digest:
            found = Classes(dict(enumerate(labels)), len(labels), origin)
            if found.names is not found.labels:
                return replace(found, origin=f"{origin}, {_AS_IMAGENET}")
            return found
    seen = {
        one["index"]: one["label"]
        for _, line in output.lines()
        for one in line.get("predictions", ())
    }
    return Classes(seen, None, _FROM_RECORDS)


def _places(output: Output) -> Iterator[tuple[Callable[[], tuple[str, ...]], str]]:
    """Where the labels of a job may be."""
    model = output.record.job["model"]
    given, bundle = model["labels"], model["bundle"]
    if given == "imagenet":
        yield imagenet_labels, "ImageNet"
    elif given is not None:
        yield partial(read_labels, Path(given)), str(given)
    for found, path in () if model["onnx"] is None else labels_beside(Path(model["onnx"])):
        yield partial(tuple, found), str(path)
    if bundle is not None:
        yield lambda: open_bundle(Path(bundle)).meta.labels, str(bundle)
    yield lambda: _labels_of(find_cached(output.record.fingerprint.model)), "the model's bundle"
    yield imagenet_labels, "ImageNet"


def _labels_of(bundle: Bundle | None) -> tuple[str, ...]:
    return () if bundle is None else bundle.meta.labels


class Namer:
    """Finds the class that a name means; a name that may mean several means none."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._found: dict[Name, Match | NoMatch] = {}
        self._names = labels = classes.names
        self._exact = _by_key((label, index) for index, label in labels.items())
        self._plain = _by_key((_plain(label), index) for index, label in labels.items())
        self._first = _by_key((_synonyms(label)[0], index) for index, label in labels.items())
        self._any = _by_key(
            (one, index) for index, label in labels.items() for one in _synonyms(label)
        )
        self._has_numbers = any(
            label.isdecimal() and label != str(index) for index, label in labels.items()
        )
        self._synsets = {one: index for index, one in enumerate(imagenet_synsets())}

    @property
    def matches(self) -> Mapping[Name, Match | NoMatch]:
        """All names that were asked for."""
        return self._found

    def __call__(self, name: Name) -> Match | NoMatch:
        """The class that a name means, or why it means none."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: Name) -> Match | NoMatch:
        if name.is_index:
            return self._by_index(name.text)
        if len(found := self._exact.get(name.text, ())) == 1:
            return Match(found[0], "exact")
        if name.text.isdecimal() and not self._has_numbers:
            return self._by_index(name.text)
        if re.fullmatch(r"n\d{8}", name.text):
            return self._by_synset(name.text)
        return self._by_name(name.text)

    def _by_index(self, text: str) -> Match | NoMatch:
        end = self._classes.num_classes
        if not text.isdecimal() or not text.isascii() or len(text) > 9:
            return NoMatch("is no index of a class")
        index = int(text)
        if end is None and index not in self._classes.labels:
            return NoMatch("is the index of a class that no record names")
        if end is not None and index >= end:
            return NoMatch(f"is no index of the model's classes, 0 to {end - 1}")
        return Match(index, "index")

    def _by_synset(self, text: str) -> Match | NoMatch:
        index = self._synsets.get(text)
        if index is None:
            return NoMatch("is none of the 1,000 synsets of ImageNet-1k")
        if self._are_imagenet():
            if self._classes.num_classes is None and index not in self._classes.labels:
                return NoMatch("is a class that no record names")
            return Match(index, "synset")
        name = imagenet_labels()[index]
        found = self._by_name(name)
        if isinstance(found, NoMatch):
            return NoMatch(f"is ImageNet's {name!r}, and that {found.why}")
        return Match(found.index, "synset")

    def _are_imagenet(self) -> bool:
        """Whether the classes are ImageNet-1k's in their order."""
        labels = self._names
        if self._classes.num_classes not in (None, 1000) or max(labels, default=1000) >= 1000:
            return False
        names = imagenet_labels()
        num_same = sum(
            _plain(names[index]) in _synonyms(label) or label == imagenet_synsets()[index]
            for index, label in labels.items()
        )
        return num_same >= SAME_NAMES * len(labels)

    def _by_name(self, text: str) -> Match | NoMatch:
        own = _synonyms(text)
        tries: tuple[tuple[How, Mapping[str, tuple[int, ...]], tuple[str, ...]], ...] = (
            ("exact", self._exact, (text,)),
            ("spelling", self._plain, (_plain(text),)),
            ("synonym", self._first, own[:1]),
            ("synonym", self._any, own),
        )
        several: tuple[int, ...] = ()
        for how, classes, keys in tries:
            found = tuple(sorted({index for key in keys for index in classes.get(key, ())}))
            if len(found) == 1:
                return Match(found[0], how)
            several = several or found
        if several:
            told = " or ".join(f"{index} ({self._names[index]})" for index in several[:4])
            return NoMatch(f"may be class {told}: give its index")
        near = difflib.get_close_matches(own[0], self._any, 1)
        if near:
            index = self._any[near[0]][0]
            return NoMatch(f"is no class; did you mean {self._names[index]!r}?")
        if self._classes.are_nameless and self._names is self._classes.labels:
            return NoMatch("is no index, and the model's classes have no names")
        return NoMatch("is no class of the model")


def _by_key(pairs: Iterator[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for key, index in pairs:
        if index not in found.get(key, ()):
            found[key] = (*found.get(key, ()), index)
    return found


def _plain(text: str) -> str:
    """A name without what people write differently: case, underscores, hyphens, spaces."""
    return " ".join(re.sub(r"[\s_-]+", " ", text).casefold().split())


def _synonyms(text: str) -> tuple[str, ...]:
    """The names that commas separate, each plain; there is one at least."""
    found = tuple(filter(None, map(_plain, text.split(","))))
    return found or (_plain(text),)
