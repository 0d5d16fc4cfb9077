"""What a report tells of records: counts, and a few examples of each kind.

Records pass by once. What is kept does not depend on their number, only on that of the classes.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import Literal

from batchclf.results.output import Line
from batchclf.results.records import Entry, ImageRef

NUM_BINS = 20
"""Of scores, of equal width from 0 to 1."""
NUM_OF_KIND = 36
NUM_OF_LABEL = 4
NUM_OF_CODE = 5

Kind = Literal["mistake", "unsure", "close", "certain", "sample", "failed"]
"""Why an image is an example: mistake: its class is another, and its score high; unsure, certain:
its score is among the lowest, or the highest; close: its second score is nearly as high; sample:
drawn from those with its label."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image that may be shown."""

    ref: ImageRef
    line: Line
    truth: int | None
    """The index of its true class, where that is known."""


@dataclass(slots=True)
class ClassCount:
    """The images whose top class is this one."""

    index: int
    label: str
    num_images: int = 0
    total_score: float = 0.0
    samples: list[Example] = field(default_factory=list)

    @property
    def mean_score(self) -> float:
        return self.total_score / self.num_images


@dataclass(slots=True)
class CodeCount:
    """The images that failed with one code, and the first of them."""

    code: str
    num_images: int = 0
    examples: list[Example] = field(default_factory=list)


class _Highest:
    """Examples with the highest keys; of those that have the same, the first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Example]] = []

    def add(self, key: float, number: int, read: tuple[Entry, Line, int | None]) -> None:
        """Keep this one, if it is among them."""
        if len(self._heap) == NUM_OF_KIND and key <= self._heap[0][0]:
            return
        one = (key, -number, _example(number, read))
        if len(self._heap) < NUM_OF_KIND:
            heappush(self._heap, one)
        else:
            heappushpop(self._heap, one)

    def __iter__(self) -> Iterator[Example]:
        """The highest first."""
        return (example for _, _, example in sorted(self._heap, reverse=True))


class Digest:
    """Counts and examples of the records that were added."""

    def __init__(self) -> None:
        self.num_ok = 0
        self.errors: dict[str, CodeCount] = {}
        self.warnings: Counter[str] = Counter()
        self.bins = [0] * NUM_BINS
        self.has_probabilities = True
        """Whether all scores lie in 0 to 1."""
        self._classes: dict[int, ClassCount] = {}
        self._highest: Mapping[Kind, _Highest] = {
            kind: _Highest() for kind in ("mistake", "unsure", "close", "certain")
        }
        self._dice = random.Random(0)  # noqa: S311 - which samples are drawn is no secret

    @property
    def num_images(self) -> int:
        return self.num_ok + self.num_errors

    @property
    def num_errors(self) -> int:
        return sum(one.num_images for one in self.errors.values())

    def classes(self) -> list[ClassCount]:
        """Those that were predicted, the most frequent first."""
        return sorted(self._classes.values(), key=lambda one: (-one.num_images, one.index))

    def codes(self) -> list[CodeCount]:
        """Those of errors, the most frequent first."""
        return sorted(self.errors.values(), key=lambda one: (-one.num_images, one.code))

    def examples(self) -> Iterator[tuple[Kind, Example]]:
        """All that are kept, what most deserves a look first; an image may be of several kinds."""
        for kind, highest in self._highest.items():
            for example in highest:
                yield kind, example
        for code in self.codes():
            for example in code.examples:
                yield "failed", example
        classes = self.classes()
        for turn in range(NUM_OF_LABEL):
            for one in classes:
                if turn < len(one.samples):
                    yield "sample", one.samples[turn]

    def add_all(self, lines: Iterable[tuple[Entry, Line, int | None]]) -> None:
        """Count records: the image, its record, and the index of its true class."""
        for number, read in enumerate(lines):
            _, line, truth = read
            self.warnings.update(one.partition(":")[0] for one in line.get("warnings", ()))
            if line["status"] == "ok":
                self._add_ok(number, read, line["predictions"], truth)
            else:
                code = line["error"]["code"]
                found = self.errors.setdefault(code, CodeCount(code))
                found.num_images += 1
                if len(found.examples) < NUM_OF_CODE:
                    found.examples.append(_example(number, read))

    def _add_ok(
        self,
        number: int,
        read: tuple[Entry, Line, int | None],
        predictions: list[Line],
        truth: int | None,
    ) -> None:
        top = predictions[0]
        score, index = top["score"], top["index"]
        self.num_ok += 1
        if 0 <= score <= 1:
            self.bins[min(int(score * NUM_BINS), NUM_BINS - 1)] += 1
        else:
            self.has_probabilities = False
        if (found := self._classes.get(index)) is None:
            found = self._classes[index] = ClassCount(index, top["label"])
        found.num_images += 1
        found.total_score += score
        if len(found.samples) < NUM_OF_LABEL:
            found.samples.append(_example(number, read))
        elif (place := self._dice.randrange(found.num_images)) < NUM_OF_LABEL:
            found.samples[place] = _example(number, read)
        self._highest["certain"].add(score, number, read)
        self._highest["unsure"].add(-score, number, read)
        if len(predictions) > 1:
            self._highest["close"].add(predictions[1]["score"] - score, number, read)
        if truth is not None and truth != index:
            self._highest["mistake"].add(score, number, read)


def _example(number: int, read: tuple[Entry, Line, int | None]) -> Example:
    entry, line, truth = read
    return Example(ImageRef(number, *entry), line, truth)
