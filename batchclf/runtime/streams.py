"""Several streams of inference at once, their results in the order of the batches.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from batchclf.results.records import (
    Batch,
    Failure,
    ImageRef,
    Loaded,
    Pixels,
    Prediction,
    Record,
    Scores,
)

Infer = Callable[[Pixels, int], Scores]
"""A batch's memory (uint8 NHWC) and the number of its rows to infer, to their float32 scores NK."""
Rank = Callable[[Scores], Sequence[tuple[Prediction, ...] | Failure]]
"""Scores of shape NK to each row's predictions."""
Timed = Callable[[float, float], None]
"""Told, once a batch: seconds waited for its pixels, seconds of inference."""


class Streams:
    """One thread per classifier, each taking the next batch until there is none.

    Only images that loaded are inferred: their rows are moved to the beginning of the batch.

    Use as a context manager. `next_batch` must hand batches out in order and return None at the
    end; batches handed out are always finished, so what comes out is a prefix of the input.
    """

    def __init__(
        self,
        next_batch: Callable[[], Batch | None],
        classifiers: Sequence[Infer],
        rank: Rank,
        timed: Timed,
    ) -> None:
        self._next_batch = next_batch
        self._rank = rank
        self._timed = timed
        self._results: dict[int, tuple[Batch, list[Record]]] = {}
        self._next = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._num_running = len(classifiers)
        self._threads = [
            threading.Thread(target=self._work, args=(one,), name=f"stream-{number}", daemon=True)
            for number, one in enumerate(classifiers)
        ]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.join()

    def results(self, tick_s: float) -> Iterator[tuple[Batch, list[Record]] | None]:
        """Each batch with its records, in order; None whenever `tick_s` seconds bring none.

        Raises:
            Exception: what a stream raised.
        """
        while True:
            with self._changed:
                ready = self._changed.wait_for(self._is_ready, tick_s)
                if self._error is not None:
                    raise self._error
                result = self._results.pop(self._next, None)
                if result is None and ready:
                    return
                if result is not None:
                    self._next += 1
            yield result

    def _is_ready(self) -> bool:
        return self._next in self._results or self._num_running == 0 or self._error is not None

    def _work(self, infer: Infer) -> None:
        try:
            while True:
                started = time.perf_counter()
                batch = self._next_batch()
                if batch is None:
                    break
                received = time.perf_counter()
                num_good = pack(batch)
                scores_NK = infer(batch.pixels_NHWC, num_good) if num_good else None
                self._timed(received - started, time.perf_counter() - received)
                ranked = [] if scores_NK is None else self._rank(scores_NK)
                records = to_records(batch.refs, batch.loaded, ranked)
                with self._changed:
                    self._results[batch.sequence] = (batch, records)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()


def pack(batch: Batch) -> int:
    """Move the rows of the images that loaded to the beginning, in their order; how many they are.

    Costs nothing where all of them did.
    """
    good = [row for row, one in enumerate(batch.loaded) if one.failure is None]
    for place, row in enumerate(good):
        if place != row:
            batch.pixels_NHWC[place] = batch.pixels_NHWC[row]
    return len(good)


def to_records(
    refs: Sequence[ImageRef],
    loaded: Sequence[Loaded],
    ranked: Sequence[tuple[Prediction, ...] | Failure],
) -> list[Record]:
    """The records of a batch, in its order; `ranked` is of the images that loaded."""
    answers = iter(ranked)
    return [
        Record(ref, one.failure or next(answers), one.warnings)
        for ref, one in zip(refs, loaded, strict=True)
    ]
