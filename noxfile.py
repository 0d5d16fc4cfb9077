"""The tests in fresh environments of each ONNX Runtime flavour; they exclude each other.

`nox` runs all, one after the other, `nox -s openvino` one; what follows `--` goes to pytest.
The environments are made anew in .nox (6 GB each with torch; gpu has none) and left there.
"""

import nox

SAME_EVERYWHERE = (
    *("tests/images", "tests/results", "tests/benchmarks", "tests/models", "tests/spec"),
    *("tests/system", "tests/faults", "tests/engines", "tests/commands/test_paths.py"),
    *("tests/commands/test_convert.py", "tests/commands/test_merge.py"),
    *("tests/commands/test_status.py", "tests/commands/test_bucket.py", "tests/test_tutorial.py"),
    *("tests/commands/test_report.py", "tests/commands/test_report_page.py"),
    *("tests/run/test_crew.py", "tests/run/test_ranges.py", "tests/run/test_keys.py"),
    "tests/test_command_line.py",
    *("tests/run/test_feeders.py", "tests/run/test_watching.py", "tests/sessions/test_devices.py"),
    "tests/runtime/test_cuda.py",
    *("tests/runtime/test_machine_code.py", "tests/runtime/test_ranking.py"),
    *("tests/containers", "tests/clusters", "tests/test_docs.py", "tests/test_release.py"),
    *("tests/test_quality.py", "tests/test_house.py", "tests/test_security.py"),
    *("tests/test_library.py", "tests/test_without_torch.py", "tests/test_own_model.py"),
    "tests/test_forms.py",
    "tests/gpu_standin",
    *("tests/run/test_bottleneck.py", "tests/run/test_wiring.py", "tests/run/test_durability.py"),
    "tests/run/test_resume.py",
    *("tests/run/test_shards.py", "tests/run/test_limits.py", "tests/run/test_changed_output.py"),
    *("tests/run/test_crossings.py", "tests/run/test_fence.py", "tests/run/test_recovery.py"),
    *("tests/run/test_inputs.py", "tests/run/test_bucket_output.py", "tests/run/test_remote.py"),
    *("tests/run/test_archives.py", "tests/run/test_plan.py", "tests/run/test_decode_backend.py"),
    *("tests/run/test_resampler.py", "tests/test_wheel.py", "tests/scoring"),
)
"""What the flavour has no part in: tested in the cpu environment only."""
WITHOUT_GPU = ("tests/sessions/test_refusals.py", "tests/runtime", "tests/gpu_standin")
"""What onnxruntime-gpu has to do where there is no GPU: refuse, and say why, and all that can be
seen on a stand-in for one."""


@nox.session
def cpu(session: nox.Session) -> None:
    """Everything, on plain onnxruntime."""
    _test(session, "cpu,export,timm,hf,test")


@nox.session
def openvino(session: nox.Session) -> None:
    """What depends on the flavour, on onnxruntime-openvino."""
    ignored = [f"--ignore={path}" for path in SAME_EVERYWHERE]
    _test(session, "openvino,export,test", "tests", "-m", "not slow", *ignored)


@nox.session
def gpu(session: nox.Session) -> None:
    """What onnxruntime-gpu does on a machine without a GPU; it needs no torch."""
    _test(session, "gpu,test", *WITHOUT_GPU)


@nox.session
def ray(session: nox.Session) -> None:
    """Engine ray, on a cluster of processes of this machine."""
    _test(session, "cpu,ray,test", "tests/engines/ray")


def _test(session: nox.Session, extras: str, *tests: str) -> None:
    session.install("-e", f".[{extras}]")
    session.run("python", "-m", "pytest", *(session.posargs or tests))
