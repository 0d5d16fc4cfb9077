"""A process for each of several devices: one output in order, and a process that ends is no end."""

import math
import os
import pickle
import signal
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from batchclf.engines.local.board import Board
from batchclf.engines.local.process import Workers
from batchclf.engines.local.supervisor import Supervisor
from batchclf.errors import DeviceLost, Interrupted, ProcessLost, UsageError
from batchclf.images.ahead import Depth
from batchclf.results.records import ActiveProvider, ImageRef
from batchclf.run import feeders, ready
from batchclf.run.feeder import Share
from batchclf.run.feeders import Feeders, shares_of
from batchclf.run.job import run_job
from batchclf.run.output import hold_output
from batchclf.run.plan import Plan, Task
from batchclf.run.recovery import Death
from batchclf.run.request import Run
from batchclf.sessions.together import together
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec, ProviderSpec, RuntimeSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.conftest import read_records
from tests.engines.common import assert_as_undisturbed, fault, finished, run_json, write_job
from tests.faults.poison import poisoned_environment, write_poison
from tests.faults.poison import sitecustomize as poison
from tests.proxy import NAME, proxied_bucket
from tests.tiny import (
    Log,
    assert_same_records,
    link_digits,
    run_here,
    write_tiny_job,
)


def feed_in_two(monkeypatch: pytest.MonkeyPatch) -> list[Feeders]:
    """From now on, jobs run in two processes, each on the CPU; these appear in the list."""
    started: list[Feeders] = []

    class Noted(Feeders):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    def shares(plan: Plan, sample: object, used: str | None) -> list[Share]:
        return [Share(plan, (), used)] * 2

    monkeypatch.setattr(ready, "shares_of", shares)
    monkeypatch.setattr(ready, "Feeders", Noted)
    return started


def images(folder: Path, num_images: int) -> Path:
    """Digits, a few of them broken."""
    found = link_digits(folder, num_images)
    for number in (3, 20, 21):
        broken = next(found.glob(f"{number:06d}.*"))
        broken.unlink()
        broken.write_bytes(b"broken")
    return found


def job(folder: Path, output: str, **keys: Any) -> Path:
    return write_tiny_job(
        folder,
        name=f"{output}.yaml",
        input=str(folder / "images"),
        output=str(folder / output),
        batch_size=4,
        runtime={"streams": 1, "part": 4},
        **keys,
    )


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_two_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    images(tmp_path / "images", 90)
    loader = {"workers": 2, "backend": backend}
    alone = run_here(job(tmp_path, "alone", loader=loader))
    started = feed_in_two(monkeypatch)
    together = run_here(job(tmp_path, "together", loader=loader))
    assert len(started) == 1
    written = [one.files.predictions.read_bytes() for one in (alone, together)]
    assert written[0] == written[1]
    assert together.summary.num_images == 90
    assert together.summary.errors_by_code == alone.summary.errors_by_code
    assert together.summary.batch_ms["p50"] > 0
    for feeder in started[0]._feeders:
        assert feeder._process.returncode is not None


SLOW_LINES = """
def change(module):
    really_encode = module.encode

    def encode(records):
        time.sleep(0.1)
        return really_encode(records)

    module.encode = encode
"""


def test_the_time_that_processes_take_to_make_lines_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_digits(tmp_path / "images", 40)
    feed_in_two(monkeypatch)
    for name, value in fault(tmp_path, SLOW_LINES, "batchclf.run.classify").items():
        monkeypatch.setenv(name, value)
    assert run_here(job(tmp_path, "out")).summary.stage_s.write > 10 * 0.1


