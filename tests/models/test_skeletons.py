"""The models whose nodes the stand-in for GPUs places are those that are exported today."""

from pathlib import Path

import pytest

from tests.conftest import ONLY_IN_CI
from tests.gpu_standin import skeletons

QUICK = ("squeezenet1_1",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in QUICK else ONLY_IN_CI) for one in skeletons.names()],
)
def test_a_skeleton_is_what_its_model_is_exported_as(name: str, tmp_path: Path) -> None:
    kept = skeletons.outline(skeletons.kept(name))
    assert skeletons.outline(skeletons.exported(name, tmp_path)) == kept, (
        "the exporter, or torch, makes another model now: write the skeletons anew with "
        "`python -m tests.gpu_standin.skeletons`, and look at what the tests on the stand-in say"
    )


def test_there_is_a_skeleton_of_each_of_torchvisions_families() -> None:
    models = pytest.importorskip("torchvision.models")

    def families(names: list[str]) -> set[str]:
        return {models.get_model_builder(name).__module__ for name in names}

    assert families(skeletons.names()) == families(models.list_models(module=models)), (
        "write the skeletons of the others with `python -m tests.gpu_standin.skeletons NAME ...`"
    )
