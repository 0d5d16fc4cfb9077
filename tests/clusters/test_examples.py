"""The examples for clusters in jobs/: they follow their schemas, and what batchclf promises."""

import re
from typing import Any

import pytest
import yaml

from batchclf.errors import ErrorLimitPassed, Interrupted, ProviderError
from tests.conftest import ROOT

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


def test_each_example_names_the_commands_that_belong_to_it() -> None:
    for name in ("kubernetes.yaml", "slurm.sh", "azureml.yaml"):
        assert re.search("batchclf merge", (ROOT / "jobs" / name).read_text()), name
