"""A job's predictions compared with true labels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from batchclf.errors import UsageError
from batchclf.results.output import Line, Output, open_output
from batchclf.results.records import Entry
from batchclf.scoring.classes import Classes, How, Match, Name, Namer, NoMatch, classes_of
from batchclf.scoring.figures import DEPTH, Figures, Tally
from batchclf.scoring.truth import Missing, Truth, chunks, open_truth

MAX_TOLD = 20
"""Reasons that a message lists."""
_WHY = {
    "none": "there is no true label of it",
    "several": "several true labels may be meant: for this path, or for a file name that is not "
    "unique",
}


@dataclass(frozen=True, slots=True)
class NameFound:
    """A true label as it is written, the class that it was taken for, and why."""

    name: str
    index: int
    how: How
    num_images: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Images that could not be compared, and why."""

    why: str
    num_images: int
    example: str


@dataclass(frozen=True, slots=True)
class Score:
    """How right a job's predictions are."""

    output: str
    truth: str
    """Where the true labels are from."""
    labels: str
    """Where the model's are from."""
    num_images: int
    """Of the job."""
    num_done: int
    """Those that have a record by now."""
    left_out: Sequence[LeftOut]
    names: Sequence[NameFound]
    figures: Figures


def score_output(output: Path, truth: str, *, allow_unmatched: bool = False) -> Score:
    """Compare a job's predictions, as far as there are some, with true labels.

    `truth`: a folder with a folder per class, a .csv, .tsv or .jsonl file, or `input`.
    `allow_unmatched`: leave out images of which no true label is found, or none of a class.

    Raises:
        UsageError: there are such images and they are not to be left out, or no others.
        BatchclfError: the output or the truth is not there, or cannot be read.
    """
    scoring = Scoring(open_output(output), truth)
    for _ in scoring.lines():
        pass
    return scoring.score(allow_unmatched=allow_unmatched)


class Scoring:
    """Compares a job's records with true labels while somebody reads them."""

    def __init__(self, output: Output, truth: str) -> None:
        """As `score_output`.

        Raises:
            BatchclfError: the truth is not there, or cannot be read.
        """
        self._output = output
        self._source = open_truth(truth, output)
        self._classes = classes_of(output)
        depth = min(DEPTH, output.record.fingerprint.top_k)
        self._counted = _Counted(Namer(self._classes), Tally(depth))

    @property
    def labels(self) -> Mapping[int, str]:
        """Of the model's classes, as far as they are known, by their index."""
        return self._classes.labels

    def lines(self) -> Iterator[tuple[Entry, Line, int | None]]:
        """Each image with a record, that record, and the index of its true class, if it has one.

        Raises:
            EnvironmentFailed: the records cannot be read, or are not those of the images.
        """
        for some in chunks(self._output.lines()):
            names = self._source.of([entry for entry, _ in some])
            yield from self._counted.add(some, names)

    def score(self, *, allow_unmatched: bool = False) -> Score:
        """What the records read so far come to.

        Raises:
            UsageError: as `score_output`.
        """
        source, classes, counted = self._source, self._classes, self._counted
        left_out = list(counted.left_out())
        if not counted.tally.cells or (left_out and not allow_unmatched):
            raise UsageError(_refusal(source, classes, counted, left_out))
        return Score(
            output=str(self._output.folder),
            truth=source.told,
            labels=classes.origin,
            num_images=self._output.listing.num_images,
            num_done=counted.num_done,
            left_out=left_out,
            names=list(counted.names()),
            figures=counted.tally.figures(classes.labels),
        )


@dataclass(slots=True)
class _Counted:
    """Records counted; what is kept is as large as there are classes and names."""

    namer: Namer
    tally: Tally
    num_done: int = 0
    num_of: Counter[Name | Missing] = field(default_factory=Counter)
    examples: dict[Name | Missing, bytes] = field(default_factory=dict)
    """The first image with each name that has no class."""

    def add(
        self, some: Sequence[tuple[Entry, Line]], names: Sequence[Name | Missing]
    ) -> Iterator[tuple[Entry, Line, int | None]]:
        """Count records of images with these true labels."""
        self.num_done += len(some)
        self.num_of.update(names)
        for (entry, line), name in zip(some, names, strict=True):
            match = None if isinstance(name, str) else self.namer(name)
            if isinstance(match, Match):
                self.tally.add(match.index, line)
                yield entry, line, match.index
            else:
                self.examples.setdefault(name, entry.path)
                yield entry, line, None

    def names(self) -> Iterator[NameFound]:
        """The names that have a class."""
        for name, match in self.namer.matches.items():
            if isinstance(match, Match):
                yield NameFound(name.text, match.index, match.how, self.num_of[name])

    def left_out(self) -> Iterator[LeftOut]:
        """Why images were not counted; the reason of the most images first."""
        for name in sorted(self.examples, key=lambda one: -self.num_of[one]):
            why = _WHY[name] if isinstance(name, str) else self._why(name)
            example = self.examples[name].decode(errors="backslashreplace")
            yield LeftOut(why, self.num_of[name], example)

    def _why(self, name: Name) -> str:
        match = self.namer(name)
        assert isinstance(match, NoMatch), "those with a class were counted"
        return f"{name.text!r} {match.why}"


def _refusal(truth: Truth, classes: Classes, counted: _Counted, left_out: Sequence[LeftOut]) -> str:
    num_images = sum(one.num_images for one in left_out)
    if not left_out:
        return "output: no image has a record yet; score it once the job has run for a while"
    told = "".join(
        f"\n  {one.num_images:,} images, such as {one.example}: {one.why}"
        for one in left_out[:MAX_TOLD]
    )
    if len(left_out) > MAX_TOLD:
        told += f"\n  and {len(left_out) - MAX_TOLD:,} reasons more"
    advice = "mend the truth, or leave these images out with --allow-unmatched"
    if not counted.tally.cells:
        advice = "mend the truth"
    return (
        f"truth: {truth.told}: {num_images:,} of {counted.num_done:,} images have no true label "
        f"that is a class of the model:{told}\n"
        f"  labels of the model: from {classes.origin}\n  {advice}"
    )
