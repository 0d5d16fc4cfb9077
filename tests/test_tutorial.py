"""The tutorial is a notebook that runs from its first cell to its last."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml

from tests.conftest import BY_HAND, ROOT

NOTEBOOK = ROOT / "samples" / "tutorial.ipynb"


@pytest.mark.slow
@BY_HAND
def test_the_tutorial_runs_with_random_weights_in_the_place_of_a_download(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "jobs" / "cpu.yaml").read_text())
    job["model"] = {"name": "resnet18", "weights": "none"}
    job["input"] = str(ROOT / "samples" / "photos")
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    text = NOTEBOOK.read_text()
    for told, own in (("../jobs/cpu.yaml", "job.yaml"), ("../runs/tutorial", "runs")):
        assert text.count(told) == 1
        text = text.replace(told, str(tmp_path / own))
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": ROOT / "samples"}}
    ).execute()
    said = {
        cell["id"]: "".join(one.get("text", "") for one in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert len(said["cell-07"].splitlines()) == 5
    assert "CPUExecutionProvider" in said["cell-09"]
    assert "same top class as cpu on 6 of 6" in said["cell-09"]
    assert "PyTorch eager" in said["cell-11"]
    assert "image/png" in notebook.cells[-1].outputs[0]["data"]


def test_the_tutorial_is_committed_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