def test_images_of_a_bucket_are_read_ahead_of_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there is memory for batches."""
    pytest.importorskip("obstore")
    images(tmp_path / "images", 90)
    run_here(job(tmp_path, "alone"))
    with proxied_bucket() as bucket:
        bucket.put_folder(tmp_path / "images", "images")
        feed_in_two(monkeypatch)
        far = job(tmp_path, "far", loader={"workers": 2, "max_seconds": 20})
        far.write_text(far.read_text().replace(str(tmp_path / "images"), f"s3://{NAME}/images"))
        run_here(far)
    assert_same_records(read_records(tmp_path / "far"), read_records(tmp_path / "alone"))


def test_a_process_that_is_killed_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeding = feed_in_two(monkeypatch)
    images(tmp_path / "images", 600)
    path = job(tmp_path, "out")

    class Killer(Log):
        def update(self, num_images: int, num_errors: int) -> None:
            if num_images >= 8:
                os.kill(feeding[0]._feeders[1]._process.pid, signal.SIGKILL)

    with pytest.raises(DeviceLost, match=r"ended: killed by SIGKILL"):
        run_here(path, log=Killer())
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert 8 <= written.count(b"\n") < 600
    result = run_here(path)
    assert result.summary.num_images == 600
    assert result.files.predictions.read_bytes().startswith(written)


def test_a_process_that_is_killed_before_it_is_given_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 90)
    feed_in_two(monkeypatch)

    class Killed(Feeders):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            idle = self._feeders[1]
            idle._process.kill()
            while not idle.has_ended:
                time.sleep(0.01)

    monkeypatch.setattr(ready, "Feeders", Killed)
    with pytest.raises(ProcessLost, match=r"ended: killed by SIGKILL"):
        run_here(job(tmp_path, "out"))


def test_the_process_that_all_wait_for_is_dealt_batches_beyond_the_bound() -> None:
    """With fewer than it wants, it may wait for more before it finishes one."""
    fast, slow = (SimpleNamespace(has_ended=False, num_lacking=lacking) for lacking in (5, 3))
    feeders = cast(Any, Feeders.__new__(Feeders))
    feeders._is_all_dealt, feeders._max_dealt, feeders._feeders = False, 2, [fast, slow]
    feeders._dealt = deque([(slow, [])])
    assert feeders._next_dealt() is fast
    feeders._dealt.append((fast, []))
    assert feeders._next_dealt() is slow
    slow.num_lacking = 0
    assert feeders._next_dealt() is None


def test_processes_that_read_ahead_of_a_batch_do_not_wait_for_each_other_at_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads more images ahead than the bound has batches for, before its first is whole."""
    pytest.importorskip("obstore")
    images(tmp_path / "images", 90)
    run_here(job(tmp_path, "alone"))

    class Patient(Log):
        def __init__(self) -> None:
            super().__init__()
            self.most, self.since = 0, time.monotonic()

        def update(self, num_images: int, num_errors: int) -> None:
            if num_images > self.most:
                self.most, self.since = num_images, time.monotonic()
            assert time.monotonic() - self.since < 10, f"stands still after {num_images} images"

    with proxied_bucket() as bucket:
        bucket.put_folder(tmp_path / "images", "images")
        feed_in_two(monkeypatch)
        monkeypatch.setattr(feeders, "AS_MANY_AGAIN", 1 / AHEAD)
        far = job(tmp_path, "far", loader={"workers": 2, "max_seconds": 20})
        far.write_text(far.read_text().replace(str(tmp_path / "images"), f"s3://{NAME}/images"))
        run_here(far, log=Patient())
    assert_same_records(read_records(tmp_path / "far"), read_records(tmp_path / "alone"))


