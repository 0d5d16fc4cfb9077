"""A job and those who should read what it says: gone, or too slow."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, command
from tests.engines.common import assert_as_undisturbed, has_records, started, write_job

FILLED = 1 << 16
"""Bytes that a pipe holds (pipe(7))."""
SAY = """
import os, sys
from batchclf.cli.streams import say
os.set_blocking(2, False)
os.write(2, bytes({filled}))
os.set_blocking(2, True)
say("y" * 9000)
"""


@pytest.fixture
def gone() -> Iterator[int]:
    """A pipe that nobody reads any more."""
    theirs, ours = os.pipe()
    os.close(theirs)
    yield ours
    os.close(ours)


@pytest.fixture
def full() -> Iterator[int]:
    """A pipe that somebody holds, but does not read, with no room left."""
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    try:
        while True:
            os.write(ours, bytes(4096))
    except BlockingIOError:
        os.set_blocking(ours, True)
    yield ours
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(("run", "nowhere.yaml"), 2), (("run", "jobs/sample.yaml", "--provider", "nothing"), 2)],
    ids=["no job", "no such provider"],
)
@pytest.mark.parametrize("reader", ["gone", "full"])
def test_an_error_keeps_its_exit_code_whoever_does_not_hear_of_it(
    request: pytest.FixtureRequest, arguments: tuple[str, ...], exit_code: int, reader: str
) -> None:
    stderr = request.getfixturevalue(reader)
    done = subprocess.run(command(*arguments), stderr=stderr, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == exit_code


def test_a_job_whose_stderr_nobody_reads_hears_a_signal_and_ends_when_it_is_done(
    tmp_path: Path, full: int
) -> None:
    job = write_job(tmp_path, 200, slow=True)
    process = subprocess.Popen(command("run", job), stderr=full, cwd=ROOT)
    is_begun = has_records(tmp_path / "out")
    while not is_begun():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    done = subprocess.run(command("run", job), stderr=full, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize("room", [0, 4096, 8192, 20_000])
def test_a_long_text_never_waits_for_who_does_not_read_it(room: int) -> None:
    reader, writer = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", SAY.format(filled=FILLED - room)],
            cwd=ROOT,
            stderr=writer,
            timeout=30,
            check=True,
        )
        os.close(writer)
        with os.fdopen(os.dup(reader), "rb") as pipe:
            said = pipe.read()[FILLED - room :]
    finally:
        os.close(reader)
    assert said == ("y" * 9000 + "\n").encode()[: len(said)]
    assert len(said) == {0: 0, 4096: 4096, 8192: 8192, 20_000: 9001}[room]


# ---- stdout --------------------------------------------------------------------------------------

STDOUTS = {"gone": 0, "closed": 0, "/dev/full": 5}
"""What stdout may be, and the exit code of a command whose work is done."""


def with_stdout(stdout: str, gone: int, *arguments: str | Path) -> tuple[int, list[str]]:
    """A command's exit code and the lines that it says on such a stdout."""
    redirected = {"gone": "", "closed": ">&-", "/dev/full": ">/dev/full"}[stdout]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *command(*arguments)],
        stdout=gone,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("stdout", STDOUTS)
@pytest.mark.parametrize(
    ("arguments", "done"),
    [
        (("run", "{job}", "--json"), "the job is complete: {folder}/out/predictions.jsonl"),
        (("validate", "{job}"), "{job} is valid"),
        (("validate", "{job}", "--json"), "{job} is valid"),
        (
            ("export", "{job}", "{folder}/bundle", "--json"),
            "the bundle is complete: {folder}/bundle",
        ),
        (("verify", "{job}", "-n", "2"), "the comparison is complete: they agree"),
        (("verify", "{job}", "-n", "2", "--json"), "the comparison is complete: they agree"),
        (("doctor",), ""),
        (("doctor", "--json"), ""),
        (("schema",), ""),
    ],
    ids=lambda value: " ".join(value).replace("{job} ", "") if isinstance(value, tuple) else "",
)
def test_a_result_that_nobody_can_read_leaves_the_work_done(
    tmp_path: Path, gone: int, stdout: str, arguments: tuple[str, ...], done: str
) -> None:
    facts = {"job": write_job(tmp_path, 4), "folder": tmp_path}
    filled = [one.format(**facts) for one in arguments]
    exit_code, said = with_stdout(stdout, gone, *filled)
    assert exit_code == STDOUTS[stdout], said
    errors = [line for line in said if "stdout" in line]
    if exit_code:
        (error,) = errors
        assert "cannot be written: No space left on device" in error
        assert error.endswith(done.format(**facts))
    else:
        assert not errors
    if arguments[0] == "run":
        assert any("4 images: 4 ok" in line for line in said)
        assert_as_undisturbed(tmp_path)


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_tuned_settings_are_applied_whoever_reads_of_them(
    tmp_path: Path, gone: int, options: tuple[str, ...]
) -> None:
    job = write_job(tmp_path, 8)
    before = job.read_text()
    line = ("--budget", "20", "--apply", *options)
    exit_code, said = with_stdout("/dev/full", gone, "tune", job, *line)
    assert exit_code == 5, said
    assert job.read_text() != before
    (error,) = (one for one in said if "stdout" in one)
    told = f"tuning is complete: {tmp_path}/out/tune.jsonl, {tmp_path}/out/tune.png"
    assert error.endswith(told)


@pytest.mark.parametrize("stdout", STDOUTS)
def test_a_failure_keeps_its_exit_code_whatever_stdout_is(gone: int, stdout: str) -> None:
    exit_code, said = with_stdout(stdout, gone, "run", "nowhere.yaml", "--json")
    assert (exit_code, len(said)) == (2, 1), said


def test_trying_again_goes_on_where_a_signal_stopped_it(tmp_path: Path) -> None:
    job = write_job(tmp_path, 120, slow=True)
    with started(job, "--set", "loader.max_pixels=1") as run:
        assert run.end() == 0, run.stderr
    retry = tmp_path / "out" / ".retry.jsonl"
    with started(job, "--retry-failed") as run:
        run.wait_until(lambda: retry.exists() and retry.stat().st_size > 5000)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143
    num_bytes = retry.stat().st_size
    kept = retry.read_bytes()
    sizes = []
    with started(job, "--retry-failed") as run:
        while run.process.poll() is None:
            try:
                sizes.append(retry.stat().st_size)
            except FileNotFoundError:
                break
        assert run.end() == 0, run.stderr
    assert min(sizes) == num_bytes
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes().startswith(kept)
