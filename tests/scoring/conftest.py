"""One finished job, whose facts the outputs of tests share."""

from pathlib import Path

import pytest

from tests.tiny import run_here, write_tiny_job


@pytest.fixture(scope="package")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job of 300 images in 10 folders; its model's classes have no names."""
    folder = tmp_path_factory.mktemp("template")
    run_here(write_tiny_job(folder))
    return folder / "out"
