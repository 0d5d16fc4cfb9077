"""A run watched from elsewhere: metrics, a dashboard, logs for programs, a word at its end."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from batchclf.cli import metrics as metrics_module
from batchclf.cli import notify
from batchclf.cli.metrics import Metrics, split_address
from batchclf.cli.notify import Webhook
from batchclf.cli.progress import Progress
from batchclf.cli.watching import Watching
from batchclf.engines.display import RunDisplay
from batchclf.engines.local.engine import run_in_worker
from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.results.stats import Live, RunStats, StageSeconds
from batchclf.run.request import RunResult
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from tests.conftest import BY_HAND, ROOT, Batchclf, command
from tests.engines.common import started
from tests.tiny import SLOW, link_digits, tiny_model, write_tiny_job

FIGURES = RunStats(
    num_images=12,
    num_new=12,
    num_ok=9,
    num_errors=3,
    errors_by_code={"truncated": 2, "not_an_image": 1},
    wall_s=4.0,
    startup_s=0.5,
    images_per_s=3.0,
    stage_s=StageSeconds(0.1, 1.5, 2.5, 0.2),
    batch_ms={"p50": 100.0, "p95": 200.0, "p99": 300.0},
    bottleneck="infer",
    bottleneck_why="",
    cpu_s=5.0,
    peak_rss_mb=100.0,
)
LIVE = Live(figures=FIGURES, batch_size=8, queue_depth=2)
Scraped = dict[tuple[str, str], float]


def scrape(port: int) -> Scraped:
    """The value of each sample, by its name and its label, as Prometheus would read them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def served(gpus: tuple[int, ...] = ()) -> Iterator[Metrics]:
    with Progress() as progress, Metrics(progress, ("127.0.0.1", 0), gpus) as metrics:
        yield metrics


def run_shown(job: Path, display: RunDisplay) -> RunResult:
    def prepare() -> tuple[JobSpec, RunOptions, RunDisplay]:
        return load_job(job), RunOptions(), display

    return run_in_worker(prepare, StopRequest(), time.perf_counter())


# ---- metrics -------------------------------------------------------------------------------------


def test_a_scrape_shows_the_figures_of_one_moment() -> None:
    with served() as metrics:
        assert {name for name, _ in scrape(metrics.port)} == {"batchclf_info"}
        metrics.begin(20, 0, 0)
        metrics.live(LIVE)
        found = scrape(metrics.port)
    assert found["batchclf_job_images", ""] == 20
    assert found["batchclf_images_total", "ok"] == 9
    assert found["batchclf_images_total", "error"] == 3
    assert found["batchclf_errors_total", "truncated"] == 2
    assert found["batchclf_stage_seconds_total", "infer"] == 2.5
    assert found["batchclf_queue_depth_batches", ""] == 2
    assert found["batchclf_batch_size", ""] == 8
    assert found["batchclf_batch_seconds", "0.95"] == 0.2
    assert found["batchclf_peak_memory_bytes", ""] == 100e6


def test_a_scrape_and_the_summary_of_a_run_show_the_same_counts(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "in", 60)
    for number in range(3):
        (images / f"bad{number}.jpg").write_bytes(b"no image")
    job = write_tiny_job(tmp_path, input=str(images), batch_size=8)
    with served() as metrics:
        summary = run_shown(job, metrics).summary
        found = scrape(metrics.port)
    assert found["batchclf_job_images", ""] == summary.num_images == 63
    assert found["batchclf_images_total", "ok"] == summary.num_ok == 60
    assert found["batchclf_images_total", "error"] == summary.num_errors == 3
    assert found["batchclf_errors_total", "not_an_image"] == 3
    assert found["batchclf_stage_seconds_total", "infer"] <= summary.stage_s.infer


@BY_HAND
def test_a_run_can_be_scraped_while_it_goes_on(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "in", 4000)
    slow = tiny_model(tmp_path, **SLOW)
    job = write_tiny_job(tmp_path, input=str(images), model=slow, batch_size=8)
    port = free_port()
    seen: list[float] = []
    with started(job, "--metrics-port", str(port)) as run:

        def has_grown() -> bool:
            try:
                found = scrape(port)
            except OSError:
                return False
            seen.append(found.get(("batchclf_images_total", "ok"), 0.0))
            return len({one for one in seen if one}) >= 3

        run.wait_until(has_grown)
        run.process.terminate()
        assert run.end() == 143
    assert seen == sorted(seen)
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes().count(b"\n") >= seen[-1]


