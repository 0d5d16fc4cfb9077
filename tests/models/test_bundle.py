"""The model bundle: whole or not there, one build for all who want it, and never a damaged one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from batchclf.errors import EnvironmentFailed, ModelError
from batchclf.models.bundle import (
    GOLDEN_FILE,
    BundleMeta,
    cache_folder,
    cached_bundle,
    model_files,
    open_bundle,
    remember_batch_size,
    sha256_of,
    write_bundle,
)
from batchclf.models.resolve import ResolvedModel, check_model, confirm_batch_size, resolve_model
from batchclf.results.records import Preprocess
from batchclf.runtime.classifier import open_classifier, open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import BY_HAND, ROOT, Batchclf, command, read_records, write_job
from tests.models.onnx_models import PREPROCESS, Classifier, save
from tests.tiny import CPU

PHOTOS_HERE = str(ROOT / "samples" / "photos")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own; the folder that holds the bundles."""
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bundles"


@pytest.fixture
def own_onnx(tmp_path: Path) -> Path:
    return save(Classifier(), tmp_path / "own.onnx")


def meta_of(folder: Path, **changes: Any) -> BundleMeta:
    facts: dict[str, Any] = {
        "name": "fake",
        "source": {},
        "preprocess": Preprocess(40, (32, 24), "bilinear", None, None),
        "labels": ("ant", "bee"),
        "activation": "softmax",
        "files": model_files(folder),
    }
    if "golden_sha256" not in changes:
        facts["golden_sha256"] = sha256_of(folder / GOLDEN_FILE)
    return BundleMeta.model_validate(facts | changes)


def build_fake(folder: Path) -> BundleMeta:
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "model.onnx.data").write_bytes(b"weights")
    (folder / GOLDEN_FILE).write_bytes(b"golden")
    return meta_of(folder)


def resolve(path: Path) -> ResolvedModel:
    return resolve_model(
        ModelSpec.model_validate({"onnx": path, "preprocess": PREPROCESS}),
        batch_size=4,
        open_reference=open_reference,
        log=print,
    )


def from_bundle(spec: ModelSpec) -> ResolvedModel:
    return resolve_model(spec, batch_size=4, open_reference=open_reference, log=print)


def onnx_job(folder: Path, path: Path, **keys: Any) -> Path:
    return write_job(
        folder,
        input=PHOTOS_HERE,
        model={"onnx": str(path), "preprocess": PREPROCESS},
        **keys,
    )


def bundles(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir() and path.name[0] != ".")


def unfinished(cache: Path) -> list[str]:
    """All that is neither a bundle nor a lock."""
    return sorted(
        path.name
        for path in cache.iterdir()
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".lock")
    )


# ---- what a job may say of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "labels", "given", "advice"),
    [
        ("softmax", ("ant", "bee"), "sigmoid", "has become two classes in the bundle"),
        ("softmax", ("ant", "bee", "cat"), "sigmoid", "or, if it is wrong, export the model again"),
        ("softmax", ("ant", "bee"), "none", "or, if it is wrong, export the model again"),
        ("none", ("ant", "bee"), "softmax", "or, if it is wrong, export the model again"),
        ("sigmoid", ("ant", "bee"), "softmax", "export the model again with activation: softmax"),
    ],
)
def test_another_activation_than_the_bundles_is_refused(
    tmp_path: Path, own: str, labels: tuple[str, ...], given: str, advice: str
) -> None:
    def build(folder: Path) -> BundleMeta:
        build_fake(folder)
        return meta_of(folder, activation=own, labels=labels)

    folder = write_bundle(tmp_path / "bundle", build).folder

    def spec(activation: str | None) -> ModelSpec:
        return ModelSpec.model_validate({"bundle": folder, "activation": activation})

    for ask in (check_model, from_bundle):
        with pytest.raises(ModelError) as caught:
            ask(spec(given))
        message = str(caught.value)
        assert message.startswith(f"model.activation: found {given}, but what the output of")
        assert f"{folder} lacks to be scores is {own}" in message
        assert "leave model.activation out" in message
        assert advice in message
        ask(spec(own))
        ask(spec(None))


