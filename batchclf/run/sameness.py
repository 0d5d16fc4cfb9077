"""A model that says the same of whatever it sees is found out by its first answers."""

from collections.abc import Sequence

import numpy as np

from batchclf.results.records import Batch, Failure, Pixels, Prediction, Record

ENOUGH = 8
"""Different images with one answer that are no chance any more."""
FEW = 3
"""The same at the end of a job that has no more images."""
ENOUGH_SATURATED = 64
"""The same where every score is 0 or 1: a sure model says that of each image of one class, and the
first images of a listing may all be of one."""


class FirstAnswers:
    """Compares the answers to a job's first images; costs nothing once two of them differ."""

    def __init__(self) -> None:
        self._answer: tuple[Prediction, ...] | None = None
        self._pixels_HWC: Pixels | None = None
        self._num_same = 0
        self._is_over = False

    def look(self, batch: Batch, records: Sequence[Record]) -> str | None:
        """Take the next batch; returns what to warn of, once, when enough answers are the same.

        Images with the same pixels count as one: the same answer is right for them.
        """
        rows = iter(batch.pixels_NHWC)
        for loaded, record in zip(batch.loaded, records, strict=True):
            if self._is_over:
                return None
            if loaded.failure is not None:
                continue
            pixels_HWC = next(rows)
            if isinstance(record.outcome, Failure):
                continue
            if self._answer is None or self._pixels_HWC is None:
                self._answer, self._pixels_HWC = record.outcome, pixels_HWC.copy()
                self._num_same = 1
            elif record.outcome != self._answer:
                self._is_over = True
            elif not np.array_equal(pixels_HWC, self._pixels_HWC):
                self._num_same += 1
                if self._num_same == (ENOUGH_SATURATED if self._is_saturated() else ENOUGH):
                    return self._warning()
        return None

    def end(self) -> str | None:
        """What to warn of when there are no more images; None: nothing, or it was said."""
        is_told = self._is_over or self._is_saturated()
        return self._warning() if self._num_same >= FEW and not is_told else None

    def _is_saturated(self) -> bool:
        """Whether the one answer has no score but 0 and 1, to the last bit."""
        return all(one.score in (0, 1) for one in self._answer or ())

    def _warning(self) -> str:
        self._is_over = True
        assert self._answer
        best = self._answer[0]
        sees = "may not see them" if self._is_saturated() else "does not see them"
        return (
            f"WARNING: {self._num_same} different images all got one and the same answer, "
            f"{best.label!r} with score {best.score:.6g}: the model {sees}. Look at "
            "model.preprocess (mean, std, channels, crop), model.output_name and "
            "model.activation, or the file of the weights"
        )