class Notes(Log):
    """Notes which images the processes loaded, by the number of the thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.by_process = [0, 0]
        self.threads: dict[int, int | None] = {}
        self.began = False
        self.num_written = 0

    def loading(self, thread: int, index: int | None, step: int) -> None:
        self.threads[thread] = index
        if index is not None and index not in self.seen:
            self.seen.add(index)
            self.by_process[thread // (NUM_WORKERS + Depth().num_reads)] += 1

    def wait_for(self, num_images: int) -> None:
        """Wait until each has loaded so many, and is at none."""
        ends_at = time.monotonic() + 20
        while min(self.by_process) < num_images or any(
            one is not None for one in self.threads.values()
        ):
            assert time.monotonic() < ends_at, f"{self.by_process} images are loaded"
            time.sleep(0.01)

    def update(self, num_images: int, num_errors: int) -> None:
        self.num_written = num_images
        if num_images and not self.began:
            self.began = True
            self.when_begun()

    def when_begun(self) -> None:
        """Called when the first records are written."""


NUM_WORKERS = 2
AHEAD = 4 + 16 + 1
"""Batches of 4 that each process is ahead by: there is memory for 4, and 64 are read ahead."""


def test_processes_are_heard_while_records_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 2 * 4 * AHEAD)
    feed_in_two(monkeypatch)

    class Blocked(Notes):
        def when_begun(self) -> None:
            self.wait_for(4 * AHEAD)

    loader = {"workers": 2, "backend": "threads"}
    run_here(job(tmp_path, "out", loader=loader), log=Blocked())


class Stopping(Notes):
    """Stops the second process until the first has loaded all that it is given meanwhile."""

    most = 4 * 2 * 2 * AHEAD
    """Images that may be dealt and not written."""

    def __init__(self, started: list[Feeders]) -> None:
        super().__init__()
        self.started = started

    def when_begun(self) -> None:
        self.fast, self.slow = self.started[0]._feeders
        self.slow._process.send_signal(signal.SIGSTOP)
        threading.Thread(target=self.go_on_later).start()

    def go_on_later(self) -> None:
        before, ends_at = -1, time.monotonic() + 20
        while before < len(self.seen) or (before < self.most // 2 and time.monotonic() < ends_at):
            before = len(self.seen)
            time.sleep(0.5)
        self.num_ahead = before - self.num_written
        self.when_idle()
        self.slow._process.send_signal(signal.SIGCONT)

    def when_idle(self) -> None:
        """Called before the second goes on."""


def test_one_that_is_slower_holds_up_the_others_only_when_they_are_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_images = 600
    link_digits(tmp_path / "images", num_images)
    log = Stopping(feed_in_two(monkeypatch))
    loader = {"workers": 2, "backend": "threads"}
    result = run_here(job(tmp_path, "out", loader=loader), log=log)
    assert [line["path"] for line in read_records(tmp_path / "out")] == sorted(
        os.listdir(tmp_path / "images")
    )
    assert result.summary.num_images == num_images
    assert 4 * AHEAD < log.num_ahead <= log.most


def test_one_that_ends_while_all_wait_for_another_is_told_of_once_that_one_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is dealt anything any more, and without more the other would not finish its last."""
    link_digits(tmp_path / "images", 600)

    class Killing(Stopping):
        idle_since = math.inf

        def when_idle(self) -> None:
            self.fast._process.kill()
            while not self.fast.has_ended:
                time.sleep(0.01)
            self.idle_since = time.monotonic()

        def update(self, num_images: int, num_errors: int) -> None:
            super().update(num_images, num_errors)
            assert time.monotonic() - self.idle_since < 60, "stands still"

    log = Killing(feed_in_two(monkeypatch))
    loader = {"workers": 2, "backend": "threads"}
    with pytest.raises(DeviceLost, match=r"ended: killed by SIGKILL"):
        run_here(job(tmp_path, "out", loader=loader), log=log)
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    # All that the second was given is written, and what the first had done.
    assert written.count(b"\n") > 4 * 2 * AHEAD


def test_what_processes_have_done_when_a_signal_comes_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 500)
    feed_in_two(monkeypatch)
    path, stop = job(tmp_path, "out", loader={"workers": 2, "backend": "threads"}), StopRequest()

    class Stopping(Notes):
        def when_begun(self) -> None:
            self.wait_for(4 * AHEAD)
            stop.signal_number = signal.SIGTERM

    spec = load_job(path)
    with hold_output(spec, RunOptions().shard), pytest.raises(Interrupted):
        run_job(Run(spec, RunOptions(), Stopping(), stop))
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    # But for the last batches, which may not have been inferred yet.
    assert 4 * AHEAD < written.count(b"\n") < 500
    result = run_here(path)
    assert result.summary.num_images == 500
    assert result.files.predictions.read_bytes().startswith(written)


IN_TWO = """
exec(open({poison!r}).read(), {{}})

def change(module):
    from batchclf.run.feeder import Share
    module.shares_of = lambda plan, sample, used: [Share(plan, (), used)] * 2
"""


def test_an_image_that_crashes_the_process_of_a_gpu_becomes_an_error(tmp_path: Path) -> None:
    path = write_job(tmp_path, 60, loader={"workers": 2, "backend": "threads"})
    guilty = sorted((tmp_path / "images").iterdir())[40]
    guilty.unlink()
    write_poison(guilty, "segfault")
    program = IN_TWO.format(poison=poison.__file__)
    env = {**poisoned_environment(), **fault(tmp_path, program, "batchclf.run.ready")}
    exit_code, said = finished(path, env=env)
    assert exit_code == 0, said
    assert "lost a process (the process of GPU" in said
    assert_as_undisturbed(tmp_path, but={guilty.name: "decoder_crash"})


