"""The bundle among the samples is what exporting the sample job gives today."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Batchclf, read_records

BUNDLE = ROOT / "samples" / "digits.bundle"
JOB = ROOT / "jobs" / "sample.yaml"


def test_the_bundle_of_the_samples_answers_as_a_fresh_export(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    assert batchclf("export", JOB, tmp_path / "fresh").exit_code == 0
    said = [
        json.loads((bundle / "model.json").read_text()) for bundle in (BUNDLE, tmp_path / "fresh")
    ]
    for key in ("name", "labels", "preprocess", "activation"):
        assert said[0][key] == said[1][key]
    answers = []
    for bundle in (BUNDLE, tmp_path / "fresh"):
        out = tmp_path / f"of-{bundle.name}"
        model = f"model={{bundle: {bundle}}}"
        done = batchclf("run", JOB, "--set", model, "-o", out)
        assert done.exit_code == 0, done.stderr
        answers.append(read_records(out))
    for shipped, fresh in zip(*answers, strict=True):
        assert shipped["path"] == fresh["path"]
        best = [record["predictions"][0] for record in (shipped, fresh)]
        assert best[0]["label"] == best[1]["label"]
        assert best[0]["score"] == pytest.approx(best[1]["score"], abs=1e-5)
