"""One cluster for all tests of engine ray: starting its nodes takes most of their time."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines.ray.cluster import QUICK, Cluster, cluster
from tests.faults.poison import poisoned_environment

collect_ignore = [] if find_spec("ray") else ["test_dealing.py"]


@pytest.fixture(scope="session")
def shared_cluster(model_cache: Path) -> Iterator[Cluster]:
    """A head without cores and two nodes of one core each, where poison works."""
    with cluster(2, env=poisoned_environment()) as found:
        yield found


@pytest.fixture
def ray_cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The same with two nodes again, whatever tests did; drivers find it."""
    for variable, text in {**QUICK, **poisoned_environment()}.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setenv("RAY_ADDRESS", shared_cluster.address)
    while len(shared_cluster.nodes) < 3:
        shared_cluster.add()
    return shared_cluster
