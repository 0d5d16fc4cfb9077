"""What resizes is recorded, and a package in Pillow's place that resizes otherwise is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchclf.commands.doctor import diagnose
from batchclf.commands.validate import check_job
from batchclf.errors import UsageError
from batchclf.images import resize
from batchclf.images.resampler import NATIVE, pillow_version, resampler_name
from batchclf.spec.file import load_job
from batchclf.spec.options import RunOptions
from tests.conftest import Batchclf
from tests.tiny import run_here, write_tiny_job


@pytest.fixture
def other_pillow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pillow gives other pixels than any that is known."""
    monkeypatch.setattr(resize, "_TALL_FIRST", {})
    resize.goes_tall_first.cache_clear()
    yield
    resize.goes_tall_first.cache_clear()


def test_run_json_says_what_resized(tmp_path: Path) -> None:
    run_here(write_tiny_job(tmp_path))
    record = json.loads((tmp_path / "out" / "run.json").read_bytes())
    expected = f"native ({NATIVE[0]})" if NATIVE else f"pillow {pillow_version()}"
    assert record["resampler"] == resampler_name() == expected


@pytest.mark.usefixtures("other_pillow")
def test_an_exact_job_is_refused_before_its_output_is_touched(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    with pytest.raises(UsageError, match="does not resize as Pillow does"):
        check_job(load_job(job), RunOptions(), print)
    with pytest.raises(UsageError, match="does not resize as Pillow does"):
        run_here(job)
    assert not (tmp_path / "out" / "run.json").exists()
    assert "does not resize as Pillow does" in (diagnose().resampler_problem or "")


@pytest.mark.usefixtures("other_pillow")
def test_a_fast_job_runs_on_whatever_pillow_there_is(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path, loader={"decode": "fast"})
    assert run_here(job).summary.num_ok == 300


def test_doctor_and_the_version_say_what_resizes(batchclf: Batchclf) -> None:
    found = batchclf("doctor", "--json").json
    assert found["resampler"] == resampler_name()
    assert (found["resampler_problem"] is None) == bool(NATIVE)
    assert f"resizing      {resampler_name()}" in batchclf("doctor").stdout
    said = batchclf("--version").stdout.splitlines()[0]
    assert said == f"batchclf, version {found['batchclf']}, resampler: {resampler_name()}"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ModuleNotFoundError('no module')", "it was not compiled: install batchclf again"),
        ("ImportError('undefined symbol: f')", "it does not load (undefined symbol: f): install"),
    ],
)
def test_native_code_that_does_not_load_is_not_said_to_be_absent(raised: str, said: str) -> None:
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'batchclf.images._resize': raise {raised}\n"
        "sys.modules.pop('batchclf.images._resize', None)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from batchclf.images.resampler import NATIVE, WHY_NOT\n"
        "print(NATIVE, WHY_NOT)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"() {said}")
