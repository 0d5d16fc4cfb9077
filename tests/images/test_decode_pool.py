"""Decoding in processes: the same pixels and outcomes as in threads, and an end in every case."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.images import decode_pool as pool_module
from batchclf.images import decode_process as process_module
from batchclf.images.decode import Decoder
from batchclf.images.decode_pool import DecodeProcesses, Workers, try_alone
from batchclf.images.decode_process import Beat
from batchclf.images.jpeg import decoder_name
from batchclf.images.load import Loader
from batchclf.images.prefetch import Load, Memory, Prefetcher, threads
from batchclf.images.resampler import resampler_name
from batchclf.images.source import open_source
from batchclf.images.store import open_store
from batchclf.results.records import Failure, ImageRef, Loaded, Pixels, Preprocess
from batchclf.system import children
from batchclf.system.children import start_python
from tests.conftest import Batchclf, command, read_records
from tests.faults.poison import CODES, poisoned_environment, write_poison
from tests.tiny import SlowLoader, assert_same_records, link_digits, run_here, write_tiny_job

EDGE = 24
PREPROCESS = Preprocess(EDGE, (EDGE, EDGE), "bilinear", None, None)
BATCH_SHAPE = (5, EDGE, EDGE, 3)
MEMORY = Memory(3, BATCH_SHAPE)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """33 images of any kind, some of them no image or not there."""
    rng = np.random.default_rng(0)
    for number in range(33):
        path = tmp_path / f"{number:02d}.jpg"
        if number % 11 == 5:
            path.write_bytes(b"no image")
        elif number % 11 != 7:
            shape = (EDGE + number, 2 * EDGE, 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return tmp_path


def refs_of(count: int = 33) -> list[ImageRef]:
    return [ImageRef(number, b"%02d.jpg" % number) for number in range(count)]


def loader_of(folder: Path, max_pixels: int = 10**6) -> Loader:
    return Loader(open_store(open_source(folder)), Decoder(PREPROCESS, max_pixels=max_pixels))


def collect(batches: Prefetcher) -> tuple[list[Loaded], Pixels]:
    """What became of all images, and their pixels, NHWC."""
    loaded: list[Loaded] = []
    pixels: list[Pixels] = []
    while (batch := batches.next_batch()) is not None:
        loaded += batch.loaded
        pixels.append(batch.pixels_NHWC[: len(batch.refs)].copy())
        batches.release(batch)
    return loaded, np.concatenate(pixels)


def processes_of(
    loader: Load, count: int = 3, max_seconds: float = 60.0, beat: Beat = lambda: None
) -> "closing[DecodeProcesses]":
    return closing(DecodeProcesses(loader, Workers(count, max_seconds, beat), MEMORY))


def prefetcher(processes: DecodeProcesses, refs: Sequence[ImageRef]) -> Prefetcher:
    return Prefetcher(iter(refs), processes.decoding)


def decode_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    alive = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in alive if "images.decode_process " in _command(one)]


def _command(process: psutil.Process) -> str:
    try:
        return str(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie by now, too
        return ""


def expected_of(loader: Load, refs: Sequence[ImageRef]) -> tuple[list[Loaded], Pixels]:
    """What threads make of the images."""
    with Prefetcher(iter(refs), threads(loader, 2, MEMORY)) as batches:
        return collect(batches)


def assert_as_in_threads(found: tuple[list[Loaded], Pixels], folder: Path) -> None:
    loaded, pixels_NHWC = expected_of(loader_of(folder), refs_of())
    assert found[0] == loaded
    np.testing.assert_array_equal(found[1], pixels_NHWC)


def test_pixels_and_outcomes_are_those_of_threads(images: Path) -> None:
    loader = loader_of(images, max_pixels=(EDGE + 30) * 2 * EDGE)
    expected, expected_NHWC = expected_of(loader, refs_of())
    with processes_of(loader) as processes, prefetcher(processes, refs_of()) as batches:
        found, found_NHWC = collect(batches)
        assert processes.decoding.cpu_seconds() > 0
    assert found == expected
    codes = [one.failure and one.failure.code for one in found]
    assert {"not_an_image", "vanished", "too_large", None} <= {*codes}
    np.testing.assert_array_equal(found_NHWC, expected_NHWC)


def test_the_processes_end_with_the_block_and_with_their_parent(images: Path) -> None:
    with processes_of(loader_of(images)) as processes:
        children = psutil.Process().children()
        assert len(children) >= 3
        with prefetcher(processes, refs_of(4)) as batches:
            collect(batches)
    assert not [child for child in children if child.is_running()]
    script = (
        "import sys; from pathlib import Path; from tests.images.test_decode_pool import *\n"
        "processes = processes_of(loader_of(Path(sys.argv[1])))\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(images)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        orphans = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(orphans) == 3
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(orphans, timeout=5)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_images_that_take_for_ever_are_abandoned_at_the_end_of_the_block(images: Path) -> None:
    ended = threading.Event()

    def leave_early() -> None:
        with processes_of(SlowLoader(loader_of(images), 60)) as processes:
            with prefetcher(processes, refs_of()):
                pass
            ended.set()

    threading.Thread(target=leave_early, daemon=True).start()
    assert ended.wait(30), "waits for images that nobody wants"


def test_processes_that_do_not_get_ready_leave_none_behind(images: Path) -> None:
    before = psutil.Process().children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["/no/such/folder"])
        with pytest.raises(
            EnvironmentFailed, match="before it began, 3 times: exit code 1; choose"
        ):
            processes_of(loader_of(images))
    assert psutil.Process().children() == before


@pytest.fixture
def two_die_young(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first two processes are killed as soon as they are started; their ids."""
    dead: list[int] = []

    def start(program: str, **keys: Any) -> "subprocess.Popen[bytes]":
        process = start_python(program, **keys)
        if len(dead) < 2:
            dead.append(process.pid)
            process.kill()
        return process

    monkeypatch.setattr(children, "start_python", start)
    return dead


