"""How much of a cluster a worker takes, and how many images it is given; no cluster is needed."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from batchclf.engines.ray import pace
from batchclf.engines.ray.cluster import Need, Node, need_of
from batchclf.engines.ray.pace import RANGE_S, Pace
from batchclf.errors import ProviderError, UsageError
from batchclf.spec.job import JobSpec


def node(**total: float) -> Node:
    return Node("id", "name", total)


def job(provider: str = "cpu", **engine: object) -> JobSpec:
    return JobSpec.model_validate(
        {
            "input": "/in",
            "output": "/out",
            "model": {"onnx": "/a.onnx"},
            "provider": provider,
            "engine": {"name": "ray", **engine},
        }
    )


@pytest.mark.parametrize(
    ("nodes", "provider", "expected"),
    [
        ([node(CPU=64)], "cpu", Need(4, 0)),
        ([node(CPU=0), node(CPU=2), node(CPU=16)], "cpu", Need(2, 0)),
        ([node(CPU=32, GPU=4), node(CPU=12, GPU=2)], "cuda", Need(6, 1)),
        ([node(CPU=8), node(CPU=2, GPU=8)], "cuda", Need(1, 1)),
    ],
)
def test_a_worker_takes_its_share_of_the_smallest_node_that_will_do(
    nodes: list[Node], provider: str, expected: Need
) -> None:
    assert need_of(job(provider), nodes) == expected


def test_what_the_job_asks_for_is_what_each_worker_takes() -> None:
    asked = job("cuda", num_cpus=1.5, num_gpus=0.5, resources={"disk": 1})
    there = [node(CPU=8, GPU=1, disk=1)]
    need = need_of(asked, there)
    assert need.bundle == {"CPU": 1.5, "GPU": 0.5, "disk": 1}
    rooms = [need.room_on(one) for one in (*there, node(CPU=8, GPU=4), node(CPU=9, GPU=4, disk=3))]
    assert rooms == [1, 0, 3]
    assert Need(0.1, 0).room_on(node(CPU=0.3)) == 3


def test_what_no_node_has_is_refused() -> None:
    with pytest.raises(ProviderError, match="each worker needs 1 GPU, and no node"):
        need_of(job("cuda"), [node(CPU=8)])
    with pytest.raises(UsageError, match="provider cuda needs one"):
        need_of(job("cuda", num_gpus=0), [node(CPU=8, GPU=1)])
    with pytest.raises(UsageError, match=r"found: name: 8 CPU"):
        need_of(job(num_cpus=9), [node(CPU=8)])
    with pytest.raises(UsageError, match="each worker takes 1 CPU, and no node"):
        need_of(job(), [node(CPU=0), node(CPU=0.5)])


def test_ranges_grow_to_seconds_of_work_and_shrink_where_little_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now))
    worker, sizes = Pace(batch_size=16), []
    for _ in range(8):
        sizes.append(worker.size(10**9, 8))
        now += sizes[-1] / 1000  # it does 1,000 images a second
        worker.has_done(sizes[-1])
    assert sizes[0] == 128
    assert all(after <= 8 * before for before, after in pairwise(sizes))
    assert sizes[-1] == pytest.approx(1000 * RANGE_S, rel=0.01)
    assert [worker.size(left, 8) for left in (16_000, 1600, 100, 1)] == [1000, 100, 32, 32]
