"""The embedded example, real handwritten digits through the whole path, and the other job files."""

from pathlib import Path

from batchclf.runtime.providers import installed_flavours
from batchclf.spec.file import load_job
from tests.conftest import JOBS, ROOT, Batchclf, read_records


def test_the_sample_job_reads_at_least_97_percent_of_the_digits_right(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    done = batchclf("run", ROOT / "jobs" / "sample.yaml", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    records = read_records(tmp_path / "out")
    right = sum(
        record["predictions"][0]["index"] == int(record["path"].split("/")[0]) for record in records
    )
    assert len(records) == 300
    assert right / len(records) >= 0.97
    assert done.json["num_images"] == done.json["num_ok"] == 300


def test_every_shipped_job_file_validates(batchclf: Batchclf) -> None:
    works = {"cpu", "openvino"} if "onnxruntime-openvino" in installed_flavours() else {"cpu"}
    for job in JOBS:
        done = batchclf("validate", job)
        assert done.exit_code == (0 if load_job(job).provider.name in works else 4), done.stderr
