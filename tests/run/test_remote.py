"""Images in a bucket have the records of a folder of them, whatever the network does."""

import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.images import addresses, attempts, health, remote
from batchclf.images.store import open_input
from batchclf.run.output import require_separate_output
from batchclf.spec.file import load_job
from batchclf.spec.input import reveals_secret
from tests.conftest import ONLY_IN_CI, Batchclf, command, read_records
from tests.proxy import NAME, Bucket, Fault
from tests.tiny import DIGITS, assert_same_records, run_here, write_tiny_job

pytestmark = pytest.mark.usefixtures("no_faults")
NUM_PHOTOS = 40


@pytest.fixture(scope="module")
def photos(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, which is in the bucket as well; in an order that keys have not."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    images = sorted(path for path in DIGITS.rglob("*") if path.is_file())
    for number, path in enumerate(images[:NUM_PHOTOS]):
        below = folder / ("a", "a-b", "a/c", "ü %20+")[number % 4]
        below.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, below)
    bucket.put_folder(folder, "photos")
    return folder


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of the folder."""
    folder = tmp_path_factory.mktemp("expected")
    run_here(write_tiny_job(folder, input=str(photos)))
    return read_records(folder / "out")


def test_a_bucket_has_the_records_of_the_folder_that_it_holds(
    tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    run_here(write_tiny_job(tmp_path, input=f"s3://{NAME}/photos"))
    assert read_records(tmp_path / "out") == expected


def test_google_cloud_storage_has_the_same_records(
    tmp_path: Path,
    bucket: Bucket,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = {"gcs_base_url": bucket.proxy.url, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    # moto's server speaks Google's XML API as well, which is much like that of S3.
    run_here(write_tiny_job(tmp_path, input=f"gs://{NAME}/photos"))
    assert read_records(tmp_path / "out") == expected


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_two_workers_do_not_wait_for_one_read_after_the_other(
    tmp_path: Path, bucket: Bucket, expected: list[dict[str, Any]], backend: str
) -> None:
    bucket.proxy.decide = lambda method, path: Fault(delay_s=0.1)
    loader = {"backend": backend, "workers": 2}
    run_here(write_tiny_job(tmp_path, input=f"s3://{NAME}/photos", loader=loader))
    assert bucket.proxy.most_at_once > 8
    assert read_records(tmp_path / "out") == expected


def test_tar_archives_of_a_bucket_are_read_by_ranges(
    tmp_path: Path, photos: Path, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    for number, folder in enumerate(("a", "a-b")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for path in sorted((photos / folder).glob("*.*")):
                archive.add(path, f"{folder}/{path.name}")
        bucket.put(f"shards/{number}.tar", (tmp_path / f"{number}.tar").read_bytes())
    bucket.put("shards/readme.txt", b"no archive")
    bucket.proxy.requests.clear()
    run_here(write_tiny_job(tmp_path, input=f"s3://{NAME}/shards/*.tar"))
    found = [
        one | {"path": one["path"].partition("/")[2]} for one in read_records(tmp_path / "out")
    ]
    folders = ("a/", "a-b/")
    same = [
        one
        for folder in folders
        for one in expected
        if one["path"].startswith(folder) and one["path"].count("/") == 1
    ]
    assert_same_records(found, same)
    assert len(bucket.proxy.requests) < len(same) + 20, "each member in one request"


def test_a_list_may_name_addresses_and_paths(
    tmp_path: Path, photos: Path, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    first, second, third = (one["path"] for one in expected[:3])
    addresses = [f"s3://{NAME}/photos/{first}", f"{bucket.proxy.url}/{NAME}/photos/{second}"]
    addresses.append(str(photos / third))
    (tmp_path / "list.txt").write_text("".join(f"{one}\n" for one in addresses))
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "list.txt")))
    named = [one | {"path": path} for one, path in zip(expected, addresses, strict=False)]
    assert_same_records(read_records(tmp_path / "out"), named)


@pytest.mark.parametrize("num_here", [0, 2])
def test_a_killed_job_over_a_list_of_addresses_goes_on(
    tmp_path: Path, photos: Path, bucket: Bucket, expected: list[dict[str, Any]], num_here: int
) -> None:
    paths = [str(photos / one["path"]) for one in expected[:num_here]]
    paths += [f"s3://{NAME}/photos/{one['path']}" for one in expected[num_here:]]
    (tmp_path / "list.txt").write_text("".join(f"{one}\n" for one in paths))
    bucket.proxy.decide = stuck_behind(expected[:25])
    job = write_tiny_job(tmp_path, input=str(tmp_path / "list.txt"), batch_size=2)
    process = started(job)
    wait_for_lines(process, tmp_path / "out" / "predictions.jsonl", 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    bucket.proxy.decide = lambda *_: None
    run_here(job)
    named = [one | {"path": path} for one, path in zip(expected, paths, strict=True)]
    assert_same_records(read_records(tmp_path / "out"), named)


def test_addresses_behind_a_path_of_this_machine_are_read_ahead_as_well(
    tmp_path: Path, photos: Path, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    paths = [f"s3://{NAME}/photos/{one['path']}" for one in expected]
    paths[0], paths[20] = (str(photos / expected[number]["path"]) for number in (0, 20))
    (tmp_path / "list.txt").write_text("".join(f"{one}\n" for one in paths))
    bucket.proxy.decide = lambda *_: Fault(delay_s=0.1)
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "list.txt"), loader={"workers": 2}))
    assert bucket.proxy.most_at_once > 8
    named = [one | {"path": path} for one, path in zip(expected, paths, strict=True)]
    assert_same_records(read_records(tmp_path / "out"), named)


# ---- faults --------------------------------------------------------------------------------------


def sometimes(share: float, seed: int = 0) -> Any:
    """A network that fails some of the requests, in one of many ways."""
    chance = random.Random(seed)
    faults = (
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(status=500, code="InternalError"),
        Fault(breaks="reset"),
        Fault(breaks="torn"),
    )
    return lambda method, path: chance.choice(faults) if chance.random() < share else None


def test_what_passes_costs_no_image(
    tmp_path: Path, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    bucket.proxy.decide = sometimes(0.15)
    run_here(write_tiny_job(tmp_path, input=f"s3://{NAME}/photos"))
    assert read_records(tmp_path / "out") == expected
    assert len(bucket.proxy.requests) > NUM_PHOTOS + 2, "some were asked for again"


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (Fault(status=403, code="AccessDenied"), "permission_denied", "403 Forbidden"),
        (Fault(status=404, code="NoSuchKey"), "vanished", "404 Not Found"),
        (Fault(status=503), "io_error", "tried 4 times: the server says 503"),
        (Fault(breaks="torn"), "io_error", "tried 4 times: the connection failed"),
    ],
)
def test_one_object_that_cannot_be_read_is_one_record(
    tmp_path: Path,
    bucket: Bucket,
    expected: list[dict[str, Any]],
    fault: Fault,
    code: str,
    said: str,
) -> None:
    bad = expected[5]["path"]
    name = bad.rpartition("/")[2]
    bucket.proxy.decide = lambda method, path: fault if path.endswith(name) else None
    run_here(write_tiny_job(tmp_path, input=f"s3://{NAME}/photos"))
    found = read_records(tmp_path / "out")
    assert found[5]["path"] == bad
    assert found[5]["error"]["code"] == code
    assert said in found[5]["error"]["message"]
    assert found[:5] + found[6:] == expected[:5] + expected[6:]


REFUSALS = {
    "403 Forbidden": Fault(status=403, code="AccessDenied"),
    "(ExpiredToken)": Fault(status=400, code="ExpiredToken"),
    "503 Service Unavailable": Fault(status=503),
    "no answer within 1 s": Fault(breaks="stuck"),
    "lies in another region": Fault(status=301, code="PermanentRedirect"),
}


@pytest.mark.parametrize("said", REFUSALS)
@pytest.mark.parametrize("below", ["", "/*.jpg"])
def test_a_place_that_refuses_is_told_before_any_work(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, said: str, below: str
) -> None:
    assert attempts.OPENING_S <= 8, "the job ends within 10 s"
    for module in (addresses, remote, health):
        monkeypatch.setattr(module, "OPENING_S", 1.0)
    bucket.proxy.decide = lambda method, path: REFUSALS[said]
    address = f"s3://{NAME}/photos{below}"
    with pytest.raises(EnvironmentFailed) as told:
        open_input(load_job(write_tiny_job(tmp_path, input=address)))
    assert str(told.value).startswith(f"input: {address}: cannot be read: ")
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_bucket_that_is_not_there_ends_the_job_in_one_line(
    tmp_path: Path, batchclf: Batchclf
) -> None:
    done = batchclf("run", write_tiny_job(tmp_path, input="s3://no-such-bucket/photos"))
    assert done.exit_code == 5
    (line,) = done.stderr.splitlines()
    assert "(NoSuchBucket)" in line
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://photos/x", "Unable to open service account file"),
        ("az://photos/x", "Account must be specified"),
    ],
)
def test_an_environment_that_lacks_something_is_told(
    tmp_path: Path, batchclf: Batchclf, address: str, said: str
) -> None:
    env = {"GOOGLE_SERVICE_ACCOUNT": "/not/there.json"}
    done = batchclf("run", write_tiny_job(tmp_path, input=address), env=env)
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr


def test_a_bucket_that_refuses_everything_later_ends_the_job_which_then_goes_on(
    tmp_path: Path, batchclf: Batchclf, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    denied = Fault(status=403, code="AccessDenied")
    bucket.proxy.decide = lambda *_: denied if len(bucket.proxy.requests) > 25 else None
    job = write_tiny_job(tmp_path, input=f"s3://{NAME}/photos", batch_size=4)
    done = batchclf("run", job)
    assert done.exit_code == 5, done.stderr
    assert "403 Forbidden" in done.stderr
    written = read_records(tmp_path / "out")
    assert written == expected[: len(written)]
    bucket.proxy.decide = lambda *_: None
    assert batchclf("run", job).exit_code == 0
    assert read_records(tmp_path / "out") == expected


def started(job: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command("run", job), stderr=subprocess.PIPE, start_new_session=True)


def test_a_job_ends_in_time_though_the_server_does_not_answer(
    tmp_path: Path, bucket: Bucket, expected: list[dict[str, Any]]
) -> None:
    bucket.proxy.decide = stuck_behind(expected[:25])
    job = write_tiny_job(tmp_path, input=f"s3://{NAME}/photos", batch_size=4)
    process = started(job)
    predictions = tmp_path / "out" / "predictions.jsonl"
    wait_for_lines(process, predictions, 8)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    bucket.proxy.decide = lambda *_: None
    run_here(job)
    assert read_records(tmp_path / "out") == expected


def test_a_listing_ends_in_time_though_the_server_does_not_answer(
    tmp_path: Path, bucket: Bucket
) -> None:
    bucket.proxy.decide = lambda method, path: Fault(breaks="stuck") if "list" in path else None
    process = started(write_tiny_job(tmp_path, input=f"s3://{NAME}/photos"))
    wait_until_asked(bucket)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert b"did not end in time" not in said, "not by force, which comes later"


@pytest.mark.parametrize(
    "num_kills", [1, pytest.param(100, marks=ONLY_IN_CI)], ids=lambda number: f"{number}"
)
def test_a_killed_job_goes_on_with_nothing_lost_or_doubled(
    tmp_path: Path, bucket: Bucket, expected: list[dict[str, Any]], num_kills: int
) -> None:
    chance = random.Random(7)
    fails = sometimes(0.05)
    bucket.proxy.decide = lambda *request: fails(*request) or Fault(delay_s=0.03)
    job = write_tiny_job(tmp_path, input=f"s3://{NAME}/photos", batch_size=2, loader={"workers": 2})
    for _ in range(num_kills):
        process = started(job)
        num_requests = len(bucket.proxy.requests) + chance.randrange(3, NUM_PHOTOS)
        while process.poll() is None and len(bucket.proxy.requests) < num_requests:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0, process.communicate()[1]
        process.communicate()
        assert_same_records(read_records(tmp_path / "out"), expected)
        shutil.rmtree(tmp_path / "out")
    run_here(job)
    assert_same_records(read_records(tmp_path / "out"), expected)


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_network_that_is_down_costs_a_list_of_one_server_no_record(
    tmp_path: Path,
    photos: Path,
    batchclf: Batchclf,
    bucket: Bucket,
    expected: list[dict[str, Any]],
    scheme: str,
) -> None:
    server = f"s3://{NAME}" if scheme == "s3" else f"{bucket.proxy.url}/{NAME}"
    written = quote if scheme == "http" else str
    addresses = [f"{server}/photos/{written(one['path'])}" for one in expected]
    (tmp_path / "list.txt").write_text("".join(f"{one}\n" for one in addresses))
    bucket.proxy.decide = lambda *_: Fault(breaks="reset")
    job = write_tiny_job(tmp_path, input=str(tmp_path / "list.txt"), batch_size=4)
    done = batchclf("run", job)
    assert done.exit_code == 5, done.stderr
    assert "is the network up" in done.stderr
    assert read_records(tmp_path / "out") == []
    bucket.proxy.decide = lambda *_: None
    assert batchclf("run", job).exit_code == 0
    named = [one | {"path": path} for one, path in zip(expected, addresses, strict=True)]
    assert_same_records(read_records(tmp_path / "out"), named)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_dead_address_among_paths_of_this_machine_costs_its_own_image(
    tmp_path: Path, photos: Path, bucket: Bucket, expected: list[dict[str, Any]], is_cut: bool
) -> None:
    bucket.proxy.decide = lambda *_: Fault(breaks="reset")
    dead = f"{bucket.proxy.url}/{NAME}/x.jpg" if is_cut else "http://127.0.0.1:1/x.jpg"
    paths = [str(photos / one["path"]) for one in expected]
    paths.insert(5, dead)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    run_here(write_tiny_job(tmp_path, input=str(tmp_path / "list.txt"), batch_size=4))
    written = read_records(tmp_path / "out")
    failed = written.pop(5)
    assert (failed["path"], failed["error"]["code"]) == (dead, "io_error")
    del paths[5]
    named = [one | {"path": path} for one, path in zip(expected, paths, strict=True)]
    assert_same_records(written, named)


def test_no_output_tells_a_secret(
    tmp_path: Path, batchclf: Batchclf, bucket: Bucket, photos: Path
) -> None:
    bucket.proxy.decide = lambda method, path: Fault(status=503) if "a-b" in path else None
    done = batchclf("run", write_tiny_job(tmp_path, input=f"s3://{NAME}/photos"), "--limit", "20")
    assert done.exit_code == 0
    told = [done.stdout.encode(), done.stderr.encode()]
    told += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(told) > 5
    for secret in ("AKIDTESTS", "Signature"):
        assert not any(secret.encode() in one for one in told)


SECRETS = (
    *("key", "api_key", "apikey", "authKey", "subscription-key", "auth", "oauth", "Authorization"),
    *("password", "user[password]", "passwd", "pwd", "secret", "client_secret", "token", "jwt"),
    *("x-goog-credential", "X-Amz-Security-Token", "oauth_signature", "AWSAccessKeyId", "Policy"),
)


@pytest.mark.parametrize(
    "address",
    [
        "https://user:pa55@example.com/1.jpg",
        "https://example.com/1.jpg?X-Amz-Expires=9&X-Amz-Signature=pa55",
        "https://example.com/1.jpg?sv=2024&sig=pa55",
        "https://example.com/1.jpg?X%2DAmz%2dSignature=pa55",
        *(f"https://example.com/1.jpg?a=1&{name}=pa55" for name in SECRETS),
        "https://example.com/1.jpg#access_token=pa55",
    ],
)
def test_an_address_with_a_secret_is_refused_without_telling_it(
    tmp_path: Path, address: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{address}\n")
    for given in (address, str(tmp_path / "list.txt")):
        with pytest.raises(UsageError, match="password or a signature") as told:
            open_input(load_job(write_tiny_job(tmp_path, input=given)))
        assert "pa55" not in str(told.value)
    with pytest.raises(UsageError, match="password or a signature") as told:
        load_job(write_tiny_job(tmp_path, output=address))
    assert "pa55" not in str(told.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/1.jpg?size=5&author=me&design=2&monkey=3&pass_through=1",
        "https://example.com/key=1/secret=2/1.jpg",
        "s3://bucket/token=5/1.jpg",
    ],
)
def test_an_address_that_only_looks_like_one_with_a_secret_is_taken(address: str) -> None:
    assert not reveals_secret(address)


def test_a_job_may_name_places_as_file_managers_write_them(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "ü 1").symlink_to(photos / "a")
    job = load_job(write_tiny_job(tmp_path, input=f"file://{tmp_path}/%C3%BC%201"))
    assert job.input == tmp_path / "ü 1"


@pytest.mark.parametrize(
    ("place", "is_refused"),
    [
        *(
            (place, True)
            for place in ("s3://b", "s3://b/", "s3://b/o/out/", "s3://b/o", "s3://b/**/*")
        ),
        *(
            (f"s3://b/{glob}", True)
            for glob in ("**/*.jsonl", "o*/**", "{x,o}/out/*", "**/parts/*")
        ),
        *(
            (f"s3://b/{glob}", False)
            for glob in ("*/*.jsonl", "**/*.jpg", "out", "o/out2", "o/out-*")
        ),
    ],
)
def test_an_output_that_the_input_would_list_is_refused_in_a_bucket_too(
    tmp_path: Path, place: str, is_refused: bool
) -> None:
    job = load_job(write_tiny_job(tmp_path, input=place, output="s3://b/o/out"))
    with pytest.raises(UsageError, match="lies inside") if is_refused else nullcontext():
        require_separate_output(job)


@pytest.mark.parametrize(
    ("library", "address"), [("obstore", "s3://b/x"), ("urllib3", "https://example.com/x.jpg")]
)
def test_without_its_library_an_address_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, batchclf: Batchclf, library: str, address: str
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / f"{library}.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path / "none"), os.environ.get("PYTHONPATH", "")])
    done = batchclf("run", write_tiny_job(tmp_path, input=address), env={"PYTHONPATH": path})
    assert done.exit_code == 2, done.stderr
    assert "pip install 'batchclf[remote]'" in done.stderr


def stuck_behind(served: list[dict[str, Any]]) -> Any:
    """A server that sends these images, and to requests for others says nothing."""
    names = {one["path"].rpartition("/")[2] for one in served}
    stuck = Fault(breaks="stuck")

    def decide(method: str, path: str) -> Fault | None:
        name = path.rpartition("/")[2]
        return stuck if name.endswith((".png", ".jpg")) and name not in names else None

    return decide


def wait_for_lines(process: subprocess.Popen[bytes], path: Path, num_lines: int) -> None:
    ends_at = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, process.communicate()
        if time.monotonic() > ends_at:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate())
        time.sleep(0.01)


def wait_until_asked(bucket: Bucket) -> None:
    ends_at = time.monotonic() + 30
    while not bucket.proxy.requests:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