# ---- what is in it -------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "deep" / "bundle", build_fake)
    found = open_bundle(tmp_path / "deep" / "bundle")
    assert found == written
    assert found.meta.labels == ("ant", "bee")
    assert sorted(os.listdir(found.folder)) == [
        "golden.npz",
        "model.json",
        "model.onnx",
        "model.onnx.data",
    ]
    assert os.listdir(tmp_path / "deep") == ["bundle"]


def test_the_digest_is_that_of_the_model_wherever_and_whenever_it_was_written(
    tmp_path: Path, own_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.models.test_bundle import resolve; "
        "print(resolve(Path(sys.argv[1])).bundle.digest)"
    )
    moved = tmp_path / "moved.onnx"
    shutil.copy(own_onnx, moved)
    digests = set()
    for number, path in enumerate((own_onnx, moved)):
        done = subprocess.run(
            [sys.executable, "-c", script, path],
            env={**os.environ, "BATCHCLF_CACHE_DIR": str(tmp_path / f"cache {number}")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.splitlines()[-1])
    assert len(digests) == 1
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    other = save(Classifier(seed=1), tmp_path / "other.onnx")
    assert resolve(other).bundle.digest not in digests


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", GOLDEN_FILE])
@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_damaged_bundle_is_refused_by_the_file_that_is_damaged(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = write_bundle(tmp_path / "bundle", build_fake).folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[:-1] + (b"X" if damage == "changed" else b""))
    with pytest.raises(ModelError, match=rf"bundle/{name}: ") as caught:
        open_bundle(tmp_path / "bundle")
    assert "batchclf export" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "not a bundle of this version: format_version"),
        ({"format_version": 4, "extra": 1}, "not a bundle of this version: format_version"),
        ({"activation": "odds"}, "not a bundle of this version: activation"),
        ({"colours": 3}, "not a bundle of this version: colours"),
        ({"preprocess": {"resize": 1}}, "not a bundle of this version: preprocess"),
    ],
)
def test_a_bundle_of_another_version_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_bundle(tmp_path / "bundle", build_fake).folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(ModelError, match=message):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"<html>"])
def test_a_model_json_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    path = write_bundle(tmp_path / "bundle", build_fake).folder / "model.json"
    path.write_bytes(text)
    with pytest.raises(ModelError, match=r"model\.json: not a bundle of this version"):
        open_bundle(tmp_path / "bundle")


