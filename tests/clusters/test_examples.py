"""The examples for clusters in jobs/: they follow their schemas, and what batchclf promises."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchclf.commands.merge import merge_shards
from batchclf.errors import ErrorLimitPassed, Interrupted, ProviderError
from tests.conftest import ROOT
from tests.tiny import DIGITS, run_here, write_tiny_job

KUBERNETES = "1.31"
"""The version whose schemas are asked."""
NEEDED = "pip install kubernetes-validate azure-ai-ml: too large for every environment"


def example(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / name).read_text())
    return document


def test_the_kubernetes_job_follows_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason=NEEDED).validate
    validate(example("kubernetes.yaml"), KUBERNETES, strict=True)


def test_the_pods_of_the_ray_job_follow_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason=NEEDED).validate
    cluster = example("kuberay.yaml")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}}
        validate(pod | {"spec": group["template"]["spec"]}, KUBERNETES, strict=True)


def test_the_kubernetes_job_has_as_many_pods_as_shards() -> None:
    spec = example("kubernetes.yaml")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed"
    assert f"auto/{spec['completions']}" in container["args"]


def test_kubernetes_tries_again_but_where_the_same_would_happen_again() -> None:
    rules = example("kubernetes.yaml")["spec"]["podFailurePolicy"]["rules"]
    by_action: dict[str, set[int]] = {}
    for rule in rules:
        codes = rule.get("onExitCodes", {"values": []})["values"]
        by_action.setdefault(rule["action"], set()).update(codes)
    final = {error.exit_code for error in (ErrorLimitPassed, ProviderError)}
    assert by_action == {"FailJob": final, "Ignore": {Interrupted(15, "").exit_code}}


def test_the_azure_ml_job_follows_its_schema() -> None:
    load_job = pytest.importorskip("azure.ai.ml", reason=NEEDED).load_job
    job = load_job(ROOT / "jobs" / "azureml.yaml")
    assert job.distribution.process_count_per_instance == 1  # so that RANK numbers the nodes


def test_the_parallel_job_of_azure_ml_follows_its_schema() -> None:
    load_job = pytest.importorskip("azure.ai.ml", reason=NEEDED).load_job
    job = load_job(ROOT / "jobs" / "azureml_parallel.yaml")
    assert job.jobs["classify"].mini_batch_size == 1


def test_the_mini_batches_of_the_parallel_job_are_shards_that_merge_to_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = example("azureml_parallel.yaml")["jobs"]["classify"]
    assert step["mini_batch_size"] == "1"
    entry: Any = runpy.run_path(str(ROOT / "jobs" / step["task"]["entry_script"]))
    whole = write_tiny_job(tmp_path, name="whole.yaml", output=str(tmp_path / "whole"))
    run_here(whole)
    job = write_tiny_job(tmp_path, input="elsewhere", output="elsewhere")
    out = tmp_path / "out"
    said = step["task"]["program_arguments"].split()
    meant = {"night.yaml": job, "${{inputs.photos}}": DIGITS, "${{outputs.runs}}": out}
    words = [str(meant.get(word, word)) for word in said]
    monkeypatch.setattr("sys.argv", ["entry", "--of_azure", "1", *words])
    entry["init"]()
    for number in range(2):
        name = f"{number:05d}-of-00002"
        assert entry["run"]([f"/mnt/shards/{name}"]) == [name]
    merge_shards(out)
    records = "predictions.jsonl"
    assert (out / records).read_bytes() == (tmp_path / "whole" / records).read_bytes()


def test_each_example_names_the_commands_that_belong_to_it() -> None:
    for name in ("kubernetes.yaml", "slurm.sh", "azureml.yaml", "azureml_parallel.yaml"):
        assert re.search("batchclf merge", (ROOT / "jobs" / name).read_text()), name
