"""Commands over an output in a bucket: what they do with a folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchclf.cli.options import output_folder
from batchclf.commands import status
from batchclf.commands.status import status_of
from batchclf.results import mirror
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


def test_a_job_in_a_bucket_is_told_as_one_in_a_folder_is(
    server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    address, copy = "s3://bucket/told", tmp_path / "copy"
    job = write_tiny_job(tmp_path, output=address)
    assert batchclf("run", job, "--shard", "1/3").exit_code == 0
    copy.mkdir()
    for name, data in server.objects("told/").items():
        if not name.startswith("parts/"):
            (copy / name).write_bytes(data)
    told = batchclf("status", address, "--json", "--watch")
    assert told.exit_code == 0, told.stderr
    assert told.json | {"output": str(copy)} == batchclf("status", copy, "--json").json
    assert told.json["output"] == address
    assert [part["state"] for part in told.json["parts"]] == ["not begun", "complete", "not begun"]
    said = batchclf("status", address).stdout
    assert said == batchclf("status", copy).stdout
    assert "complete: 1\nnot begun: 0, 2\n" in said


def test_a_run_is_behind_its_bucket_as_long_as_it_writes_there(
    server: Server, batchclf: Batchclf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "s3://bucket/work"
    assert batchclf("run", write_tiny_job(tmp_path, output=address)).exit_code == 0
    record = json.loads(server.objects("work/")["run.json"]) | {"status": "running"}
    server.client.put_object(Bucket="bucket", Key="work/run.json", Body=json.dumps(record))
    assert status_of(address).state == "running"
    (part,) = status_of(address).parts
    assert part.seconds_since_news is not None
    monkeypatch.setattr(status, "SENT_S", -1.0)
    assert status_of(address).state == "stale"


def test_how_far_a_job_is_is_told_without_its_records_and_from_the_ends_of_files(
    server: Server, batchclf: Batchclf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "s3://bucket/ends"
    assert batchclf("run", write_tiny_job(tmp_path, output=address)).exit_code == 0
    whole, there = status_of(address), server.objects("ends/")
    size = len(there["stats.jsonl"].splitlines()[-1]) + 1
    monkeypatch.setattr(mirror, "END_BYTES", size)
    with mirror.fetched_figures(address) as folder:
        fetched = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fetched == {
        "listing.nul": there["listing.nul"][-size:],
        "run.json": there["run.json"],
        "stats.jsonl": there["stats.jsonl"][-size:],
    }
    assert len(there["listing.nul"]) > size
    assert status_of(address) == whole


@pytest.mark.parametrize("words", [("score", "--truth", "truth.csv"), ("status",)])
def test_an_address_where_no_job_has_begun_is_named(
    server: Server, batchclf: Batchclf, words: tuple[str, ...]
) -> None:
    command, *options = words
    done = batchclf(command, "s3://bucket/nothing", *options)
    assert done.exit_code == 2, done.stderr
    assert "output: s3://bucket/nothing: no job has begun there" in done.stderr


def test_records_of_an_earlier_run_are_not_taken_for_those_of_one_that_is_not_complete(
    server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, output="s3://bucket/more")
    assert batchclf("run", job).exit_code == 0
    found = server.objects("more/")
    record = {**json.loads(found["run.json"]), "status": "interrupted"}
    earlier = found["predictions.jsonl"].splitlines(keepends=True)[:3]
    replaced = {"run.json": json.dumps(record).encode(), "predictions.jsonl": b"".join(earlier)}
    for name, data in replaced.items():
        server.client.put_object(Bucket="bucket", Key=f"more/{name}", Body=data)
    csv = tmp_path / "more.csv"
    done = batchclf("convert", "s3://bucket/more", "--to", "csv", "-o", csv, "--json")
    assert done.exit_code == 0, done.stderr
    assert (
        json.loads(done.stdout)["num_records"] == len(found["predictions.jsonl"].splitlines()) > 3
    )


def test_what_is_fetched_lies_in_the_cache_as_long_as_it_is_read(
    server: Server, batchclf: Batchclf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batchclf("run", write_tiny_job(tmp_path, output="s3://bucket/here")).exit_code == 0
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    with output_folder("s3://bucket/here") as folder:
        assert folder.parent == tmp_path / "cache" / "fetched"
        assert (folder / "predictions.jsonl").exists()
    assert not folder.exists()
