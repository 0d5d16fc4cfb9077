"""The three images, built for real and run without a network, by any user, on a read-only root."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished, read_records
from tests.containers.engine import ANY_USER, Engine, Image, missing

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(missing() is not None, reason=f"no images here: {missing()}"),
]
USERS = [ANY_USER, (ANY_USER[0], 0)]
"""Any user in a group of their own, and in the root group, as some clusters do it."""
NUM_COPIES = 10


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("images")
    yield Engine(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def python_image(engine: Engine) -> str:
    return os.environ.get("BATCHCLF_PYTHON_IMAGE") or engine.make_base()


@pytest.fixture(scope="module")
def cpu(engine: Engine, python_image: str) -> Image:
    return engine.build("cpu", PYTHON_IMAGE=python_image, MODEL="export")


@pytest.fixture(scope="module")
def openvino(engine: Engine, python_image: str) -> Image:
    return engine.build("openvino", PYTHON_IMAGE=python_image, MODEL="none", INTEL_GPU="0")


@pytest.fixture(scope="module")
def gpu(engine: Engine, python_image: str) -> Image:
    return engine.build("gpu", PYTHON_IMAGE=python_image, MODEL="none")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder that `ANY_USER` may write to."""
    folder = tmp_path / "output"
    folder.mkdir()
    os.chown(folder, ANY_USER[0], 0)
    return folder


SAMPLE_JOB = ("run", "/data/jobs/sample.yaml", "--set", "model={bundle: /bundle}", "-o", "/output")


def check_sample(done: Finished, output: Path, provider: str) -> None:
    """300 records, at least 97 % of them right, on the provider that was asked for."""
    assert done.exit_code == 0, done.stderr
    assert done.json["num_ok"] == 300
    assert done.json["provider"]["active"] == provider
    records = read_records(output)
    right = [
        record["predictions"][0]["index"] == int(record["path"].split("/")[0]) for record in records
    ]
    assert len(right) == 300
    assert sum(right) >= 0.97 * 300


@pytest.mark.parametrize("user", USERS)
def test_the_cpu_image_runs_the_sample_from_the_model_it_was_built_with(
    cpu: Image, output: Path, user: tuple[int, int]
) -> None:
    done = cpu.run(*SAMPLE_JOB, "--json", user=user, volumes={ROOT: "/data", output: "/output"})
    check_sample(done, output, "CPUExecutionProvider")
    written = (output / "predictions.jsonl").stat()
    assert (written.st_uid, written.st_gid) == user


@pytest.mark.parametrize("user", USERS)
def test_the_openvino_image_runs_the_sample_from_a_bundle(
    openvino: Image, cpu: Image, output: Path, user: tuple[int, int]
) -> None:
    volumes = {ROOT: "/data", output: "/output", cpu.root / "bundle": "/bundle"}
    done = openvino.run(*SAMPLE_JOB, "--provider", "openvino", "--json", user=user, volumes=volumes)
    check_sample(done, output, "OpenVINOExecutionProvider")


def test_the_gpu_image_refuses_where_there_is_no_driver_and_says_so(
    gpu: Image, cpu: Image, output: Path
) -> None:
    volumes = {ROOT: "/data", output: "/output", cpu.root / "bundle": "/bundle"}
    done = gpu.run(*SAMPLE_JOB, "--provider", "cuda", volumes=volumes)
    assert done.exit_code == 4, done.stderr
    assert "driver" in done.stderr.lower()
    assert not (output / "predictions.jsonl").exists()


def test_the_gpu_image_finds_every_cuda_library_in_its_wheels(gpu: Image) -> None:
    done = gpu.run("-c", "import onnxruntime; onnxruntime.preload_dlls()", entrypoint="python")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["cpu", "openvino", "gpu"])
def test_an_image_resizes_by_native_code(name: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    assert "resampler: native (" in image.run("--version").stdout


# ---- what a container may rely on ----------------------------------------------------------------


def test_only_volumes_can_be_written_to(cpu: Image, output: Path) -> None:
    script = (
        "for f in / /opt/batchclf /bundle /data /tmp /cache /output; do"
        " if touch $f/x 2>/dev/null; then echo $f; fi; done; echo $$; id -u; pwd"
    )
    done = cpu.run("-c", script, entrypoint="sh", volumes={output: "/output"})
    assert done.stdout.split() == ["/tmp", "/cache", "/output", "1", str(ANY_USER[0]), "/data"]


def test_the_image_explains_itself_to_any_user(cpu: Image) -> None:
    assert "batchclf run job.yaml" in cpu.run().stdout
    done = cpu.run("doctor")
    assert done.exit_code == 0
    assert "/cache/bundles" in done.stdout
    assert done.stderr == ""  # ONNX Runtime's telemetry would complain of the read-only root


def test_pid_1_drains_at_sigterm_and_the_next_container_finishes_the_job(
    cpu: Image, tmp_path: Path, output: Path
) -> None:
    images = tmp_path / "images"
    for number in range(NUM_COPIES):
        shutil.copytree(ROOT / "samples" / "digits", images / str(number))
    volumes = {ROOT: "/data", output: "/output", images: "/images"}
    job = (*SAMPLE_JOB, "-i", "/images", "-b", "1", "--set", "loader.workers=1")
    records = output / "predictions.jsonl"
    with cpu.start(*job, volumes=volumes) as container:
        container.wait_until(lambda: records.exists() and records.stat().st_size > 0)
        container.stop()
        done = container.wait()
    assert done.exit_code == 143, done.stderr
    assert 0 < len(read_records(output)) < NUM_COPIES * 300
    again = cpu.run(*job, volumes=volumes)
    assert again.exit_code == 0, again.stderr
    paths = [record["path"] for record in read_records(output)]
    assert len(paths) == len(set(paths)) == NUM_COPIES * 300


def test_pid_1_hears_sigterm_before_a_job_starts_as_well(cpu: Image) -> None:
    with cpu.start("doctor") as container:
        container.wait_until(lambda: container.hears_sigterm)
        container.stop()
        assert container.wait().exit_code == 143


# ---- what is in the images, and how much ---------------------------------------------------------


@pytest.mark.parametrize(("target", "limit_mb"), [("cpu", 500), ("openvino", 700)])
def test_an_image_stays_within_its_size(
    target: str, limit_mb: float, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(target)
    assert image.size_mb <= limit_mb


@pytest.mark.parametrize("target", ["cpu", "openvino", "gpu"])
def test_an_image_holds_no_torch_and_no_build_tools(
    target: str, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(target)
    (packages,) = (image.root / "opt/batchclf/lib").glob("python3.*/site-packages")
    found = {one.name for one in packages.iterdir()}
    assert {"batchclf", "onnxruntime", "numpy"} <= found
    assert found & {"torch", "torchvision", "onnx", "onnxscript", "pip", "setuptools"} == set()
    assert not (image.root / "opt/build").exists()
    assert list((packages / "batchclf").rglob("*.pyc"))  # a read-only root cannot get them later


def test_debians_intel_gpu_runtime_is_there_when_asked_for(
    engine: Engine, python_image: str
) -> None:
    image = engine.build("openvino", PYTHON_IMAGE=python_image, MODEL="none", INTEL_GPU="1")
    assert (image.root / "etc/OpenCL/vendors/intel.icd").exists()
    shutil.rmtree(image.root)