def test_the_memory_of_gpus_is_told_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        NVMLError = RuntimeError

        def nvmlInit(self) -> None: ...

        def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
            return f"index {index}"

        def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
            return f"uuid {name}"

        def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
            assert handle in ("index 3", "uuid GPU-5")
            return type("Memory", (), {"used": 1000 if handle == "index 3" else 2000})

    monkeypatch.setitem(sys.modules, "pynvml", Library())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    with served(gpus=(0, 1)) as metrics:
        found = scrape(metrics.port)
    assert found["batchclf_device_memory_bytes", "0"] == 1000
    assert found["batchclf_device_memory_bytes", "1"] == 2000


def test_where_nothing_tells_the_memory_of_gpus_the_rest_is_told() -> None:
    with served(gpus=(0,)) as metrics:  # no driver is here
        metrics.live(LIVE)
        assert ("batchclf_batch_size", "") in scrape(metrics.port)


@pytest.mark.parametrize(
    ("text", "address"),
    [("9464", ("127.0.0.1", 9464)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:80", ("::1", 80))],
)
def test_without_a_host_this_machine_alone_can_scrape(text: str, address: tuple[str, int]) -> None:
    assert split_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "1.5", "0", "65536", "70000", "-1", "9" * 5000]
)
def test_no_port_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics-port: found "):
        split_address(text)


def test_a_port_that_is_taken_ends_the_run_before_any_work(
    tmp_path: Path, batchclf: Batchclf
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = batchclf("run", write_tiny_job(tmp_path), "--metrics-port", str(port))
    assert said.exit_code == EnvironmentFailed.exit_code
    assert f"--metrics-port: 127.0.0.1:{port} cannot be listened on: " in said.stderr
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_a_host_that_is_no_name_is_told_as_one_that_is_not_there_is() -> None:
    for host in ("a..b", "b" * 70):
        with Progress() as progress, pytest.raises(EnvironmentFailed, match="another host or port"):
            Metrics(progress, (host, 9464), ())


@pytest.mark.parametrize("name", ["prometheus_client", "pynvml"])
def test_without_its_libraries_the_option_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "batchclf.cli.watching.find_spec", lambda asked: None if asked == name else asked
    )
    with pytest.raises(UsageError, match=rf"needs {name}: pip install 'batchclf\[metrics\]'"):
        Watching.asked("text", None, "9464")


def test_the_dashboard_asks_for_metrics_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpus:
        def used(self) -> Iterator[tuple[str, int]]:
            yield "0", 1

    monkeypatch.setattr(metrics_module._Gpus, "opened", lambda numbers: Gpus())
    with served() as metrics:
        metrics.begin(20, 0, 0)
        metrics.live(LIVE)
        names = {name for name, _ in scrape(metrics.port)}
    text = (ROOT / "jobs" / "grafana-dashboard.json").read_text()
    asked = set(re.findall(r"\bbatchclf_\w+", text))
    assert asked <= names
    assert {name for name in names if not name.endswith("_created")} - asked == set()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 12
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert all(one["expr"].count("(") == one["expr"].count(")") for one in panel["targets"])


# ---- logs ----------------------------------------------------------------------------------------


def test_each_line_of_a_json_log_is_an_object(tmp_path: Path, batchclf: Batchclf) -> None:
    job = write_tiny_job(tmp_path)
    said = batchclf("run", job, "--log-format", "json", "--limit", "20", "--json")
    assert said.exit_code == 0, said.stderr
    lines = [json.loads(line) for line in said.stderr.splitlines()]
    assert {line["level"] for line in lines} == {"info"}
    assert any(line["message"].startswith("20 images: 20 ok") for line in lines)
    assert not any(line["message"].startswith("batchclf:") for line in lines)
    assert said.json["num_images"] == 20
    refused = batchclf("run", job, "--log-format", "json", "-b", "0")
    (line,) = [json.loads(line) for line in refused.stderr.splitlines()]
    assert (line["level"], line["exit_code"]) == ("error", 2)
    assert "batch_size" in line["message"]


