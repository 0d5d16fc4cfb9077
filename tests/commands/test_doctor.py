"""`batchclf doctor` tells what this machine can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchclf.runtime.providers import PROVIDERS
from batchclf.system.machine import cgroup_cpu_quota
from tests.conftest import ROOT, Batchclf
from tests.tiny import write_tiny_job


def test_doctor_reports_the_working_provider_and_why_the_others_do_not(batchclf: Batchclf) -> None:
    done = batchclf("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    found = done.json
    assert found["flavours"]
    assert found["flavour_problem"] is None
    assert found["providers"]["cpu"] == {
        "execution_provider": "CPUExecutionProvider",
        "compiled_in": True,
        "opens": True,
        "problem": None,
    }
    for name, extra in (("cuda", "gpu"), ("openvino", "openvino")):
        state = found["providers"][name]
        if PROVIDERS[name].distribution in found["flavours"]:
            assert state["opens"] == (name == "openvino"), state  # OpenVINO has a CPU everywhere
        else:
            assert not state["opens"]
            assert f"batchclf[{extra}]" in state["problem"]
    assert found["packages"]["torch"]
    assert found["can_export"]


def test_an_onnx_runtime_that_cannot_be_imported_is_told_and_ends_a_run_with_4(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    broken = tmp_path / "first" / "onnxruntime" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    env = {"PYTHONPATH": f"{tmp_path / 'first'}:{ROOT}"}
    found = batchclf("doctor", "--json", env=env).json["providers"]["cpu"]
    assert not found["opens"]
    assert "cannot be imported: libfoo.so.1" in found["problem"]
    refused = batchclf("run", write_tiny_job(tmp_path), env=env)
    assert refused.exit_code == 4
    assert "libfoo.so.1" in refused.stderr
    assert "pip install --force-reinstall onnxruntime" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_doctor_tells_of_a_model_cache_that_this_user_may_not_look_at(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    (hidden / "bundles").mkdir(parents=True)
    hidden.chmod(0)
    code = """
import os, sys
from batchclf.models.bundle import list_cache
if os.getuid() == 0:
    os.setuid(65534)
print(list_cache())
"""
    env = {**os.environ, "BATCHCLF_CACHE_DIR": str(hidden)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    hidden.chmod(0o700)
    assert done.stdout == "(0, 0, False)\n", done.stderr


def test_doctor_counts_the_cores_it_may_use(batchclf: Batchclf) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores to take one away")
    one = min(os.sched_getaffinity(0))
    code = "import os, sys; os.sched_setaffinity(0, {%d}); os.execv(sys.executable, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code % one, sys.executable, "-m", "batchclf", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"usable":1' in done.stdout


def test_doctor_tells_where_the_model_cache_is_and_how_large(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundles" / "one"
    bundle.mkdir(parents=True)
    (bundle / "model.json").write_bytes(b"x" * 100)
    (bundle / "model.onnx").write_bytes(b"x" * 900)
    done = batchclf("doctor", "--json", env={"BATCHCLF_CACHE_DIR": str(tmp_path)})
    assert done.json["cache"] == {
        "folder": str(tmp_path / "bundles"),
        "num_bundles": 1,
        "num_bytes": 1000,
        "writable": True,
    }


def test_doctor_as_text_is_a_page(batchclf: Batchclf) -> None:
    done = batchclf("doctor")
    assert done.exit_code == 0
    for word in ("ONNX Runtime", "cpu", "works", "cores", "torch", "model cache"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            1.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v2-unlimited", "v2-nested", "v1-container", "v1-unlimited", "no-cgroups"],
)
def test_the_cgroup_quota_is_read_from_both_hierarchies(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cgroup_cpu_quota(tmp_path) == expected


def test_onnx_runtimes_telemetry_is_off(batchclf: Batchclf, tmp_path: Path) -> None:
    """Where it is on, it writes a number of this machine into the user's cache folder."""
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    assert batchclf("doctor", env=env).exit_code == 0
    assert list(tmp_path.iterdir()) == []
