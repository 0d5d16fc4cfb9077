"""Paths that cannot even be looked at: every command names the key, the path and the cause."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.results.files import RunFiles
from batchclf.results.lock import only_writer
from batchclf.system.paths import kind_of, require_readable
from tests.conftest import ROOT
from tests.mounts import dead_mount
from tests.tiny import link_digits, tiny_model

MODEL_KEYS = ("model.onnx", "model.bundle", "model.weights", "model.labels")
INPUT_KEYS = ("input", "input glob", "input list")
KEYS = {
    "run": ("JOB", *INPUT_KEYS, "output", *MODEL_KEYS),
    "validate": ("JOB", *INPUT_KEYS, "output", *MODEL_KEYS),
    "tune": ("JOB", *INPUT_KEYS, "output", *MODEL_KEYS),
    "export": ("JOB", *MODEL_KEYS, "FOLDER"),
    "verify": ("JOB", *INPUT_KEYS, *MODEL_KEYS),
}
"""Every path that a command looks at."""
ALL_KEYS = sorted(set().union(*KEYS.values()))
SUFFIXES = {"input list": ".txt", "model.weights": ".pth"}
FAULTS = {
    "too long": (2, errno.ENAMETOOLONG),
    "a circle": (2, errno.ELOOP),
    "forbidden": (5, errno.EACCES),
    "unreadable": (5, errno.EACCES),
    "dead mount": (5, errno.ENOTCONN),
}
NOBODY = 65534
WITHOUT_PRIVILEGE = "-dac_override,-dac_read_search"
COMMANDS = """
import contextlib, io, json, sys
from batchclf.cli import main
for line in sys.stdin:
    said = io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    with contextlib.redirect_stdout(said):
        try:
            main(json.loads(line), prog_name="batchclf")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.buffer.getvalue().decode()]), flush=True)
"""
"""Many commands in one process: most of the time that one takes goes into importing it."""


@pytest.fixture
def faulty(tmp_path: Path, fault: str) -> Iterator[Callable[[str], Path]]:
    """A path with a fault, for each key."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    name = "x" * 300 if fault == "too long" else "x"
    paths = {key: folder / f"{name}{SUFFIXES.get(key, '')}" for key in ALL_KEYS}
    for path in set(paths.values()):
        if fault == "a circle":
            path.symlink_to(path.name)
        elif fault == "unreadable":
            path.write_text("{}")
            _lock(path)
    if fault == "forbidden":
        _lock(folder)
    with dead_mount(folder) if fault == "dead mount" else nullcontext():
        yield paths.__getitem__
    folder.chmod(0o755)  # so that pytest can remove it


def _lock(path: Path) -> None:
    path.chmod(0o000)
    if os.geteuid() == 0:  # which owns it otherwise
        os.chown(path, NOBODY, NOBODY)


def unprivileged(command: list[str]) -> list[str]:
    """The command as somebody to whom permissions apply: root without its privilege."""
    if os.geteuid() != 0:
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    caps = WITHOUT_PRIVILEGE
    return ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", *command]


def arguments_of(folder: Path, command: str, key: str, path: Path) -> list[str]:
    """A command that is right but for the path under `key`."""
    model = tiny_model(folder)
    job: dict[str, Any] = {
        "input": str(folder / "in"),
        "output": str(folder / f"out {key}"),
        "model": model,
    }
    where = key.split(" ")[0]
    if where.startswith("model."):
        leaf = where.removeprefix("model.")
        if leaf in ("bundle", "weights"):
            del model["onnx"]
        if leaf == "weights":
            model["name"] = "shufflenet_v2_x0_5"
        model[leaf] = str(path)
    elif key == "input glob":
        job["input"] = str(path / "*.jpg")
    elif where in job:
        job[where] = str(path)
    file = folder / f"{command} {key}.json"
    file.write_text(json.dumps(job))
    arguments = [command, str(path if key == "JOB" else file), "--json"]
    if command == "export":
        arguments.append(str(path if key == "FOLDER" else folder / f"exported {key}"))
    return arguments


@pytest.mark.parametrize("command", KEYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_path_that_cannot_be_looked_at_is_named_with_its_key_and_the_cause(
    tmp_path: Path, faulty: Callable[[str], Path], fault: str, command: str
) -> None:
    link_digits(tmp_path / "in", 3)
    files = ("JOB", "input list", "model.onnx", "model.weights", "model.labels")
    keys = [key for key in KEYS[command] if fault != "unreadable" or key in files]
    lines = [json.dumps(arguments_of(tmp_path, command, key, faulty(key))) for key in keys]
    done = subprocess.run(
        unprivileged([sys.executable, "-c", COMMANDS]),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr
    exit_code, number = FAULTS[fault]
    answers = map(json.loads, done.stdout.splitlines())
    for key, (code, said) in zip(keys, answers, strict=True):
        answer = json.loads(said)
        assert (code, answer["exit_code"]) == (exit_code, exit_code), (key, answer)
        assert answer["error"].startswith(f"{key.split(' ')[0]}: {faulty(key)}"), answer
        assert errno.errorcode[number] in answer["error"]


def test_whoever_holds_an_output_is_told_the_same(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with (
        pytest.raises(UsageError, match=r"^output: .*/circle: .*ELOOP"),
        only_writer(RunFiles(tmp_path / "circle")),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT])
def test_what_a_disk_or_server_does_not_tell_is_the_machines_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path) -> os.stat_result:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(EnvironmentFailed, match=rf"^input: .*/x: .*{errno.errorcode[number]}"):
        kind_of(tmp_path / "x", "input")


def test_what_is_at_a_path_is_told_links_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("gone")
    expected = {
        ".": "folder",
        "file": "file",
        "link": "file",
        "fifo": "other",
        "gone": "nothing",
        "dangling": "nothing",
        "file/below": "nothing",
    }
    assert {name: kind_of(tmp_path / name, "input") for name in expected} == expected
    for name in expected:
        require_readable(tmp_path / name, "input")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UsageError, match="circle: cannot be looked at"):
        require_readable(tmp_path / "circle", "input")