def test_progress_in_a_json_log_is_told_as_numbers(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchclf.cli import streams

    monkeypatch.setattr(streams, "_log_format", "json")
    with Progress() as progress:
        progress.begin(100, 0, 0)
        progress.live(replace(LIVE, figures=FIGURES))
        progress._next_line = 0
        time.sleep(0.01)
        progress.update(50, 2)
    line = json.loads(capfd.readouterr().err)
    assert (line["event"], line["num_done"], line["num_images"]) == ("progress", 50, 100)
    assert (line["num_errors"], line["bottleneck"]) == (2, "infer")
    assert line["images_per_s"] == line["images_per_s_now"] > 0


# ---- a word at the end ---------------------------------------------------------------------------


@contextmanager
def listening(status: int = 200, delay_s: float = 0.0) -> Iterator[tuple[str, list[Any]]]:
    """A web server's address, and what was posted to it."""
    told: list[Any] = []
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.append((self.path, self.headers["Content-Type"], json.loads(body)))
            is_over.wait(delay_s)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?key=secret", told
    finally:
        is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_summary_or_the_error_of_a_run_is_posted(tmp_path: Path, batchclf: Batchclf) -> None:
    job = write_tiny_job(tmp_path)
    with listening() as (url, told):
        said = batchclf("run", job, "--limit", "20", "--notify", url, "--json")
        assert said.exit_code == 0, said.stderr
        failed = batchclf("run", job, "--top-k", "3", "--notify", url)
        assert failed.exit_code == 2
    (path, kind, first), (_, _, second) = told
    assert (path, kind) == ("/hook?key=secret", "application/json")
    assert {
        key: value for key, value in first.items() if key not in ("text", "output")
    } == said.json
    assert first["output"] == str(tmp_path / "out")
    assert first["text"].endswith("complete: 20 images: 20 ok, 0 errors")
    assert (second["status"], second["exit_code"]) == ("failed", 2)
    assert "top_k" in second["error"]


def test_the_summary_is_printed_before_anybody_is_told(tmp_path: Path) -> None:
    job, printed = write_tiny_job(tmp_path), tmp_path / "printed"
    with printed.open("w") as file, listening(delay_s=60) as (url, told):
        asked = command("run", job, "--limit", "20", "--notify", url, "--json")
        run = subprocess.Popen(asked, stdout=file, stderr=subprocess.DEVNULL)
        while not told and run.poll() is None:
            time.sleep(0.05)
        answer = printed.read_text()  # whoever is told has not answered yet
    assert run.wait(60) == 0
    assert json.loads(answer)["num_images"] == 20


def test_what_goes_wrong_with_that_is_a_line_of_the_log_and_the_address_stays_secret(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with listening(status=500) as (url, _):
        Webhook(url).tell({"status": "complete"}, is_stopped=False)
    refused = capfd.readouterr().err
    assert "--notify: 127.0.0.1 was not told: it answers 500 " in refused
    Webhook(url).tell({"status": "complete"}, is_stopped=False)  # it is gone
    gone = capfd.readouterr().err
    assert "--notify: 127.0.0.1 was not told: " in gone
    assert "secret" not in refused + gone


@BY_HAND
def test_one_who_is_not_there_fails_no_job(tmp_path: Path, batchclf: Batchclf) -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    said = batchclf("run", write_tiny_job(tmp_path), "--limit", "20", "--notify", url)
    assert said.exit_code == 0
    assert "--notify: 127.0.0.1 was not told: " in said.stderr


def test_one_who_never_answers_is_not_waited_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.3)
    with listening(delay_s=600) as (url, told):
        began = time.monotonic()
        Webhook(url).tell({"status": "complete"}, is_stopped=False)
        assert time.monotonic() - began < 300, "it was waited for"
        assert len(told) == 1
    assert "was not told: " in capfd.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        *("example.org/hook", "ftp://example.org", "https://", "http://a:b"),
        *("http://a/secret hook", "http://a/secret\tb", "http://a/secret\x1b"),
        "http://a/secret?\xe9",
    ],
)
def test_no_web_address_is_refused_before_any_work(url: str) -> None:
    with pytest.raises(UsageError, match="--notify: give an address") as refused:
        Webhook(url)
    assert "secret" not in str(refused.value)


def test_an_address_with_a_password_is_refused_as_that_would_not_be_sent() -> None:
    with pytest.raises(UsageError, match="--notify: user:password@ ") as refused:
        Webhook("https://me:secret@example.org/hook")
    assert "secret" not in str(refused.value)


def test_a_line_break_behind_an_address_is_left_out() -> None:
    with listening() as (url, told):
        Webhook(f"{url} \n").tell({"status": "complete"}, is_stopped=False)
    assert [path for path, _, _ in told] == ["/hook?key=secret"]


def test_an_address_that_cannot_be_asked_is_not_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = Webhook("http://127.0.0.1:1/hook")
    monkeypatch.setattr(hook, "_url", hook._url._replace(path="/secret hook"))
    hook.tell({"status": "complete"}, is_stopped=False)
    told = capfd.readouterr().err
    assert "--notify: 127.0.0.1 was not told: its address is not one that can be asked" in told
    assert "secret" not in told
