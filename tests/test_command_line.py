"""The craft of the command line: completion, suggestions, version, colours, editors."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchclf import __version__
from batchclf.cli import COMMANDS, main
from batchclf.runtime.providers import installed_flavours
from batchclf.spec.explain import dotted_keys
from batchclf.spec.file import load_job
from tests.conftest import ROOT, command
from tests.tiny import write_tiny_job

SCHEMA = ROOT / "batchclf" / "spec" / "job.schema.json"


def said(*arguments: str | Path) -> Result:
    """What a command says, run in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="batchclf")


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    asked = {
        "_BATCHCLF_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["batchclf", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = CliRunner(env=asked).invoke(main, [], prog_name="batchclf")
    assert done.exit_code == 0, done.exception
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("re",), ["report"]),
        (("run", "job.yaml", "--overw"), ["--overwrite"]),
        (("run", "job.yaml", "--provider", "o"), ["openvino"]),
        (("run", "job.yaml", "--set", "loader.w"), ["loader.workers="]),
        (("convert", "out", "--to", ""), ["csv", "parquet", "folders"]),
        (("completion", "f"), ["fish"]),
        (("rnu", "--overw"), [""]),
    ],
)
def test_a_shell_is_offered_what_may_stand_there(
    words: tuple[str, ...], offered: list[str]
) -> None:
    assert completed(*words) == offered


def test_all_commands_are_offered() -> None:
    assert set(completed("")) == set(COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_can_read_its_completion(shell: str, tmp_path: Path) -> None:
    script = said("completion", shell)
    assert script.exit_code == 0, script.stderr
    assert "_BATCHCLF_COMPLETE=" in script.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "completion"
    path.write_text(script.stdout)
    subprocess.run([shell, "-n", path], check=True)


def test_bash_completes_with_what_is_printed(tmp_path: Path) -> None:
    wrapper = tmp_path / "batchclf"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchclf "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "completion").write_text(said("completion", "bash").stdout)
    program = (
        "source completion; COMP_WORDS=(batchclf val); COMP_CWORD=1; "
        "_batchclf_completion batchclf val; echo ${COMPREPLY[@]}"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "validate\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (("rnu", "job.yaml"), "No such command 'rnu'; did you mean 'run'?"),
        (("valdate",), "did you mean 'validate'?"),
        (("qqqqqq",), "No such command 'qqqqqq'; `batchclf --help` lists them"),
        (("run", "{job}", "--overwrit"), "--overwrite"),
        (("validate", "{job}", "--set", "loader.worker=2"), "did you mean `workers`?"),
        (("validate", "{job}", "--provider", "openvin"), "openvino"),
        (("validate", "{job}", "--set", "loader.decode=fats"), "fast"),
        (("convert", "out", "--to", "cvs", "-o", "x"), "csv"),
    ],
)
def test_what_is_misspelt_is_told_with_what_was_meant(
    arguments: tuple[str, ...], suggested: str, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    done = said(*(one.format(job=job) for one in arguments))
    assert done.exit_code == 2
    assert suggested in done.stderr


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("run",), "`batchclf init job.yaml` writes one"),
        (("status",), "give the folder that a job writes to"),
        (("run", "job.yaml", "-i", *(f"photos/{n:04}.jpg" for n in range(500))), "in quotes"),
    ],
)
def test_arguments_that_lack_or_are_too_many_are_told_with_what_to_give(
    arguments: tuple[str, ...], advice: str
) -> None:
    done = said(*arguments)
    assert done.exit_code == 2
    assert advice in done.stderr
    assert len(done.stderr) < 600


@pytest.mark.parametrize("command", ["status", "score", "convert", "report"])
def test_a_job_file_in_the_place_of_its_output_is_told_with_that_output(
    command: str, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path)
    needed = {
        "score": ("--truth", "x"),
        "convert": ("--to", "csv", "-o", "x"),
        "report": ("-o", "x"),
    }
    done = said(command, job, *needed.get(command, ()))
    assert done.exit_code == 2
    assert f"{job} is a file; the job in it writes to {tmp_path / 'out'}: give that" in done.stderr


def test_the_version_is_told_with_flavour_providers_and_resampler() -> None:
    first, *others = said("--version").stdout.splitlines()
    assert first.startswith(f"batchclf, version {__version__}, resampler: ")
    (flavour, version), *_ = installed_flavours().items()
    assert others[0].startswith(f"{flavour} {version}, providers: ")
    assert "cpu" in others[0]


def test_a_version_that_cannot_be_printed_ends_with_5_and_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("--version"), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 5
    assert b"Traceback" not in done.stderr


# ---- colours -------------------------------------------------------------------------------------


def said_on_a_terminal(*arguments: str | Path, **env: str) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment = {**environment, "TERM": "xterm-256color", **env}
    with subprocess.Popen(
        command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ):
        os.close(theirs)
        found = b""
        try:
            while data := os.read(ours, 65536):
                found += data
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return found.decode()


def test_errors_are_red_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path, batch_size=0)
    assert "\x1b[31mbatchclf: " in said_on_a_terminal("validate", job)
    assert "\x1b" not in said_on_a_terminal("validate", job, NO_COLOR="1")
    assert "\x1b" not in said_on_a_terminal("validate", job, TERM="dumb")
    assert "\x1b" not in said("validate", job).stderr


# ---- editors -------------------------------------------------------------------------------------


def test_the_schema_in_the_package_is_what_the_command_prints() -> None:
    printed = said("schema").stdout
    renew = "batchclf schema > batchclf/spec/job.schema.json"
    assert SCHEMA.read_text() == printed, f"renew it: {renew}"


def test_a_job_file_from_init_names_the_schema_for_editors(tmp_path: Path) -> None:
    assert said("init", tmp_path / "job.yaml").exit_code == 0
    first = (tmp_path / "job.yaml").read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first == f"{prefix}{SCHEMA.as_uri()}"
    assert json.loads(SCHEMA.read_text())["properties"]["input"]
    load_job(tmp_path / "job.yaml")


def test_dotted_keys_are_all_of_a_job_file() -> None:
    keys = list(dotted_keys())
    assert len(keys) == len(set(keys)) > 40
    assert {"input", "loader", "loader.workers", "model.preprocess.resize"} <= set(keys)
