"""What a tuning is asked for, and how much of its time is left."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from batchclf.results.records import DecodeMode, Precision


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What the command line asks of a tuning."""

    budget_s: float = 120.0
    batch_sizes: Sequence[int] = ()
    """Besides the job's own, as the next two; none: the usual ones, and those beside the best."""
    precisions: Sequence[Precision] = ()
    decodes: Sequence[DecodeMode] = ()

    @property
    def trial_s(self) -> float:
        """Seconds of steady state of one trial."""
        return min(2.0, max(0.25, self.budget_s / 60))

    @property
    def limit_s(self) -> float:
        """Seconds of one measurement of decoding or inference alone."""
        return self.trial_s / 2


class Clock:
    """How much of the budget is left."""

    def __init__(self, budget_s: float) -> None:
        self._started = time.perf_counter()
        self._prepared_s = 0.0
        self.budget_s = budget_s

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def prepared(self) -> None:
        """The stages share what is left from here on: a first export may take much."""
        self._prepared_s = self.elapsed_s

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until that share of the stages' time is spent; below zero afterwards."""
        end_s = self._prepared_s + share * (self.budget_s - self._prepared_s)
        return end_s - self.elapsed_s