def test_processes_that_are_killed_before_they_are_ready_are_replaced(
    images: Path, two_die_young: list[int]
) -> None:
    with (
        processes_of(loader_of(images), 1) as processes,
        prefetcher(processes, refs_of()) as batches,
    ):
        assert_as_in_threads(collect(batches), images)
    assert len(two_die_young) == 2


def test_no_process_is_started_once_all_are_abandoned(images: Path) -> None:
    with processes_of(loader_of(images), 1) as processes:
        (worker,) = processes.decoding.workers
        rows_NHWC = processes.decoding.batches[0][:1]
        processes.decoding.abandon()
        with pytest.raises(pool_module._Abandoned) as raised:
            worker(refs_of(1), rows_NHWC)
        assert not isinstance(raised.value, BatchclfError), "no user is to see it"
        assert not decode_processes()


def test_a_bug_in_a_process_is_told_with_its_traceback(images: Path) -> None:
    broken = SlowLoader(loader_of(images), -1)  # time.sleep refuses that
    with (
        processes_of(broken) as processes,
        prefetcher(processes, refs_of()) as batches,
        pytest.raises(RuntimeError, match="in a decoding process:\nTraceback"),
    ):
        collect(batches)


def test_a_job_writes_the_same_records_with_processes_and_counts_their_time(
    tmp_path: Path,
) -> None:
    run_here(write_tiny_job(tmp_path, output=str(tmp_path / "threads")))
    loader = {"backend": "processes", "workers": 3}
    job = write_tiny_job(tmp_path, output=str(tmp_path / "processes"), loader=loader)
    run_here(job)
    assert_same_records(read_records(tmp_path / "processes"), read_records(tmp_path / "threads"))
    run = json.loads((tmp_path / "processes" / "run.json").read_bytes())
    assert (run["backend"], run["num_workers"]) == ("processes", 3)
    assert run["jpeg_decoder"] == decoder_name()
    assert run["resampler"] == resampler_name()


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_stopped_job_drains_its_processes(tmp_path: Path, whole_group: bool) -> None:
    link_digits(tmp_path / "images", 20_000)
    job = write_tiny_job(
        tmp_path,
        input=str(tmp_path / "images"),
        loader={"backend": "processes", "workers": 2},
    )
    process = subprocess.Popen(
        command("run", job), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    predictions = tmp_path / "out" / "predictions.jsonl"
    while not (predictions.exists() and predictions.stat().st_size):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (130 if whole_group else 143), stderr
    assert 0 < len(read_records(tmp_path / "out")) < 20_000
    assert not [child for child in children if child.is_running()]
    assert json.loads((tmp_path / "out" / "run.json").read_bytes())["status"] == "interrupted"


# ---- images that end or hold up their process ----------------------------------------------------


WORDS = {
    "segfault": "killed by SIGSEGV",
    "abort": "killed by SIGABRT",
    "exit": "exit code 3",
    "loop": "not decoded after 2 s, which is what loader.max_seconds allows",
    "hang": "not decoded after 2 s",
    "native_loop": "not decoded after 2 s",
    "bomb": "out of memory",
    "kill": "killed by SIGKILL",
}
"""What the message of each kind of poison says."""
SLOW = [kind for kind, code in CODES.items() if code == "timeout"]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison works in the processes that the test starts, which may use 400 MB each."""
    for name, value in poisoned_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pool_module, "available_memory", lambda: 500 * 10**6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("max_seconds", [60, 2])
def test_poison_is_recorded_and_costs_no_other_image(images: Path, max_seconds: float) -> None:
    expected, expected_NHWC = expected_of(loader_of(images), refs_of())
    all_kinds = dict(zip(range(1, 33, 4), CODES, strict=True))
    kinds = {
        number: kind for number, kind in all_kinds.items() if (max_seconds == 2) == (kind in SLOW)
    }
    for number, kind in kinds.items():
        write_poison(images / f"{number:02d}.jpg", kind)
    with (
        processes_of(loader_of(images), max_seconds=max_seconds) as processes,
        prefetcher(processes, refs_of()) as batches,
    ):
        found, found_NHWC = collect(batches)
    for number, kind in kinds.items():
        assert_guilty(found[number].failure, kind)
        assert not found_NHWC[number].any()
        found[number], found_NHWC[number] = expected[number], expected_NHWC[number]
    assert found == expected
    np.testing.assert_array_equal(found_NHWC, expected_NHWC)


def assert_guilty(failure: Failure | None, kind: str) -> None:
    assert failure is not None
    assert failure.code == CODES[kind]
    assert WORDS[kind] in failure.message


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs of the processes that were started."""
    programs: list[str] = []

    def start(program: str, **keys: Any) -> "subprocess.Popen[bytes]":
        programs.append(program)
        return start_python(program, **keys)

    monkeypatch.setattr(children, "start_python", start)
    return programs


@pytest.mark.usefixtures("poisoned")
def test_a_guilty_image_costs_two_processes(images: Path, started: list[str]) -> None:
    write_poison(images / "03.jpg", "segfault")
    with (
        processes_of(loader_of(images), 1) as processes,
        prefetcher(processes, refs_of(7)) as batches,
    ):
        assert processes.decoding.num_rows == 7
        found, _ = collect(batches)
    assert [one.failure is not None for one in found] == [number in (3, 5) for number in range(7)]
    assert len(started) == 1 + 2


@pytest.mark.usefixtures("poisoned")
def test_an_image_that_takes_long_but_not_too_long_is_no_standstill(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "BEAT_S", 0.05)
    write_poison(images / "03.jpg", "hang")
    beats: list[None] = []
    with (
        processes_of(loader_of(images), 1, 1.0, beat=lambda: beats.append(None)) as processes,
        prefetcher(processes, refs_of(7)) as batches,
    ):
        collect(batches)
    assert len(beats) > 4


def test_the_time_limit_is_for_each_image_and_not_for_a_message(
    images: Path, started: list[str]
) -> None:
    slow = SlowLoader(loader_of(images), 0.4)
    with (
        processes_of(slow, 1, max_seconds=2) as processes,
        prefetcher(processes, refs_of(7)) as batches,
    ):
        assert processes.decoding.num_rows == 7
        collect(batches)
    assert len(started) == 1


def test_processes_that_somebody_kills_cost_no_image(images: Path) -> None:
    with processes_of(SlowLoader(loader_of(images), 0.05)) as processes:
        idle, *others = decode_processes()
        idle.kill()
        with prefetcher(processes, refs_of()) as batches:
            for child in others:
                time.sleep(0.1)
                child.kill()
            found = collect(batches)
        assert not {idle, *others} & {*decode_processes()}
    assert_as_in_threads(found, images)


def test_a_process_that_somebody_stops_costs_no_image(images: Path) -> None:
    with processes_of(loader_of(images), max_seconds=1) as processes:
        stopped = decode_processes()[0]
        stopped.suspend()
        with prefetcher(processes, refs_of()) as batches:
            found = collect(batches)
        assert stopped not in decode_processes()
    assert_as_in_threads(found, images)


def test_the_time_for_which_all_processes_are_stopped_is_no_images_fault(images: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.images.test_decode_pool import *\n"
        "load = SlowLoader(loader_of(Path(sys.argv[1])), 1)\n"
        "with processes_of(load, 1, max_seconds=4) as processes:\n"
        "    with prefetcher(processes, refs_of(1)) as batches:\n"
        "        before = decode_processes()\n"
        "        print(before[0].pid, flush=True)\n"
        "        print(collect(batches)[0] == [Loaded()], decode_processes() == before)"
    )
    arguments = [sys.executable, "-c", script, str(images)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        os.killpg(parent.pid, signal.SIGSTOP)
        time.sleep(4.5)
        parent.send_signal(signal.SIGCONT)
        time.sleep(0.2)  # it looks before the child, which would be ready at once
        os.kill(child, signal.SIGCONT)
        assert parent.stdout.read() == "True True\n"


def test_a_later_process_outlives_the_thread_that_needed_it(images: Path) -> None:
    with processes_of(loader_of(images), 1) as processes:
        (worker,) = processes.decoding.workers
        rows_NHWC = processes.decoding.batches[0][:1]

        def decode() -> int:
            with ThreadPoolExecutor(1) as thread:
                assert thread.submit(worker, refs_of(1), rows_NHWC).result() == [Loaded()]
            (child,) = decode_processes()
            return child.pid

        decode_processes()[0].kill()
        later = decode()
        time.sleep(0.1)
        assert decode() == later


@pytest.mark.usefixtures("poisoned")
def test_processes_may_be_abandoned_while_others_take_their_places(images: Path) -> None:
    for number in range(33):
        write_poison(images / f"{number:02d}.jpg", "kill")
    for delay_s in (0.0, 0.05, 0.2, 0.4):
        with (
            processes_of(loader_of(images)) as processes,
            prefetcher(processes, refs_of()) as batches,
        ):
            time.sleep(delay_s)
        assert not decode_processes()
        assert batches.next_batch() is None, "what ends the workers is nobody's business"


@pytest.mark.usefixtures("poisoned")
def test_a_process_in_a_native_loop_ends_with_its_parent(images: Path) -> None:
    write_poison(images / "00.jpg", "native_loop")
    script = (
        "import sys; from pathlib import Path; from tests.images.test_decode_pool import *\n"
        "processes = processes_of(loader_of(Path(sys.argv[1])), 1).thing\n"
        "with prefetcher(processes, refs_of(1)) as batches:\n"
        "    print(decode_processes()[0].pid, flush=True)\n"
        "    collect(batches)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(images)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        parent.kill()
    _, alive = psutil.wait_procs([orphan], timeout=5)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_processes_are_the_first_to_go_and_may_not_take_all_memory(images: Path) -> None:
    with processes_of(loader_of(images), 1):
        (child,) = decode_processes()
        limit, _ = child.rlimit(psutil.RLIMIT_DATA)
        assert 0 < limit < psutil.virtual_memory().total
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "1000\n"


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup (v1) of 400 MB, in which the kernel kills rather than swaps."""
    folder = Path(f"/sys/fs/cgroup/memory/batchclf-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory cgroup (v1) of its own: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(400 * 10**6))
    yield folder
    folder.rmdir()


@pytest.mark.usefixtures("poisoned")
def test_the_kernel_out_of_memory_takes_a_process_and_not_the_job(
    images: Path, memory_cgroup: Path
) -> None:
    write_poison(images / "01.jpg", "bomb")
    script = (
        "import sys; from pathlib import Path; from tests.images.test_decode_pool import *\n"
        "Path(sys.argv[2]).write_text(str(os.getpid()))\n"
        "pool_module.available_memory = lambda: 2**40\n"
        "loader = loader_of(Path(sys.argv[1]))\n"
        "with processes_of(loader, 1) as processes:\n"
        "    with prefetcher(processes, refs_of(5)) as batches:\n"
        "        print([one.failure and one.failure.code for one in collect(batches)[0]])"
    )
    arguments = [sys.executable, "-c", script, str(images), str(memory_cgroup / "cgroup.procs")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[None, 'oom', None, None, None]\n"
    kills = (memory_cgroup / "memory.oom_control").read_text()
    assert "oom_kill 2" in kills, "the bomb ends by itself otherwise"


@pytest.mark.usefixtures("poisoned")
def test_a_job_with_poison_ends_well(tmp_path: Path, batchclf: Batchclf) -> None:
    images = link_digits(tmp_path / "images", 40)
    kinds = dict(zip((5, 17, 18, 39), ("segfault", "exit", "kill", "abort"), strict=True))
    paths = sorted(images.iterdir())
    for number, kind in kinds.items():
        paths[number].unlink()
        write_poison(paths[number], kind)
    job = write_tiny_job(
        tmp_path, input=str(images), loader={"backend": "processes", "workers": 2}, batch_size=16
    )
    done = batchclf("run", job)
    assert done.exit_code == 0, done.stderr
    codes = [record.get("error", {}).get("code") for record in read_records(tmp_path / "out")]
    assert len(codes) == 40
    expected = {number: CODES[kind] for number, kind in kinds.items()}
    assert {number: code for number, code in enumerate(codes) if code} == expected


# ---- a suspect alone -----------------------------------------------------------------------------


def alone(load: Load, name: str, max_seconds: float = 60) -> Failure | None:
    blame = try_alone(load, ImageRef(0, os.fsencode(name)), BATCH_SHAPE[1:], max_seconds)
    assert blame is None or blame.place is None, "it lies in no archive"
    return blame and blame.failure


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", CODES)
def test_a_suspect_that_ends_or_holds_up_a_process_of_its_own_is_guilty(
    tmp_path: Path, kind: str
) -> None:
    write_poison(tmp_path / "suspect.jpg", kind)
    max_seconds = 2 if kind in SLOW else 60
    assert_guilty(alone(loader_of(tmp_path), "suspect.jpg", max_seconds), kind)
    assert not decode_processes()


def test_a_suspect_is_not_blamed_for_processes_that_never_began(
    images: Path, two_die_young: list[int]
) -> None:
    assert alone(loader_of(images), "00.jpg") is None
    assert len(two_die_young) == 2
    assert not decode_processes()


def test_a_suspect_that_is_merely_bad_or_meets_a_bug_is_not_guilty(images: Path) -> None:
    load = loader_of(images)
    assert alone(load, "00.jpg") is None
    assert alone(load, "05.jpg") is None, "no image"
    assert alone(load, "07.jpg") is None, "vanished"
    assert alone(SlowLoader(load, -1), "00.jpg") is None, "a bug"
    assert not decode_processes()


def test_a_process_loads_what_it_is_handed(images: Path) -> None:
    @contextmanager
    def first(worker: int, refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
        yield [ImageRef(ref.index, b"00.jpg") for ref in refs]

    workers = Workers(1, 60, hand_over=first)
    with closing(DecodeProcesses(loader_of(images), workers, MEMORY)) as processes:
        (load_rows,) = processes.decoding.workers
        rows_NHWC = processes.decoding.batches[0][:2]
        loaded = load_rows([ImageRef(5, b"05.jpg"), ImageRef(7, b"07.jpg")], rows_NHWC)
        assert [one.failure for one in loaded] == [None, None]
        np.testing.assert_array_equal(rows_NHWC[0], rows_NHWC[1])
