"""A run from a bundle needs neither torch nor onnx: tried in an environment that has neither."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.conftest import ROOT, Batchclf, read_records, write_job


def test_a_bundle_runs_in_an_environment_without_torch(batchclf: Batchclf, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    exported = batchclf("export", job, tmp_path / "bundle")
    assert exported.exit_code == 0, exported.stderr
    here = batchclf("run", job)
    assert here.exit_code == 0, here.stderr

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[cpu]"], check=True)
    probe = "import importlib.util as u; print([n for n in %r if u.find_spec(n)])"
    heavy = ["torch", "torchvision", "timm", "transformers", "onnx", "onnxscript"]
    found = subprocess.run(
        [python, "-c", probe % heavy], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    job = write_job(elsewhere, model={"bundle": str(tmp_path / "bundle")})
    env = {**os.environ, "BATCHCLF_CACHE_DIR": str(tmp_path / "no-cache")}
    command = [str(environment / "bin" / "batchclf"), "run", str(job), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_ok"] == 300
    assert [one.name for one in (tmp_path / "no-cache").iterdir()] == ["parts"]
    assert read_records(elsewhere / "out") == read_records(tmp_path / "out")

    # int8 needs onnx to be made, and nothing once it was exported with the bundle.
    quantised = write_job(tmp_path, precision="int8")
    assert batchclf("export", quantised, tmp_path / "bundle8").exit_code == 0
    for bundle, exit_code in (("bundle", 2), ("bundle8", 0)):
        model = {"bundle": str(tmp_path / bundle)}
        job = write_job(elsewhere, model=model, precision="int8", output=str(tmp_path / "int8"))
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == exit_code, done.stderr
        assert exit_code == 0 or "converting needs onnx" in json.loads(done.stdout)["error"]

    # What has to be exported first says so, and what to do.
    wanted = [command[0], "run", str(write_job(tmp_path)), "--overwrite"]
    refused = subprocess.run(wanted, capture_output=True, text=True, env=env, check=False)
    assert refused.returncode == 2
    needed = "torch, torchvision, onnx, onnxscript, safetensors"
    assert f"which needs {needed}: pip install 'batchclf[export]'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert sys.prefix not in refused.stderr

    # An ONNX file of one's own needs no torch.
    own = write_job(tmp_path, model={"onnx": str(tmp_path / "bundle" / "model.onnx")})
    wanted = [command[0], "run", str(own), "--overwrite"]
    refused = subprocess.run(wanted, capture_output=True, text=True, env=env, check=False)
    assert refused.returncode == 2
    assert "which needs onnx: pip install onnx, or" in refused.stderr
