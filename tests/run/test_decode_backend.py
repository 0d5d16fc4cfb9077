"""What `loader.backend: auto` decodes in: threads, or processes that can feed an accelerator."""

from pathlib import Path
from typing import Any

import pytest

from batchclf.run.plan import backend_of
from batchclf.spec.file import load_job
from tests.tiny import write_tiny_job

CUDA = {"name": "cuda"}
OPENVINO_CPU = {"name": "openvino", "device_type": "CPU"}
OPENVINO_GPU = {"name": "openvino", "device_type": "GPU"}


@pytest.mark.parametrize(
    ("provider", "num_workers", "expected"),
    [
        ("cpu", 64, "threads"),
        ("openvino", 64, "threads"),
        (OPENVINO_CPU, 64, "threads"),
        (CUDA, 4, "threads"),
        (CUDA, 5, "processes"),
        (OPENVINO_GPU, 5, "processes"),
    ],
)
def test_processes_decode_where_many_workers_feed_an_accelerator(
    tmp_path: Path, provider: Any, num_workers: int, expected: str
) -> None:
    job = load_job(write_tiny_job(tmp_path, provider=provider))
    assert backend_of(job, num_workers) == expected


@pytest.mark.parametrize(
    ("backend", "provider", "num_workers"), [("threads", CUDA, 64), ("processes", "cpu", 1)]
)
def test_what_the_job_says_decodes_whatever_it_runs_on(
    tmp_path: Path, backend: str, provider: Any, num_workers: int
) -> None:
    job = load_job(write_tiny_job(tmp_path, provider=provider, loader={"backend": backend}))
    assert backend_of(job, num_workers) == backend
