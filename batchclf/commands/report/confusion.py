"""Which classes are taken for which others, as far as a page can show it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchclf.scoring.figures import Figures

MAX_SIDE = 20
MAX_PAIRS = 10
SHADES = 9
"""Of a cell of the matrix, beside none."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Images of one class that were taken for one."""

    count: int
    shade: int
    """0 where there is none; the larger its share of the class's images, the higher."""
    is_right: bool


@dataclass(frozen=True, slots=True)
class Row:
    """The images of one class."""

    label: str
    cells: Sequence[Cell]
    num_elsewhere: int
    """Taken for classes that have no column."""
    num_failed: int


@dataclass(frozen=True, slots=True)
class Confusions:
    """The matrix of the classes with most errors, and the pairs most often taken for each other."""

    labels: Sequence[str]
    """Of the columns, in the order of the rows."""
    rows: Sequence[Row]
    num_classes: int
    """In all; there may be more than rows."""
    pairs: Sequence[tuple[str, str, int]]
    """True label, predicted one, images."""


def confusions_of(figures: Figures) -> Confusions:
    """What of a confusion matrix is shown."""
    labels = {one.index: one.label for one in figures.classes}
    cells = {(truth, predicted): count for truth, predicted, count in figures.confusion}
    wrong = Counter({cell: count for cell, count in cells.items() if None not in cell})
    for cell in [cell for cell in wrong if cell[0] == cell[1]]:
        del wrong[cell]
    pairs = [
        (labels[truth], labels[predicted], count)
        for (truth, predicted), count in wrong.most_common(MAX_PAIRS)
        if predicted is not None
    ]
    shown = _most_confused(figures, wrong)
    return Confusions(
        labels=[labels[index] for index in shown],
        rows=[_row(index, shown, cells, labels[index]) for index in shown],
        num_classes=len(labels),
        pairs=pairs,
    )


def _most_confused(figures: Figures, wrong: Mapping[tuple[int, int | None], int]) -> list[int]:
    """The classes with most errors, given or received, in their own order."""
    errors: Counter[int] = Counter({one.index: 0 for one in figures.classes})
    for cell, count in wrong.items():
        for index in cell:
            if index is not None:
                errors[index] += count
    return sorted(index for index, _ in errors.most_common(MAX_SIDE))


def _row(
    truth: int, shown: Sequence[int], cells: Mapping[tuple[int, int | None], int], label: str
) -> Row:
    own = {predicted: count for (one, predicted), count in cells.items() if one == truth}
    total = sum(own.values())
    found = [
        Cell(count, -(-SHADES * count // total) if count else 0, predicted == truth)
        for predicted in shown
        for count in (own.get(predicted, 0),)
    ]
    num_failed = own.get(None, 0)
    num_elsewhere = total - num_failed - sum(cell.count for cell in found)
    return Row(label, found, num_elsewhere, num_failed)
