"""Several streams of inference at once, their results in the order of the batches."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from batchclf.results.records import (
    Batch,
    Failure,
    ImageRef,
    Loaded,
    Prediction,
    Record,
    Scores,
)
from batchclf.runtime.classifier import Classifier

Rank = Callable[[Scores], Sequence[tuple[Prediction, ...] | Failure]]
"""Scores of shape NK to each row's predictions."""
Timed = Callable[[float, float], None]
"""Told, once a batch: seconds waited for its pixels, seconds of inference."""


class Streams:
    """One thread per classifier, each taking the next batch until there is none.

    Use as a context manager. `next_batch` must hand batches out in order and return None at the
    end; batches handed out are always finished, so what comes out is a prefix of the input.
    """

    def __init__(
        self,
        next_batch: Callable[[], Batch | None],
        classifiers: Sequence[Classifier],
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

    def _work(self, classifier: Classifier) -> None:
        try:
            while True:
                started = time.perf_counter()
                batch = self._next_batch()
                if batch is None:
                    break
                received = time.perf_counter()
                scores_NK = classifier(batch.pixels_NHWC)[: len(batch.refs)]
                self._timed(received - started, time.perf_counter() - received)
                records = to_records(batch.refs, batch.loaded, self._rank(scores_NK))
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


def to_records(
    refs: Sequence[ImageRef],
    loaded: Sequence[Loaded],
    ranked: Sequence[tuple[Prediction, ...] | Failure],
) -> list[Record]:
    """The records of a batch, in its order: a failure to load stands before any prediction."""
    return [
        Record(ref, one.failure or outcome, one.warnings)
        for ref, one, outcome in zip(refs, loaded, ranked, strict=True)
    ]
