"""The tests in fresh environments of each ONNX Runtime flavour; they exclude each other.

`nox` runs all three, one after the other, `nox -s openvino` one; what follows `--` goes to pytest.
The environments are made anew in .nox (6 GB each with torch; gpu has none) and left there.
"""

import nox

WITHOUT_GPU = ("tests/test_refusals.py", "tests/runtime")
"""What onnxruntime-gpu has to do where there is no GPU: refuse, and say why."""


@nox.session
def cpu(session: nox.Session) -> None:
    """Everything, on plain onnxruntime."""
    _test(session, "cpu,export,test")


@nox.session
def openvino(session: nox.Session) -> None:
    """Everything, on onnxruntime-openvino."""
    _test(session, "openvino,export,test")


@nox.session
def gpu(session: nox.Session) -> None:
    """The refusals of onnxruntime-gpu on a machine without a GPU; they need no torch."""
    _test(session, "gpu,test", *WITHOUT_GPU)


def _test(session: nox.Session, extras: str, *tests: str) -> None:
    session.install("-e", f".[{extras}]")
    session.run("python", "-m", "pytest", *(session.posargs or tests))
