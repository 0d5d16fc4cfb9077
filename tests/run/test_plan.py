"""What travels between processes is plain data: it survives pickling as it was."""

import pickle
from pathlib import Path

import pytest

from batchclf.images.source import source_of
from batchclf.models.resolve import resolve_model
from batchclf.results.files import RunFiles
from batchclf.results.records import (
    Failure,
    ImageRef,
    Prediction,
    Quarantined,
    Record,
    Shard,
    Stretch,
)
from batchclf.run.plan import Plan, Task
from batchclf.run.recovery import Beginning, Death, Progress, Recovery
from batchclf.runtime.classifier import open_reference
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from tests.results.common import a_record, placed
from tests.tiny import write_tiny_job


def a_plan(folder: Path) -> Plan:
    job = load_job(write_tiny_job(folder))
    model = resolve_model(job.model, batch_size=4, open_reference=open_reference, log=print)
    task = Task(job, source_of(job), model, num_images=300)
    guilty: Quarantined = {
        b"a.jpg": Failure("timeout", "too slow"),
        Stretch(b"a.parquet", 3, 9): Failure("decoder_crash", "killed by SIGSEGV"),
    }
    return Plan(task, batch_size=4, num_workers=2, backend="threads", quarantined=guilty)


@pytest.mark.parametrize(
    "kind", ["Task", "Plan", "Recovery", "RunRecord", "Listing", "Record", "RunOptions"]
)
def test_it_is_the_same_after_pickling(tmp_path: Path, kind: str) -> None:
    plan = a_plan(tmp_path)
    beginning = Beginning(1.0, 2.0, 3)
    values = {
        "Task": plan.task,
        "Plan": plan,
        "Recovery": (
            Recovery((1,), plan.quarantined, beginning=beginning),
            Death("died", (1, 2), by_kernel=True),
            Progress(7, plan.quarantined, beginning),
        ),
        "RunRecord": a_record(),
        "Listing": placed(RunFiles(tmp_path), [b"a", b"caf\xe9"]),
        "Record": Record(ImageRef(3, b"caf\xe9"), (Prediction("cat", 0, 0.5),), ("odd",)),
        "RunOptions": RunOptions(Shard(1, 3), limit=9),
    }
    assert pickle.loads(pickle.dumps(values[kind])) == values[kind]
