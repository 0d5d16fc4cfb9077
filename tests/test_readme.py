"""Every command of the README works as it stands there."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from batchclf.cli import COMMANDS
from batchclf.errors import JobFileError
from batchclf.runtime.providers import installed_flavours
from batchclf.spec.file import load_job, parse_set
from batchclf.spec.job import JobSpec
from tests.conftest import JOBS, ROOT, Batchclf
from tests.run.test_keys import keys_of

README = (ROOT / "README.md").read_text()
CONSOLE = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
INLINE = [span for span in SPANS if span.startswith("batchclf ")]
TUNE = [command for command in INLINE if command.startswith("batchclf tune ")]
TAKES_A_JOB = ("run", "validate", "export", "verify", "tune")
RANDOM_WEIGHTS = ("--set", "model.weights=none", "--set", "model.name=resnet18")
"""In place of a download."""


def test_the_quick_start_is_two_lines_that_ci_runs() -> None:
    lines = [line for line in CONSOLE if line.startswith("python3 -m venv ")]
    assert len(lines) == 2
    assert [line for line in CONSOLE if not line.startswith("batchclf ")] == lines
    assert "grep '^python3 -m venv ' \"$root/README.md\"" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "commands",
    [
        [line for line in CONSOLE if line.startswith("batchclf ")],
        [one for one in INLINE if one not in TUNE],
    ],
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
            arguments += RANDOM_WEIGHTS
        done = batchclf(*arguments, cwd=tmp_path)
        assert done.exit_code == 0, f"{command}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", TUNE)
def test_the_tuning_of_the_readme_runs_as_it_stands(
    command: str, batchclf: Batchclf, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    assert batchclf("init", "job.yaml", "-i", "photos", cwd=tmp_path).exit_code == 0
    done = batchclf(*command.split()[1:], *RANDOM_WEIGHTS, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "written into job.yaml" in done.stderr


# ---- options and keys in the prose ---------------------------------------------------------------


def options_in(text: str) -> list[tuple[str, list[str]]]:
    """The options in code spans, as (command or empty, the arguments with them)."""
    found = []
    for span in re.findall(r"`([^`]+)`", text):
        first, *rest = span.replace("batchclf ", "", 1).split()
        if first in COMMANDS:
            found.append((first, rest))
        elif first.startswith("-") and first not in OF_OTHERS:
            found.append(("", [first, *rest]))
    return [(name, words) for name, words in found if any(one[0] == "-" for one in words)]


OF_OTHERS = ("--build-arg",)
"""Options of other commands that stand by themselves: of docker."""


def is_accepted(name: str, words: list[str]) -> bool:
    """Whether a command takes these arguments, and the job the keys that they set."""
    module = importlib.import_module(f"batchclf.cli.{name}")
    takes_a_job = any(isinstance(one, click.Argument) for one in module.command.params)
    given = ["jobs/cpu.yaml", *words] if takes_a_job and words[0].startswith("-") else [*words]
    try:
        context = module.command.make_context(name, given)
        sets = [parse_set(one) for one in context.params.get("sets", ())]
        load_job(ROOT / "jobs" / "cpu.yaml", sets)
    except (click.ClickException, JobFileError):
        return False
    return True


def refused(text: str) -> list[str]:
    """The options in a text that no command takes, or not the one that they stand with."""
    return [
        " ".join([name, *words]).strip()
        for name, words in options_in(text)
        if not any(is_accepted(one, words) for one in ([name] if name else COMMANDS))
    ]


def test_every_option_in_the_prose_is_one() -> None:
    assert len(options_in(PROSE)) >= 10
    assert refused(PROSE) == []


@pytest.mark.parametrize(
    "text",
    [
        "`run --retry-errors` tries again",
        "`--retry-errors`",
        "`--set loader.threads=8`",
        "`batchclf tune job.yaml --budgets 60`",
        "`-q 64`",
        "`validate --retry-failed`",
        "`--budget soon`",
    ],
)
def test_an_invented_option_would_be_noticed(text: str) -> None:
    assert len(refused(text)) == 1


def keys_in(text: str) -> list[str]:
    """What stands, as code or in bold, like a key of the job file that lies deeper."""
    spans = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", text.replace("**", "`"))
    files = (".txt", ".json", ".jsonl")
    return [
        one
        for one in spans
        if one.split(".")[0] in JobSpec.model_fields and not one.endswith(files)
    ]


def test_every_key_in_the_prose_is_one() -> None:
    assert keys_in("`loader.threads: 8`, `loader.workers`") == ["loader.threads", "loader.workers"]
    assert len(keys_in(PROSE)) >= 4
    assert set(keys_in(PROSE)) <= set(keys_of(JobSpec))


def test_the_program_of_the_readme_runs_as_it_stands(batchclf: Batchclf, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    assert batchclf("init", "job.yaml", "-i", "photos", cwd=tmp_path).exit_code == 0
    job = tmp_path / "job.yaml"
    text = job.read_text()
    found = load_job(job)
    assert found.model.name is not None
    text = text.replace(f"name: {found.model.name}", "name: resnet18")
    job.write_text(text.replace("weights: DEFAULT", "weights: none"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_photos = len(list((tmp_path / "photos").iterdir()))
    assert done.stdout.startswith(f"{num_photos} of {num_photos}\n")
    assert len(done.stdout.splitlines()) == 1 + num_photos


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert not file or (ROOT / file).exists(), target
        assert not heading or f"\n## {heading.replace('-', ' ')}\n" in README.lower(), target


def test_every_command_has_help_and_an_example_or_needs_none(batchclf: Batchclf) -> None:
    overview = batchclf("--help").stdout
    for name in ("run", "init", "validate", "export", "verify", "tune", "doctor", "schema"):
        assert name in overview
        done = batchclf(name, "--help")
        assert done.exit_code == 0
        assert f"batchclf {name}" in done.stdout


def test_every_shipped_job_file_validates(batchclf: Batchclf) -> None:
    works = {"cpu", "openvino"} if "onnxruntime-openvino" in installed_flavours() else {"cpu"}
    for job in JOBS:
        done = batchclf("validate", job)
        if load_job(job).provider.name not in works:
            assert done.exit_code == 4, done.stderr
            done = batchclf("validate", job, "--provider", "cpu")
        assert done.exit_code == 0, done.stderr
