"""Commands over an output in a bucket: what they do with a folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets import Server, running_server
from tests.conftest import Batchclf
from tests.tiny import write_tiny_job


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server() as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


def test_shards_in_a_bucket_are_merged_scored_converted_and_reported_there(
    server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    address = "s3://bucket/night"
    job = write_tiny_job(tmp_path, output=address)
    assert batchclf("run", job, "-o", tmp_path / "whole").exit_code == 0
    assert batchclf("run", job, "--shard", "0/2").exit_code == 0
    early = batchclf("merge", address)
    assert early.exit_code == 2
    assert f"output: {address}: not all of the 2 shards are complete:" in early.stderr
    assert "not begun: 1" in early.stderr
    assert batchclf("run", job, "--shard", "1/2").exit_code == 0
    merged = batchclf("merge", address, "--json")
    assert merged.exit_code == 0, merged.stderr
    assert json.loads(merged.stdout)["predictions"] == f"{address}/predictions.jsonl"
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    truth = tmp_path / "truth.csv"
    labels = [json.loads(line) for line in whole.splitlines()]
    truth.write_text(
        "path,label\n"
        + "".join(f"{one['path']},{one['predictions'][0]['label']}\n" for one in labels)
    )
    for output in (address, tmp_path / "whole"):
        csv = tmp_path / "night.csv"
        done = batchclf("convert", output, "--to", "csv", "-o", csv, "--overwrite", "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["num_records"] == len(labels)
        scored = batchclf("score", output, "--truth", truth, "--json")
        assert scored.exit_code == 0, scored.stderr
        assert json.loads(scored.stdout)["figures"]["top1"]["value"] == 1.0
        page = tmp_path / "night.html"
        reported = batchclf("report", output, "-o", page, "--overwrite", "--json")
        assert reported.exit_code == 0, reported.stderr
        assert json.loads(reported.stdout)["num_records"] == len(labels)
        assert f"{len(labels)} images classified" in page.read_text()


def test_an_address_where_no_job_has_begun_is_named(server: Server, batchclf: Batchclf) -> None:
    done = batchclf("score", "s3://bucket/nothing", "--truth", "truth.csv")
    assert done.exit_code == 2, done.stderr
    assert "output: s3://bucket/nothing: no job has begun there" in done.stderr
