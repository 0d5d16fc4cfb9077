"""Every command of the README works as it stands there."""

import re
import shutil
from pathlib import Path

import pytest

from batchclf.runtime.providers import installed_flavours
from batchclf.spec.file import load_job
from tests.conftest import ROOT, Batchclf

README = (ROOT / "README.md").read_text()
CONSOLE = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
INLINE = re.findall(r"`(batchclf [^`]+)`", README)
TAKES_A_JOB = ("run", "validate", "export", "verify", "tune")


def test_the_quick_start_is_two_lines_that_ci_runs() -> None:
    lines = [line for line in CONSOLE if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert [line for line in CONSOLE if not line.startswith("batchclf ")] == lines
    assert "grep '^python3 -m venv ' \"$root/README.md\"" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "commands",
    [[line for line in CONSOLE if line.startswith("batchclf ")], INLINE],
    ids=["console", "inline"],
)
def test_the_commands_of_the_readme_run_as_they_stand(
    commands: list[str], batchclf: Batchclf, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    if not any("init" in command for command in commands):
        assert batchclf("init", "job.yaml", "-i", "photos", cwd=tmp_path).exit_code == 0
    assert commands
    for command in commands:
        arguments = command.split()[1:]
        if arguments[0] in TAKES_A_JOB:
            # Random weights in place of a download.
            arguments += ["--set", "model.weights=none", "--set", "model.name=resnet18"]
        if arguments[0] == "tune":
            arguments += ["--budget", "10", "--batch-sizes", "1"]  # the later budget counts
        done = batchclf(*arguments, cwd=tmp_path)
        assert done.exit_code == 0, f"{command}: {done.stderr}"


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_has_help_and_an_example_or_needs_none(batchclf: Batchclf) -> None:
    overview = batchclf("--help").stdout
    for name in ("run", "init", "validate", "export", "verify", "tune", "doctor", "schema"):
        assert name in overview
        done = batchclf(name, "--help")
        assert done.exit_code == 0
        assert f"batchclf {name}" in done.stdout


def test_every_shipped_job_file_validates(batchclf: Batchclf) -> None:
    works = {"cpu", "openvino"} if "onnxruntime-openvino" in installed_flavours() else {"cpu"}
    for job in sorted((ROOT / "jobs").glob("*.yaml")):
        done = batchclf("validate", job)
        if load_job(job).provider.name not in works:
            assert done.exit_code == 4, done.stderr
            done = batchclf("validate", job, "--provider", "cpu")
        assert done.exit_code == 0, done.stderr
