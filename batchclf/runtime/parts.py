"""A batch inferred in parts: what is handed over together need not be inferred together.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from collections.abc import Callable

import numpy as np

from batchclf.results.records import ActiveProvider, Pixels, Scores
from batchclf.runtime.classifier import OnnxClassifier
from batchclf.runtime.faults import is_out_of_memory
from batchclf.runtime.sessions import ORT_ERRORS


class InParts:
    """A classifier that infers the rows of a batch in parts of some size. Called from one thread.

    Where memory does not suffice for a part, the parts get smaller, if the session takes any batch,
    as those of provider cpu do: it is none the worse for a lack of memory.
    """

    def __init__(self, classify: OnnxClassifier, size: int, log: Callable[[str], None]) -> None:
        """`size`: images in a part. Tell `log` whenever the parts get smaller."""
        self._classify = classify
        self._size = size
        self._log = log

    @property
    def active(self) -> ActiveProvider:
        """The provider that the session was proven to run on."""
        return self._classify.active

    def __call__(self, pixels_NHWC: Pixels, num_rows: int | None = None) -> Scores:
        """Scores NK, float32, of the first `num_rows` rows; None: of all.

        Where the session takes one size only, there must be as many rows in `pixels_NHWC`, be they
        beyond `num_rows`: the last part is filled up with what lies beside it.

        Raises:
            Exception: of ONNX Runtime's, one of ORT_ERRORS.
        """
        end = len(pixels_NHWC) if num_rows is None else num_rows
        parts: list[Scores] = []
        first = 0
        while first < end:
            try:
                parts.append(self._infer(pixels_NHWC, first, min(first + self._size, end)))
            except ORT_ERRORS as error:
                self._get_smaller(error)
            else:
                first += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _infer(self, pixels_NHWC: Pixels, first: int, end: int) -> Scores:
        if self._classify.takes_any_batch:
            return self._classify(pixels_NHWC[first:end])
        start = min(first, len(pixels_NHWC) - self._size)
        scores_NK = self._classify(pixels_NHWC[start : start + self._size])
        return scores_NK[first - start : end - start]

    def _get_smaller(self, error: Exception) -> None:
        if self._size == 1 or not self._classify.takes_any_batch or not is_out_of_memory(error):
            raise error
        self._log(
            f"memory does not suffice for {self._size} images at once ({error}): "
            f"inferring batches in parts of {self._size // 2}"
        )
        self._size //= 2
