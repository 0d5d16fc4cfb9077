"""How a run makes one file of what a crew commits."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from batchclf.errors import ErrorLimitPassed, ResumeRefused
from batchclf.results.lines import Lines, encode
from batchclf.results.parts import Committed, Folders
from batchclf.results.records import ImageRef, Prediction, Record
from batchclf.results.stats import StatsCollector
from batchclf.run import classify, ready
from batchclf.run.classify import Work
from batchclf.run.crew import collect
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.reporter import Reporter
from batchclf.run.request import Run
from batchclf.run.serve import _Bench
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.tiny import Log, write_tiny_job

ERRORS = Counter({"corrupt": 4})


class FakeCrew:
    """Has 3 errors in no part yet, and commits them with another only once it is asked to stop."""

    def __init__(self, num_seen: int) -> None:
        self.is_stopped = False
        self._num_seen = num_seen

    def work(self, ranges: object, folders: object) -> Iterator[Committed | None]:
        yield Committed(0, 10, 10, Counter())
        while not self.is_stopped:
            yield None
        yield Committed(10, 10, 0, ERRORS)

    def underway(self) -> tuple[int, int]:
        return (0, 0) if self.is_stopped else (5, self._num_seen)

    def stop(self) -> None:
        self.is_stopped = True


def job(limit: int | str) -> JobSpec:
    return JobSpec.model_validate(
        {"input": "/in", "output": "/out", "model": {"onnx": "/a"}, "errors": {"max": limit}}
    )


def test_a_crew_that_was_hired_for_a_run_which_is_refused_then_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Mock()

    def refuse(*args: object) -> None:
        crew.close.assert_not_called()
        raise ResumeRefused("another model")

    monkeypatch.setattr(ready, "require_same_converted", refuse)
    spec = load_job(write_tiny_job(tmp_path))
    run = Run(spec, RunOptions(), Log(), StopRequest(), hire=lambda order: crew)
    with hold_output(spec), pytest.raises(ResumeRefused, match="another model"):
        run_job(run)
    crew.close.assert_called_once()


def collected(crew: Any, limit: int | str) -> list[int]:
    """The first images of the parts that were taken, in the order in which they were."""
    taken: list[int] = []
    sink = SimpleNamespace(num_images=0, tick=lambda: None)

    def take(path: Path, part: Committed) -> None:
        taken.append(part.first)
        sink.num_images += part.num_images

    sink.take = take
    work = SimpleNamespace(
        crew=crew,
        plan=SimpleNamespace(task=SimpleNamespace(job=job(limit), num_images=100), batch_size=4),
        stats=StatsCollector(lambda: 0.0, lambda: 0.0),
        reporter=Reporter(),
        stop=StopRequest(),
        num_streams=1,
    )
    ranges = SimpleNamespace(origin=0)
    folders = Folders(Path("parts"), Path("drafts"))
    with pytest.raises(ErrorLimitPassed, match=r"3 of 15 images failed; errors\.max is "):
        collect(cast(Any, work), cast(Any, ranges), folders, cast(Any, sink), ())
    return taken


@pytest.mark.parametrize("limit", [2, "2%"])
def test_errors_that_are_in_no_part_yet_count_and_their_records_are_there_when_the_job_ends(
    limit: int | str,
) -> None:
    crew = FakeCrew(num_seen=3)
    assert collected(crew, limit) == [0, 10]
    assert crew.is_stopped


def test_the_time_that_one_of_a_crew_takes_to_make_lines_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(records: Sequence[Record]) -> Lines:
        time.sleep(0.05)
        return encode(records)

    monkeypatch.setattr(classify, "encode", slow)
    stats = StatsCollector(lambda: 0.0, lambda: 0.0)
    stats.start(0.0)
    work = cast(Work, SimpleNamespace(stats=stats))
    bench = _Bench(work, Mock(), Mock(), Mock(), deque(), 0)
    bench._drafts.append(Mock(num_left=2))
    bench.write([Record(ImageRef(0, b"a"), (Prediction("cat", 0, 1.0),))])
    assert stats.snapshot().stage_s.write >= 0.05
