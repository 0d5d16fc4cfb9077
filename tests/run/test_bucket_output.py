"""An output in a bucket: parts as they become durable, the whole at the end, resumed from there."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchclf import load_job, run_job
from batchclf.errors import EnvironmentFailed
from batchclf.results import bucket
from batchclf.results.bucket import Bucket
from tests.buckets import Server, running_server
from tests.conftest import Batchclf, command
from tests.proxy import Fault, Proxy, proxied
from tests.tiny import assert_same_records, link_digits, write_tiny_job

NUM_IMAGES = 120


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine's folders and the credentials; each test is a machine of its own."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Writes a job whose output is `s3://bucket/NAME`."""
    link_digits(tmp_path / "photos", NUM_IMAGES)

    def write(name: str, **keys: Any) -> Path:
        output = f"s3://bucket/{name}"
        return write_tiny_job(tmp_path, input=str(tmp_path / "photos"), output=output, **keys)

    return write


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def forget_this_machine(folder: Path) -> None:
    """Go on as if on another machine: nothing of the output lies here."""
    shutil.rmtree(folder / "cache" / "outputs", ignore_errors=True)


def test_a_job_with_a_bucket_as_output_leaves_all_of_its_files_there(
    job: Callable[..., Path], server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    local = batchclf("run", job("whole"), "-o", tmp_path / "local")
    assert local.exit_code == 0, local.stderr
    done = batchclf("run", job("whole"), "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["predictions"] == "s3://bucket/whole/predictions.jsonl"
    found = server.objects("whole/")
    assert sorted(found) == [
        *("listing.nul", "parts/00000000.jsonl", "predictions.jsonl", "run.json", "stats.jsonl"),
    ]
    expected = (tmp_path / "local" / "predictions.jsonl").read_bytes()
    assert_same_records(records(found["predictions.jsonl"]), records(expected))
    assert found["parts/00000000.jsonl"] == found["predictions.jsonl"]
    run = json.loads(found["run.json"])
    assert (run["status"], run["job"]["output"]) == ("complete", "s3://bucket/whole")
    everything = b"".join(found.values())
    assert b"test-secret" not in everything
    assert b"test-key" not in everything

    for _ in range(2):
        assert list((tmp_path / "cache" / "outputs").iterdir()) == [], "all of it is in the bucket"
        again = batchclf("run", job("whole"), "--json")
        assert (again.exit_code, again.json["was_complete"]) == (0, True), again.stderr
        assert server.objects("whole/") == found


def test_a_program_reads_the_records_from_the_bucket(
    job: Callable[..., Path], server: Server
) -> None:
    result = run_job(load_job(job("program")))
    lines = records(server.objects("program/")["predictions.jsonl"])
    assert [record.ref.path.decode() for record in result.records()] == [
        line["path"] for line in lines
    ]
    assert len(lines) == NUM_IMAGES
    server.client.delete_object(Bucket="bucket", Key="program/predictions.jsonl")
    with pytest.raises(EnvironmentFailed, match=r"s3://bucket/program/predictions\.jsonl: 0 rec"):
        list(result.records())


def test_a_stopped_job_goes_on_from_the_bucket_on_another_machine(
    job: Callable[..., Path], server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    slow = job("stopped", batch_size=2, loader={"workers": 1, "prefetch": 1})
    with subprocess.Popen(command("run", slow), stderr=subprocess.PIPE) as process:
        time.sleep(0.1)
        while "run.json" not in server.objects("stopped/") and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    found = server.objects("stopped/")
    kept = list((tmp_path / "cache" / "outputs").glob("*/listing.nul"))
    num_sent = len(records(b"".join(found[name] for name in sorted(found) if "parts/" in name)))
    status = json.loads(found["run.json"])["status"]
    assert status == "complete" if "predictions.jsonl" in found else status != "complete"
    assert kept or status == "complete"
    forget_this_machine(tmp_path)
    done = batchclf("run", job("stopped", batch_size=2))
    assert done.exit_code == 0, done.stderr
    if status == "interrupted" and num_sent:
        assert f"resuming after {num_sent}" in done.stderr
    found = server.objects("stopped/")
    parts = b"".join(found[name] for name in sorted(found) if name.startswith("parts/"))
    assert parts == found["predictions.jsonl"]
    assert len(records(parts)) == NUM_IMAGES


def parts_of(found: dict[str, bytes]) -> dict[int, bytes]:
    """The parts in a bucket, by the number of their first image."""
    names = sorted(name for name in found if name.startswith("parts/"))
    return {int(name[6:-6]): found[name] for name in names}


def assert_complete(found: dict[str, bytes]) -> list[dict[str, Any]]:
    """Parts that follow each other, and are all of predictions.jsonl; gives the records back."""
    parts, expected = parts_of(found), 0
    for number, data in parts.items():
        assert number == expected
        expected += len(records(data))
    assert b"".join(parts.values()) == found["predictions.jsonl"]
    assert json.loads(found["run.json"])["status"] == "complete"
    return records(found["predictions.jsonl"])


IN_SMALL_PARTS = """
import sys
from batchclf import run_job
from batchclf.engines.local import sender
from batchclf.results import mirror
sender.PART_S, sender.LOOK_S, mirror.MAX_PART_BYTES = 0.05, 0.05, 700
run_job(sys.argv[1])
"""


def test_a_job_killed_at_work_goes_on_after_its_last_part(
    job: Callable[..., Path], server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    slow = job("killed", batch_size=1, loader={"workers": 1}, runtime={"streams": 1})
    with subprocess.Popen([sys.executable, "-c", IN_SMALL_PARTS, slow]) as process:
        while len(parts_of(server.objects("killed/"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    before = parts_of(server.objects("killed/"))
    assert len(before) >= 2
    forget_this_machine(tmp_path)
    done = batchclf("run", slow)
    assert done.exit_code == 0, done.stderr
    found = server.objects("killed/")
    assert len(assert_complete(found)) == NUM_IMAGES
    assert before.items() <= parts_of(found).items(), "what was there stays"


def test_parts_that_do_not_follow_each_other_are_refused(
    job: Callable[..., Path], server: Server, batchclf: Batchclf
) -> None:
    subprocess.run([sys.executable, "-c", IN_SMALL_PARTS, job("gap")], check=True)
    parts = sorted(parts_of(server.objects("gap/")))
    run = json.loads(server.objects("gap/")["run.json"]) | {"status": "running"}
    server.client.put_object(Bucket="bucket", Key="gap/run.json", Body=json.dumps(run))
    server.client.delete_object(Bucket="bucket", Key=f"gap/parts/{parts[1]:08d}.jsonl")
    done = batchclf("run", job("gap"))
    assert done.exit_code == 2
    assert f"s3://bucket/gap/parts/{parts[1]:08d}.jsonl is not there" in done.stderr
    assert batchclf("run", job("gap"), "--overwrite").exit_code == 0
    assert len(assert_complete(server.objects("gap/"))) == NUM_IMAGES


def test_of_two_runs_to_one_address_the_later_to_write_a_part_ends(
    job: Callable[..., Path], server: Server, batchclf: Batchclf
) -> None:
    theirs = b'{"path":"theirs"}\n'
    server.client.put_object(Bucket="bucket", Key="crossed/parts/00000000.jsonl", Body=theirs)
    done = batchclf("run", job("crossed"))
    assert done.exit_code == 2
    assert "another batchclf is writing to this output" in done.stderr
    found = server.objects("crossed/")
    assert found["parts/00000000.jsonl"] == theirs
    assert "predictions.jsonl" not in found
    assert json.loads(found.get("run.json", b'{"status":"running"}'))["status"] != "complete"


def test_failures_are_tried_again_and_new_images_added_in_a_bucket_too(
    job: Callable[..., Path],
    server: Server,
    batchclf: Batchclf,
    tmp_path: Path,
) -> None:
    (bad,) = (tmp_path / "photos").glob("000007.*")
    good = bad.read_bytes()
    bad.unlink()  # a link
    bad.write_bytes(good[:100])
    assert batchclf("run", job("again")).exit_code == 0
    assert assert_complete(server.objects("again/"))[7]["status"] == "error"
    bad.write_bytes(good)
    forget_this_machine(tmp_path)
    assert batchclf("run", job("again"), "--retry-failed").exit_code == 0
    assert assert_complete(server.objects("again/"))[7]["status"] == "ok"
    (tmp_path / "photos" / "zzz.png").write_bytes(good)
    forget_this_machine(tmp_path)
    assert batchclf("run", job("again"), "--extend").exit_code == 0
    assert len(assert_complete(server.objects("again/"))) == NUM_IMAGES + 1


def test_shards_write_to_one_address_from_machines_of_their_own(
    job: Callable[..., Path], server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    for number in (2, 0, 1):
        forget_this_machine(tmp_path)
        done = batchclf("run", job("shards"), "--shard", f"{number}/3")
        assert done.exit_code == 0, done.stderr
    found = server.objects("shards/")
    assert sorted(parts_of(found)) == [0, 40, 80]
    whole = b"".join(found[f"predictions-{n:05d}-of-00003.jsonl"] for n in range(3))
    assert b"".join(parts_of(found).values()) == whole
    assert batchclf("run", job("whole3")).exit_code == 0
    assert_same_records(records(whole), records(server.objects("whole3/")["predictions.jsonl"]))
    refused = batchclf("run", job("shards", top_k=2), "--shard", "0/3")
    assert refused.exit_code == 2
    assert "top_k" in refused.stderr


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy on the way to the server."""
    with proxied(int(server.url.rpartition(":")[2])) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def test_a_job_is_complete_in_the_bucket_only_once_all_of_it_is_there(
    job: Callable[..., Path], server: Server, proxy: Proxy, batchclf: Batchclf, tmp_path: Path
) -> None:
    def refuse_predictions(method: str, path: str) -> Fault | None:
        is_upload = method in ("PUT", "POST") and "predictions.jsonl" in path
        return Fault(status=403, code="AccessDenied") if is_upload else None

    proxy.decide = refuse_predictions
    done = batchclf("run", job("torn"))
    assert done.exit_code == 5
    told = "torn/predictions.jsonl: cannot be written: the server says 403 Forbidden (AccessDenied)"
    assert f"{told}; are the credentials those of this bucket" in done.stderr
    found = server.objects("torn/")
    assert json.loads(found.get("run.json", b'{"status": "none"}'))["status"] != "complete"
    proxy.decide = lambda method, path: None
    forget_this_machine(tmp_path)
    assert batchclf("run", job("torn")).exit_code == 0
    assert len(assert_complete(server.objects("torn/"))) == NUM_IMAGES


def test_where_it_says_complete_but_the_records_are_gone_the_parts_are_taken(
    job: Callable[..., Path], server: Server, batchclf: Batchclf, tmp_path: Path
) -> None:
    assert batchclf("run", job("gone")).exit_code == 0
    server.client.delete_object(Bucket="bucket", Key="gone/predictions.jsonl")
    forget_this_machine(tmp_path)
    done = batchclf("run", job("gone"))
    assert done.exit_code == 0, done.stderr
    assert len(assert_complete(server.objects("gone/"))) == NUM_IMAGES


def test_failing_servers_cost_nothing_but_time(
    job: Callable[..., Path], server: Server, proxy: Proxy, batchclf: Batchclf
) -> None:
    chance = random.Random(3)
    proxy.decide = lambda method, path: Fault(status=503) if chance.random() < 0.2 else None
    subprocess.run([sys.executable, "-c", IN_SMALL_PARTS, job("busy")], check=True)
    assert any(fault for fault in proxy.requests)
    assert len(assert_complete(server.objects("busy/"))) == NUM_IMAGES


def test_a_signal_ends_a_run_whose_bucket_does_not_answer(
    job: Callable[..., Path], proxy: Proxy
) -> None:
    proxy.decide = lambda method, path: Fault(breaks="stuck")
    with subprocess.Popen(command("run", job("stuck")), stderr=subprocess.PIPE) as process:
        while not proxy.requests:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_job_begun_anew_otherwise_goes_on_as_that_job_elsewhere(
    job: Callable[..., Path], batchclf: Batchclf, tmp_path: Path
) -> None:
    assert batchclf("run", job("other")).exit_code == 0
    assert batchclf("run", job("other", top_k=2), "--overwrite").exit_code == 0
    forget_this_machine(tmp_path)
    done = batchclf("run", job("other", top_k=2), "--json")
    assert (done.exit_code, done.json["was_complete"]) == (0, True), done.stderr


def test_beginning_anew_with_fewer_images_leaves_no_part_of_before(
    job: Callable[..., Path], server: Server, batchclf: Batchclf
) -> None:
    subprocess.run([sys.executable, "-c", IN_SMALL_PARTS, job("fewer")], check=True)
    assert batchclf("run", job("fewer"), "--overwrite", "--limit", "20").exit_code == 0
    assert len(assert_complete(server.objects("fewer/"))) == 20


def test_commands_that_write_beside_the_records_ask_for_a_folder(
    job: Callable[..., Path], batchclf: Batchclf
) -> None:
    done = batchclf("tune", job("tune"))
    assert done.exit_code == 2
    assert "give a folder: -o FOLDER" in done.stderr


def test_an_output_in_a_bucket_that_refuses_ends_at_once(
    job: Callable[..., Path], batchclf: Batchclf
) -> None:
    done = batchclf("run", job("x"), "-o", "s3://no-such-bucket/x")
    assert done.exit_code == 5
    assert "output: s3://no-such-bucket/x" in done.stderr
    assert "NoSuchBucket" in done.stderr


def test_a_full_disk_here_is_told_as_such_and_not_as_the_bucket_s_fault(server: Server) -> None:
    server.client.put_object(Bucket="bucket", Key="fetched/a.json", Body=b"x")
    fetched = Bucket("s3://bucket/fetched", "output")
    with pytest.raises(EnvironmentFailed) as caught:
        fetched.fetch("a.json", Path("/dev/full"))
    assert str(caught.value).endswith(
        "cache: cannot be written: No space left on device; set BATCHCLF_CACHE_DIR to a folder "
        "with room"
    )


def test_an_object_of_which_a_part_comes_is_the_bucket_s_fault(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RETRIES", 0)
    server.client.put_object(Bucket="bucket", Key="fetched/b.json", Body=b"x" * 1000)
    proxy.decide = lambda *_: Fault(breaks="torn")
    fetched = Bucket("s3://bucket/fetched", "output")
    with pytest.raises(EnvironmentFailed, match=r"s3://bucket/fetched/b\.json: cannot be read"):
        fetched.fetch("b.json", tmp_path / "b.json")


def test_a_list_on_stdin_is_not_needed_by_shards_that_begin_or_go_on_elsewhere(
    job: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    path = job("piped")
    images = sorted((tmp_path / "photos").iterdir())[:6]
    listed = "".join(f"{image}\n" for image in images)
    for shard, content in ((0, listed), (1, ""), (0, "")):
        arguments = command("run", path, "-i", "-", "--shard", f"{shard}/2")
        done = subprocess.run(arguments, input=content, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        forget_this_machine(tmp_path)
    found = server.objects("piped/")
    for shard, expected in enumerate((images[:3], images[3:])):
        lines = records(found[f"predictions-0000{shard}-of-00002.jsonl"])
        assert [line["path"] for line in lines] == [str(image) for image in expected]
        assert {line["status"] for line in lines} == {"ok"}
