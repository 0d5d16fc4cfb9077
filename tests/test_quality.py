"""The code is formatted, linted and type-checked."""

import subprocess
import sys
import warnings

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "arguments",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff", "ruff-format", "mypy"],
)
def test_the_code_is_clean(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_that_pytest_cannot_remove_fails_no_test_and_other_warnings_do() -> None:
    warnings.warn(pytest.PytestWarning("(rm_rf) error removing /tmp/x\nOSError"), stacklevel=1)
    with pytest.raises(pytest.PytestWarning):
        warnings.warn(pytest.PytestWarning("something else"), stacklevel=1)