def test_a_folder_that_is_no_bundle_is_refused_with_the_command_that_writes_one(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    done = batchclf("run", write_job(tmp_path, model={"bundle": str(tmp_path)}), "--json")
    assert done.exit_code == 2
    assert f"{tmp_path}: no model bundle there" in done.json["error"]
    job = write_job(tmp_path, model={"bundle": "job.yaml"})
    file = batchclf("run", job, "--json").json["error"]
    assert f"model.bundle: {job}: is a file; a bundle is a folder" in file
    assert "batchclf export" in done.json["error"]


def test_what_model_json_says_is_checked_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        meta_of(tmp_path, format_version=1, golden_sha256="")


# ---- the whole way -------------------------------------------------------------------------------


def test_a_damaged_cached_bundle_is_built_anew_and_a_damaged_user_bundle_is_refused(
    batchclf: Batchclf, tmp_path: Path, cache: Path, own_onnx: Path
) -> None:
    job = onnx_job(tmp_path, own_onnx)
    assert batchclf("run", job).exit_code == 0
    records = read_records(tmp_path / "out")
    (folder,) = bundles(cache)
    model = (folder / "model.onnx").read_bytes()
    broken = bytearray(model)
    broken[len(model) // 2] ^= 1
    (folder / "model.onnx").write_bytes(broken)
    shutil.copytree(folder, tmp_path / "users")

    done = batchclf("run", job, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert "building it anew" in done.stderr
    assert (folder / "model.onnx").read_bytes() == model
    assert read_records(tmp_path / "out") == records
    assert unfinished(cache) == []

    job = write_job(tmp_path, input=PHOTOS_HERE, model={"bundle": str(tmp_path / "users")})
    done = batchclf("run", job, "--overwrite", "--json")
    assert done.exit_code == 2
    assert f"{tmp_path / 'users' / 'model.onnx'}: damaged" in done.json["error"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 100])
def test_a_cached_model_json_that_power_loss_emptied_is_built_anew(
    cache: Path, own_onnx: Path, damage: bytes
) -> None:
    first = resolve(own_onnx)
    (first.bundle.folder / "model.json").write_bytes(damage)
    again = resolve(own_onnx)
    assert again == first
    assert unfinished(cache) == []


def test_a_run_from_a_bundle_or_the_cache_imports_neither_torch_nor_onnx(
    tmp_path: Path, cache: Path, own_onnx: Path
) -> None:
    bundle = resolve(own_onnx).bundle
    shutil.copytree(bundle.folder, tmp_path / "users")
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'onnx', 'onnxscript'): sys.modules[name] = None\n"
        "from batchclf.cli import main\n"
        "main()"
    )
    for model in (
        {"bundle": str(tmp_path / "users")},
        {"onnx": str(own_onnx), "preprocess": PREPROCESS},
    ):
        job = write_job(tmp_path, input=PHOTOS_HERE, model=model)
        done = subprocess.run(
            [sys.executable, "-c", script, "run", job, "--overwrite"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(read_records(tmp_path / "out")) == 6


# ---- batch sizes ---------------------------------------------------------------------------------


def test_a_batch_size_that_was_checked_is_remembered_in_the_cache_only(
    tmp_path: Path, cache: Path, own_onnx: Path
) -> None:
    bundle = resolve(own_onnx).bundle
    assert bundle.meta.verified_batches == (1, 2, 3, 4)
    users = Path(shutil.copytree(bundle.folder, tmp_path / "users"))
    before = (users / "model.json").read_bytes()
    classify = open_classifier(bundle.model_path, CPU)
    calls = []

    def counting(pixels: Any) -> Any:
        calls.append(len(pixels))
        return classify(pixels)

    confirm_batch_size(bundle, 4, counting)
    assert calls == []
    confirm_batch_size(bundle, 7, counting)
    assert 7 in calls
    found = open_bundle(bundle.folder)
    assert found.meta.verified_batches == (1, 2, 3, 4, 7)
    assert found.digest == bundle.digest
    assert sorted(os.listdir(bundle.folder)) == ["golden.npz", "model.json", "model.onnx"]
    remember_batch_size(open_bundle(users), 7)
    assert (users / "model.json").read_bytes() == before


def test_a_batch_size_at_which_the_model_answers_otherwise_is_refused(
    cache: Path, own_onnx: Path
) -> None:
    bundle = resolve(own_onnx).bundle
    classify = open_classifier(bundle.model_path, CPU)
    with pytest.raises(ModelError, match="batch of 7: gives other answers"):
        confirm_batch_size(bundle, 7, lambda pixels: classify(pixels) * (1 + (len(pixels) == 7)))
    assert 7 not in open_bundle(bundle.folder).meta.verified_batches


# ---- who may write, and how much -----------------------------------------------------------------

AS_NOBODY = """
import os, sys
from pathlib import Path
from batchclf.models.bundle import remember_batch_size
from batchclf.errors import BatchclfError
from tests.models.test_bundle import resolve
import onnx, batchclf.models.onnx_file  # while the interpreter's files can be read
warm = os.environ["BATCHCLF_CACHE_DIR"]
os.environ["BATCHCLF_CACHE_DIR"] = "warm"
resolve(Path("own.onnx"))
os.environ["BATCHCLF_CACHE_DIR"] = warm
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    bundle = resolve(Path("own.onnx")).bundle
    remember_batch_size(bundle, 11)
except BatchclfError as error:
    print(error.exit_code, error)
else:
    print("ok", bundle.meta.verified_batches)
"""


def as_nobody(folder: Path, cache: str) -> str:
    """What a user who owns nothing here gets of `folder`/own.onnx with this cache."""
    folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, folder],
        cwd=folder,
        env={**os.environ, "BATCHCLF_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_cache_that_can_be_read_but_not_written_is_used(
    tmp_path: Path, own_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container image with the model baked in, run as another user."""
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    folder = resolve(own_onnx).bundle.folder
    for path in (*folder.iterdir(), tmp_path / "cache", folder.parent, folder):
        path.chmod(0o555)
    try:
        assert as_nobody(tmp_path, "cache") == "ok (1, 2, 3, 4)"
    finally:
        for path in (tmp_path / "cache", folder.parent, folder):
            path.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o555])
def test_a_cache_that_may_not_be_entered_or_written_is_exit_5(
    tmp_path: Path, own_onnx: Path, mode: int
) -> None:
    (tmp_path / "cache" / "bundles").mkdir(parents=True)
    closed = tmp_path / "cache" / "bundles" if mode == 0o555 else tmp_path / "cache"
    closed.chmod(mode)
    try:
        found = as_nobody(tmp_path, "cache")
    finally:
        (tmp_path / "cache").chmod(0o755)
        (tmp_path / "cache" / "bundles").chmod(0o755)
    assert found.startswith("5 cache/bundles")
    assert "BATCHCLF_CACHE_DIR" in found


@pytest.mark.parametrize("place", ["/proc/batchclf", "a file"])
def test_a_cache_folder_that_cannot_be_made_is_exit_5(
    batchclf: Batchclf, tmp_path: Path, own_onnx: Path, place: str
) -> None:
    (tmp_path / "a file").write_text("")
    place = str(tmp_path / place)
    done = batchclf(
        "run", onnx_job(tmp_path, own_onnx), "--json", env={"BATCHCLF_CACHE_DIR": place}
    )
    assert done.exit_code == 5
    assert f"{place}/bundles" in done.json["error"]
    assert "set BATCHCLF_CACHE_DIR" in done.json["error"]
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_half_way_through_the_model_is_exit_5_and_leaves_nothing(
    batchclf: Batchclf, tmp_path: Path, cache: Path
) -> None:
    """A limit on the size of files stands for the disk."""
    path = save(Classifier(num_classes=64, depth=8), tmp_path / "own.onnx")
    assert path.stat().st_size > 200_000
    job = onnx_job(tmp_path, path)
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command("run", job, "--json")]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "the model bundle cannot be written: File too large" in done.stdout
    assert "Traceback" not in done.stderr
    assert bundles(cache) == []
    assert unfinished(cache) == []
    assert batchclf("run", job).exit_code == 0


def test_a_build_that_fails_leaves_nothing_behind(cache: Path) -> None:
    def refused(folder: Path) -> BundleMeta:
        build_fake(folder)
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        cached_bundle({"a": 1}, refused, print)
    assert bundles(cache) == []
    assert unfinished(cache) == []

    def broken(folder: Path) -> BundleMeta:
        build_fake(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFailed, match="No space left on device"):
        cached_bundle({"a": 1}, broken, print)
    assert bundles(cache) == []
    assert unfinished(cache) == []


# ---- crashes -------------------------------------------------------------------------------------

BUILD_FAKE = """
import os, sys, time
from pathlib import Path
from batchclf.models.bundle import GOLDEN_FILE, BundleMeta, cached_bundle, model_files, sha256_of
from batchclf.results.records import Preprocess
def build_fake(folder):
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "model.onnx.data").write_bytes(b"weights")
    (folder / GOLDEN_FILE).write_bytes(b"golden")
    return BundleMeta(
        name="fake", source={}, preprocess=Preprocess(40, (32, 24), "bilinear", None, None),
        labels=("ant", "bee"), activation="softmax", files=model_files(folder),
        golden_sha256=sha256_of(folder / GOLDEN_FILE),
    )
"""
"""`build_fake` for a child process: importing this file costs it more than the test itself."""

KILLED_AT = """
left = int(sys.argv[1])
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.fsync")
def count(event, arguments):
    global left
    if event in WATCHED:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
real = os.fsync
os.fsync = lambda descriptor: (sys.audit("os.fsync"), real(descriptor))[1]
sys.addaudithook(count)
cached_bundle({"a": 1}, build_fake, print)
"""


@pytest.mark.parametrize("start", [pytest.param("empty", marks=BY_HAND), "damaged"])
def test_killed_at_any_step_of_writing_the_cache_holds_a_whole_bundle_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """The process kills itself before its first, second, ... step on the file system."""
    step, killed, whole = 0, True, 0
    while killed:
        step += 1
        assert step < 200
        place = tmp_path / str(step)
        monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(place))
        if start == "damaged":
            folder = cached_bundle({"a": 1}, build_fake, print).folder
            (folder / "model.onnx").write_bytes(b"mod")
        done = subprocess.run(
            [sys.executable, "-c", BUILD_FAKE + KILLED_AT, str(step)],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        killed = done.returncode == -signal.SIGKILL
        assert killed or done.returncode == 0, done.stderr
        cache = place / "bundles"
        for folder in bundles(cache) if cache.exists() else []:
            try:
                whole += open_bundle(folder).meta.name == "fake"
            except ModelError:
                assert start == "damaged", "a bundle with its final name is not whole"
        assert open_bundle(cached_bundle({"a": 1}, build_fake, print).folder)
        found = cached_bundle({"a": 1}, build_fake, print)
        assert sorted(os.listdir(found.folder)) == [
            "golden.npz",
            "model.json",
            "model.onnx",
            "model.onnx.data",
        ]
        if not whole:
            assert unfinished(cache) == []
    assert step > 10
    assert whole


def test_kill_9_at_random_moments_of_a_run_costs_no_more_than_the_build(
    batchclf: Batchclf, tmp_path: Path, cache: Path
) -> None:
    path = save(Classifier(num_classes=64, depth=24), tmp_path / "own.onnx")
    job = onnx_job(tmp_path, path)
    started = time.perf_counter()
    assert batchclf("run", job).exit_code == 0
    whole_s = time.perf_counter() - started
    records = read_records(tmp_path / "out")
    rng = random.Random(0)
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        process = subprocess.Popen(
            command("run", job, "--overwrite"), cwd=ROOT, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 0.9) * whole_s)
        process.kill()
        process.wait()
        for folder in bundles(cache) if cache.exists() else []:
            open_bundle(folder)
    done = batchclf("run", job, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert read_records(tmp_path / "out") == records
    assert len(bundles(cache)) == 1
    assert unfinished(cache) == []


# ---- two at once ---------------------------------------------------------------------------------


def test_processes_that_want_the_same_bundle_at_once_build_it_once(
    tmp_path: Path, cache: Path
) -> None:
    script = (
        f"{BUILD_FAKE}\n"
        "def build(folder):\n"
        "    with Path(sys.argv[1]).open('a') as log: log.write('built\\n')\n"
        "    time.sleep(1.5)\n"
        "    return build_fake(folder)\n"
        "print(cached_bundle({'a': 1}, build, print).digest)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "log"], cwd=ROOT, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60)[0].decode().splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({answer[-1] for answer in answers}) == 1
    assert sum("waiting for it" in answer[0] for answer in answers) == 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_two_runs_that_need_the_same_export_both_succeed(
    tmp_path: Path, cache: Path, own_onnx: Path
) -> None:
    processes = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        processes.append(
            subprocess.Popen(
                command("run", onnx_job(folder, own_onnx)),
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert "".join(logs).count("this is done once") == 1
    assert read_records(tmp_path / "0" / "out") == read_records(tmp_path / "1" / "out")
    assert len(bundles(cache_folder())) == 1