def test_the_end_of_a_process_that_is_at_no_image_is_that_of_its_gpu() -> None:
    lost = pickle.loads(pickle.dumps(ProcessLost("it ended", range(4, 8), is_killed=True)))
    descriptor = Board.new_descriptor()
    board = Board(descriptor)
    workers = cast(Workers, SimpleNamespace(board_descriptor=descriptor))
    watching = Supervisor(workers, cast(Any, None), StopRequest(), 0.0)
    os.close(descriptor)
    board.at(3, 30)
    found = watching._heard(("error", lost))
    assert found == Death("lost a process (it ended)", by_kernel=True, by_device=True)
    board.at(5, 50)
    board.at(6, 60, step=1)
    found = watching._heard(("error", lost))
    assert found == Death("lost a process (it ended)", (50,), (60,), by_kernel=True)


def test_what_a_process_raises_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 30)

    def shares(plan: Plan, sample: object, used: str | None) -> list[Share]:
        job = plan.task.job
        provider = job.provider.model_copy(update={"options": {"unknown": 1}})
        task = replace(plan.task, job=job.model_copy(update={"provider": provider}))
        return [Share(plan, (), used), Share(replace(plan, task=task), (), used)]

    monkeypatch.setattr(ready, "shares_of", shares)
    with pytest.raises(UsageError, match=r"provider.options: found unknown"):
        run_here(job(tmp_path, "out"))
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_what_one_process_falls_back_to_is_told_beside_what_the_others_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images", 30)

    def shares(plan: Plan, sample: object, used: str | None) -> list[Share]:
        gpu = ProviderSpec(name="cuda", devices=(1,), allow_fallback=True)
        job = plan.task.job.model_copy(update={"provider": gpu, "runtime": RuntimeSpec()})
        without = replace(plan, task=replace(plan.task, job=job))
        return [Share(plan, (), used), Share(without, (), used)]

    monkeypatch.setattr(ready, "shares_of", shares)
    log = Log()
    run_here(job(tmp_path, "out"), log=log)
    told = run_json(tmp_path / "out")
    assert told["provider"]["requested"] == "cpu, cuda"
    assert told["provider"]["device"] == "CPU"
    assert told["provider"]["fallback"].startswith("GPU 1: provider cuda: the installed onnx")
    assert any(line.startswith("FALLING BACK TO THE CPU") for line in log.lines)


def test_what_devices_opened_with_is_told_of_all_of_them() -> None:
    gpu = ActiveProvider(
        requested="cuda",
        active="CUDAExecutionProvider",
        device="0: H100",
        nodes={"CUDAExecutionProvider": 60, "CPUExecutionProvider": 2},
        cpu_nodes=("Shape one",),
        options={"device_id": "0", "use_tf32": "1"},
    )
    in_part = replace(
        gpu,
        device="1: T4",
        nodes={"CUDAExecutionProvider": 58, "CPUExecutionProvider": 4},
        cpu_nodes=("Shape one", "Trilu two"),
        options={"device_id": "1", "use_tf32": "1"},
        fallback="Trilu stays",
    )
    on_cpu = ActiveProvider(
        "cuda", "CPUExecutionProvider", "CPU", {"CPUExecutionProvider": 62}, fallback="it is busy"
    )
    assert together([("GPU 0", gpu)]) == gpu
    found = together([("GPU 0", gpu), ("GPU 1", in_part), ("GPU 2", on_cpu)])
    assert found == ActiveProvider(
        requested="cuda",
        active="CUDAExecutionProvider, CPUExecutionProvider",
        device="0: H100, 1: T4, CPU",
        nodes={"CUDAExecutionProvider": 60, "CPUExecutionProvider": 62},
        cpu_nodes=("Shape one", "Trilu two"),
        options={"device_id": "0, 1", "use_tf32": "1"},
        fallback="GPU 1: Trilu stays; GPU 2: it is busy",
    )


def test_each_gpu_has_its_share_of_the_workers() -> None:
    def plan(devices: list[int] | None) -> Plan:
        spec = JobSpec.model_validate(
            {
                "input": "images",
                "output": "out",
                "model": {"name": "resnet18"},
                "provider": {"name": "cuda", "devices": devices},
            }
        )
        return Plan(Task(spec, cast(Any, None), cast(Any, None), 100), 64, 9, "processes")

    shares = shares_of(plan([0, 2]), [ImageRef(7, b"sample.jpg")], "digest")
    assert [share.plan.task.job.provider.devices for share in shares] == [(0,), (2,)]
    assert [share.plan.num_workers for share in shares] == [4, 4]
    assert {(share.sample, share.used) for share in shares} == {
        ((ImageRef(7, b"sample.jpg"),), "digest")
    }
    assert shares_of(plan([1]), [], None) == shares_of(plan(None), [], None) == []
