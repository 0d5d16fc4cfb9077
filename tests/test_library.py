"""`from batchclf import load_job, run_job`: from a script, a thread, a notebook."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nbclient
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import batchclf
from batchclf import (
    Failure,
    JobSpec,
    Prediction,
    Progress,
    RunOptions,
    Shard,
    errors,
    load_job,
    run_job,
)
from tests.conftest import ROOT, read_records
from tests.engines.common import WORKER, run_json, write_job
from tests.tiny import link_digits, write_tiny_job

PUBLIC = {
    *("load_job", "run_job"),
    *("JobSpec", "RunOptions", "Shard", "Progress"),
    *("RunResult", "Summary", "Record", "ImageRef", "Prediction", "Failure"),
    "errors",
}


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert set(batchclf.__all__) == PUBLIC
    assert set(dir(batchclf)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(batchclf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'run_jobs'"):
        batchclf.run_jobs  # noqa: B018


def test_importing_the_package_imports_nothing_that_takes_time() -> None:
    program = (
        "import sys; before = set(sys.modules); import batchclf; print(set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    found = {name.split(".")[0] for name in eval(done.stdout)}
    assert found - sys.stdlib_module_names == {"batchclf"}


def test_a_job_run_by_a_program_gives_typed_records_and_a_summary(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 12)
    (images / "bad.jpg").write_bytes(b"")
    job = load_job(write_tiny_job(tmp_path, input=str(images)), {"top_k": 2, "batch_size": 5})
    assert isinstance(job, JobSpec)
    seen: list[Progress] = []
    result = run_job(job, progress=seen.append)
    assert (result.was_complete, result.summary.num_images, result.summary.num_errors) == (
        *(False, 13),
        1,
    )
    assert result.summary.errors_by_code == {"empty_file": 1}
    assert result.summary.provider.active == "CPUExecutionProvider"
    assert seen[0] == Progress(13, 0, 0)
    assert seen[-1] == Progress(13, 13, 1)
    lines = read_records(tmp_path / "out")
    for record, line in zip(result.records(), lines, strict=True):
        assert os.fsdecode(record.ref.path) == line["path"]
        if isinstance(record.outcome, Failure):
            assert record.outcome.code == line["error"]["code"]
        else:
            assert [vars_of(one) for one in record.outcome] == line["predictions"]
    again = run_job(job)
    assert again.was_complete
    assert again.summary == result.summary


def vars_of(one: Prediction) -> dict[str, Any]:
    return {"label": one.label, "index": one.index, "score": one.score}


def test_records_that_are_no_more_what_was_written_are_the_environments_failure(
    tmp_path: Path,
) -> None:
    result = run_job(write_tiny_job(tmp_path), RunOptions(limit=3))
    with result.files.predictions.open("ab") as file:
        file.write(b'{"path":')
    with pytest.raises(errors.EnvironmentFailed, match=r"predictions\.jsonl:4: not a record"):
        list(result.records())


def test_records_that_are_gone_are_not_taken_for_none(tmp_path: Path) -> None:
    result = run_job(write_tiny_job(tmp_path), RunOptions(limit=3))
    predictions = result.files.predictions
    predictions.write_bytes(predictions.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(errors.EnvironmentFailed, match="1 records are there, not 3"):
        list(result.records())
    predictions.unlink()
    with pytest.raises(errors.EnvironmentFailed, match="0 records are there, not 3"):
        list(result.records())


def test_the_records_of_a_shard_have_their_numbers_in_the_whole_job(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    result = run_job(job, RunOptions(Shard(1, 3), limit=9))
    assert [record.ref.index for record in result.records()] == [3, 4, 5]


def test_progress_of_a_run_that_goes_on_counts_its_errors_from_the_first(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    (images / "000000-bad.jpg").write_bytes(b"")
    job = write_tiny_job(tmp_path, input=str(images))
    predictions = run_job(job).files.predictions
    predictions.write_bytes(b"".join(predictions.read_bytes().splitlines(keepends=True)[:4]))
    seen: list[Progress] = []
    run_job(job, progress=seen.append)
    (first, *_) = seen
    assert (first.num_done, first.num_errors) == (4, 1)


def test_overrides_are_keys_and_paths_among_them_are_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_tiny_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    spec = load_job(job, {"output": Path("there"), "loader.workers": 3, "provider": "cpu"})
    assert (spec.output, spec.loader.workers) == (tmp_path / "there", 3)
    with pytest.raises(errors.JobFileError, match=r"loader\.wokers=3: unknown key"):
        load_job(job, {"loader.wokers": 3})


def test_options_that_contradict_each_other_are_a_usage_error() -> None:
    with pytest.raises(errors.UsageError, match="--overwrite starts anew"):
        RunOptions(overwrite=True, retry_failed=True)


def test_a_job_runs_in_a_thread_and_signal_handlers_stay_as_they_are(tmp_path: Path) -> None:
    job = load_job(write_tiny_job(tmp_path))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    found: list[Any] = []

    def show(progress: Progress) -> None:
        found.append({number: signal.getsignal(number) for number in before})

    thread = threading.Thread(target=lambda: found.append(run_job(job, progress=show)))
    thread.start()
    thread.join()
    assert found.pop().summary.num_ok == 300
    assert found
    assert all(one == before for one in found)


class _EnoughError(Exception):
    pass


@pytest.mark.parametrize("error", [_EnoughError, KeyboardInterrupt])
def test_what_progress_raises_ends_the_run_which_can_be_resumed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    job = write_job(tmp_path, 240, slow=True)

    def show(progress: Progress) -> None:
        if progress.num_done:
            raise error

    with pytest.raises(error):
        run_job(job, progress=show)
    assert not workers()
    status = "interrupted" if error is KeyboardInterrupt else "failed"
    assert run_json(tmp_path / "out")["status"] == status
    result = run_job(job)
    assert (result.summary.num_ok, result.was_complete) == (240, False)
    assert len(read_records(tmp_path / "out")) == 240


def workers() -> list[psutil.Process]:
    """The worker processes of this one."""
    return [
        one for one in psutil.Process().children() if any(WORKER in part for part in one.cmdline())
    ]


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    job = write_job(tmp_path, 60, slow=True)
    killed: list[int] = []

    def show(progress: Progress) -> None:
        if progress.num_done and not killed:
            (worker,) = workers()
            worker.kill()
            killed.append(worker.pid)

    result = run_job(job, progress=show)
    assert killed
    assert (result.summary.num_ok, result.summary.num_new) == (60, 60)


def test_signals_drain_a_job_where_that_is_asked_for(tmp_path: Path) -> None:
    job = write_job(tmp_path, 200, slow=True)
    program = (
        "import os, signal, sys\n"
        "from batchclf import errors, run_job\n"
        "def show(progress):\n"
        "    if progress.num_done:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n"
        "    run_job(sys.argv[1], progress=show, handle_signals=True)\n"
        "except errors.Interrupted as error:\n"
        "    print(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, job], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "143\n", done.stderr
    assert run_json(tmp_path / "out")["status"] == "interrupted"
    assert run_job(job).summary.num_ok == 200


def test_a_job_runs_in_a_notebook_with_a_bar(tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path)
    notebook = new_notebook(
        cells=[
            new_code_cell("from batchclf import load_job, run_job"),
            new_code_cell(
                f"result = run_job({str(job)!r}, progress=True)\n"
                "print(result.summary.num_ok, len(list(result.records())))"
            ),
        ]
    )
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT}}).execute()
    printed = "".join(
        one.get("text", "") for one in notebook.cells[1].outputs if one.get("name") == "stdout"
    )
    assert printed == "300 300\n"
    shown = json.dumps(notebook.cells[1].outputs)
    assert "300/300" in shown
    assert "Traceback" not in shown
