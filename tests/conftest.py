"""What the tests share: the real command, a model cache of their own, and larger test data."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.proxy import Bucket

USERS_ENVIRONMENT = dict(os.environ)
"""The environment without what tests set for themselves: for processes whose speed is measured."""
# One thread for torch: more of them would only fight with the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No example has a deadline: on a busy machine any of them may take long.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("BATCHCLF_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
"""Real weights and photos that are not the project's to pass on; tests skip where it is absent."""
JOBS = [path for path in sorted((ROOT / "jobs").glob("*.yaml")) if "\ninput: " in path.read_text()]
"""The job files that come with the project; beside them lie examples for clusters."""
ONLY_IN_CI = pytest.mark.skipif(
    not os.environ.get("CI"), reason="5 to 60 s each: set CI=1 to export one model of each family"
)
BY_HAND = pytest.mark.skipif(
    not os.environ.get("CI"), reason="20 to 60 s each beside the others: set CI=1 to run them, too"
)
PHOTOS = DATA / "imagenet_samples"
ODD_IMAGES = DATA / "odd_images"
MOBILENET_WEIGHTS = DATA / "weights" / "mobilenet_v2_from_EdgeFlow_int8_static.pth"


def data(path: Path) -> Path:
    """A file or folder of the larger test data, or a skip that says what is missing."""
    if not path.exists():
        pytest.skip(f"test data not found: {path} (set BATCHCLF_TEST_DATA to its folder)")
    return path


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished `batchclf` process."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that `--json` prints, as the last line."""
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return found


Batchclf = Callable[..., Finished]


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache for all tests of a session, empty at first: the user's own is not touched.

    The workers of `pytest -n` share it, so that each model is exported once.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["BATCHCLF_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job of 300 images in 10 folders, whose facts `write_output` takes over."""
    from tests.tiny import run_here, write_tiny_job  # onnx takes a second to import

    folder = tmp_path_factory.mktemp("template")
    run_here(write_tiny_job(folder))
    return folder / "out"


@pytest.fixture
def batchclf() -> Batchclf:
    """Runs the real command in a process of its own: `batchclf("run", job, "--json")`."""

    def run(
        *arguments: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300,
    ) -> Finished:
        done = subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={**os.environ, **(env or {})},
            cwd=cwd or ROOT,
            timeout=timeout,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def bucket() -> "Iterator[Bucket]":
    """A bucket and the proxy before it, to which this process's environment leads."""
    from tests.proxy import proxied_bucket  # its server takes a second to import

    with proxied_bucket() as found:
        yield found


@pytest.fixture
def no_faults(bucket: "Bucket") -> Iterator[None]:
    """The proxy lets everything through, unless the test says otherwise."""
    bucket.proxy.forget()
    yield
    bucket.proxy.forget()


def command(*arguments: str | os.PathLike[str]) -> list[str]:
    """The command line of a `batchclf` process."""
    return [sys.executable, "-m", "batchclf", *(os.fspath(one) for one in arguments)]


def read_records(output: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    """The records of a job's output folder."""
    return [json.loads(line) for line in (output / name).read_bytes().splitlines()]


def write_job(folder: Path, **keys: Any) -> Path:
    """A job file in `folder` (JSON is YAML too); the digits model unless told otherwise."""
    job = {
        "input": str(ROOT / "samples" / "digits"),
        "output": str(folder / "out"),
        "model": DIGITS_MODEL,
        "batch_size": 32,
        **keys,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


DIGITS_MODEL: Mapping[str, Any] = {
    "name": "shufflenet_v2_x0_5",
    "weights": str(ROOT / "samples" / "digits.safetensors"),
    "labels": str(ROOT / "samples" / "digits.txt"),
    "preprocess": {"resize": 64, "crop": 64, "mean": [0.5] * 3, "std": [0.5] * 3},
}
