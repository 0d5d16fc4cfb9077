"""`batchclf tune`: what it writes, what it picks, what ends it, and what `--apply` changes."""

import difflib
import itertools
import json
import math
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from batchclf.cli.init import TEMPLATE
from batchclf.errors import JobFileError
from batchclf.results.records import Entry, ImageRef, Precision
from batchclf.runtime.providers import installed_flavours
from batchclf.sessions.sample import spread
from batchclf.spec import edit
from batchclf.spec.edit import require_editable, write_settings
from batchclf.spec.file import load_job
from batchclf.tuning.advice import disk_note, judge
from batchclf.tuning.records import (
    DecodeLimit,
    InferLimit,
    Prediction,
    Result,
    Session,
    Settings,
    Trial,
)
from batchclf.tuning.search import (
    CLEAR,
    Limits,
    can_win,
    choose,
    finalists,
    in_measuring_order,
    possible_gains,
    ranked,
    summarise,
)
from tests.conftest import BY_HAND, JOBS, ROOT, Batchclf, read_records, write_job
from tests.tiny import link_digits, write_classifier, write_tiny_job

HERE = "openvino" if "onnxruntime-openvino" in installed_flavours() else "cpu"
"""The provider that the environment of these tests is for."""
QUICK = ("--budget", "3", "--batch-sizes", "4,16")
RESULT_KEYS = {
    *("precision", "batch_size", "streams", "threads", "part", "decode", "workers"),
    *("decode_limit_images_per_s", "infer_limit_images_per_s", "limit_images_per_s"),
    *("images_per_s", "efficiency", "cpu_ms_per_image", "batch_ms", "bottleneck", "num_trials"),
}


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "tune.jsonl").read_bytes().splitlines()]


# ---- the command ---------------------------------------------------------------------------------


def test_a_job_is_tuned_and_its_output_stays_free_for_a_run(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, provider=HERE, batch_size=8)
    done = batchclf("tune", job, *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    found = done.json
    assert found["status"] == "complete"
    assert found["current"]["batch_size"] == 8
    assert found["best"]["images_per_s"] > 0
    assert all(set(one) == RESULT_KEYS for one in found["results"])
    assert found["best"] in found["results"]
    rates = [one["images_per_s"] for one in found["results"]]
    assert rates == sorted(rates, reverse=True)
    assert set(found["settings"]) == {
        *("batch_size", "loader.workers", "runtime.streams", "runtime.threads", "runtime.part")
    }
    assert found["bottleneck"] in ("decode", "infer", "write")
    assert found["lift"]
    assert not found["applied"]
    lines = lines_of(tmp_path / "out")
    kinds = [line["type"] for line in lines]
    assert list(dict.fromkeys(kinds)) == ["decode", "infer", "trial", "best"]
    assert [line["is_first_pass"] for line in lines if line["type"] == "decode"].count(True) == 1
    parts = {line["part"] for line in lines if line["type"] == "infer"}
    assert found["current"]["part"] in parts <= {1, 2, 4, 8, 16}
    assert {one["batch_size"] for one in found["results"]} <= {4, 8, 16}
    assert all(line["efficiency"] > 0 for line in lines if line["type"] == "trial")
    png = (tmp_path / "out" / "tune.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1500, 1350)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"tune.jsonl", "tune.png", ".lock"}
    assert batchclf("run", job).exit_code == 0
    assert len(read_records(tmp_path / "out")) == 300


def test_people_get_a_table_a_conclusion_and_a_piece_of_a_job_file(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    done = batchclf("tune", write_tiny_job(tmp_path, provider=HERE, batch_size=8), *QUICK)
    assert done.exit_code == 0, done.stderr
    first, header, *rest = done.stdout.splitlines()
    assert first.startswith("tiny on CPU")
    for column in ("decode limit", "inference limit", "reached", "batch ms (p95)"):
        assert column in header
    assert sum("the job's own" in line for line in rest) >= 1
    assert any(line.startswith("bottleneck: ") for line in rest)
    assert any(line.startswith("what would lift it: ") for line in rest)
    snippet = yaml.safe_load("\n".join(rest[rest.index("") :]))
    assert set(snippet) == {"batch_size", "loader", "runtime"}
    assert "inference alone, fp32, batch 1 in parts of 1" in done.stderr


def test_precisions_and_decode_modes_are_tried_where_they_are_named(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, provider=HERE, batch_size=8, min_agreement=0.0)
    more = ("--precisions", "int8", "--decodes", "fast,exact", "--batch-sizes", "8")
    done = batchclf("tune", job, "--budget", "12", *more, "--json")
    assert done.exit_code == 0, done.stderr
    tried = {(one["precision"], one["decode"]) for one in done.json["results"]}
    assert ("fp32", "exact") in tried
    measured = [line for line in lines_of(tmp_path / "out") if line["type"] != "best"]
    assert {one["precision"] for one in measured if one["type"] == "infer"} == {"fp32", "int8"}
    assert {one["decode"] for one in measured if one["type"] == "decode"} == {"exact", "fast"}
    assert {"precision", "loader.decode"} <= set(done.json["settings"])


def test_a_precision_that_disagrees_is_left_out_and_the_rest_is_tried(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    preprocess = {"resize": 64, "crop": 64}
    model = {"name": "mobilenet_v3_small", "weights": "none", "preprocess": preprocess}
    job = write_job(tmp_path, provider=HERE, model=model, batch_size=8, min_agreement=1)
    assert batchclf("export", job, tmp_path / "exported").exit_code == 0  # it is cached, then
    seen = ["left out: precision: at int8", "of its limit"]
    tune_until(job, "--precisions", "int8", "--batch-sizes", "8", seen=seen)
    sessions = [line for line in lines_of(tmp_path / "out") if line["type"] == "infer"]
    assert {line["precision"] for line in sessions} == {"fp32"}


def test_batches_larger_than_the_job_are_left_out(batchclf: Batchclf, tmp_path: Path) -> None:
    job = write_tiny_job(tmp_path, provider=HERE, input=str(link_digits(tmp_path / "in", 6)))
    done = batchclf("tune", job, "--budget", "3", "--batch-sizes", "2,7,100", "--json")
    assert done.exit_code == 0, done.stderr
    assert {one["batch_size"] for one in done.json["results"]} <= {2, 6}
    assert done.json["current"]["batch_size"] == 6
    (note,) = (note for note in done.json["notes"] if "only 6 images" in note)
    assert "7, 100" in note
    # The job's own value stays, where it comes to the same.
    assert done.json["settings"]["batch_size"] in (2, 16)


def test_a_model_of_one_batch_size_is_tuned_at_that(batchclf: Batchclf, tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "fixed.onnx")
    fixed = onnx.load(path)
    for end in (fixed.graph.input[0], fixed.graph.output[0]):
        end.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, path)
    preprocess = {"resize": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    job = write_tiny_job(
        tmp_path, provider=HERE, model={"onnx": str(path), "preprocess": preprocess}
    )
    done = batchclf("tune", job, "--budget", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert {one["batch_size"] for one in done.json["results"]} == {4}
    assert "batch size: the model takes only batches of 4" in done.json["notes"]
    assert done.json["settings"]["batch_size"] == 16


def test_a_budget_too_short_for_a_trial_says_how_much_is_needed(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, preprocess={"resize": 1500, "crop": 1500})
    done = batchclf("tune", job, "--budget", "1", "--json")
    assert done.exit_code == 2
    assert re.search(r"--budget 1 .*; give (at least )?--budget \d+$", done.json["error"])
    assert lines_of(tmp_path / "out")[0]["type"] == "decode"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-sizes", "1,x"), "--batch-sizes: found '1,x'"),
        (("--batch-sizes", "0"), "--batch-sizes: found '0'"),
        (("--precisions", "fp8"), "--precisions: found 'fp8'; allowed: fp32, fp16"),
        (("--decodes", "quick"), "--decodes: found 'quick'; allowed: exact, fast"),
        (("--provider", "cpu", "--precisions", "fp16"), "fp16 runs on provider"),
    ],
)
def test_an_option_that_makes_no_sense_ends_with_2(
    batchclf: Batchclf, tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    if "fp16" in arguments and HERE != "cpu":
        pytest.skip("provider cpu is not what this environment is for")
    done = batchclf("tune", write_tiny_job(tmp_path), *arguments, "--json")
    assert done.exit_code == 2
    assert message in done.json["error"]


def test_images_that_cannot_be_decoded_end_with_2(batchclf: Batchclf, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    job = write_tiny_job(tmp_path, provider=HERE, input=str(tmp_path / "in"))
    done = batchclf("tune", job, *QUICK, "--json")
    assert done.exit_code == 2
    assert "not one of the 1 images sampled can be decoded" in done.json["error"]


@pytest.mark.parametrize(
    ("package", "arguments"), [("matplotlib", ()), ("ruamel", ("--apply",))], ids=str
)
def test_without_a_package_it_needs_it_says_so_before_it_measures(
    package: str, arguments: Sequence[str], tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from batchclf.cli import main; main(sys.argv[1:])"
    )
    job = write_tiny_job(tmp_path, provider=HERE)
    done = subprocess.run(
        [sys.executable, "-c", code, "tune", str(job), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert package in done.stderr
    assert "pip install 'batchclf[tune]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_job_file_that_cannot_be_edited_is_told_before_it_measures(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write_tiny_job(tmp_path, provider=HERE)
    job.write_text(job.read_text().replace("{", "{ # mine\n", 1))
    done = batchclf("tune", job, "--apply", "--json")
    assert done.exit_code == 2
    assert "losing `# mine`" in done.json["error"]
    assert not (tmp_path / "out").exists()


def tune_until(
    job: Path,
    *arguments: str,
    seen: Sequence[str],
    number: signal.Signals = signal.SIGTERM,
    program: Sequence[str] = ("-m", "batchclf"),
) -> None:
    """Tune, and send a signal once each of `seen` has stood in a line of stderr, in that order."""
    with subprocess.Popen(
        [sys.executable, *program, "tune", str(job), "--budget", "30", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stderr is not None
        left, log = list(seen), ""
        for line in process.stderr:
            log += line
            if left and left[0] in line:
                left.pop(0)
                if not left:
                    process.send_signal(number)
    assert not left, log
    assert process.returncode == 128 + number, log
    assert "nothing was chosen; run the same command to start over" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["inference alone", "of its limit"])
def test_a_signal_ends_it_and_leaves_what_was_measured(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    job = write_tiny_job(tmp_path, provider=HERE, batch_size=8)
    tune_until(job, seen=[moment], number=number)
    kinds = {line["type"] for line in lines_of(tmp_path / "out")}
    assert ("trial" in kinds) == (moment == "of its limit")
    assert {"decode", "infer"} <= kinds
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"tune.jsonl", ".lock"}


# ---- memory --------------------------------------------------------------------------------------

LITTLE_MEMORY = """
import ctypes, re, resource, sys
import batchclf.tuning.tune
from batchclf.cli import main
# One arena for all threads (M_ARENA_MAX): how many they reserve otherwise depends on the load.
ctypes.CDLL(None).mallopt(-8, 1)
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 350_000_000,) * 2)
main(sys.argv[1:])
"""


@BY_HAND
@pytest.mark.skipif(HERE != "cpu", reason="OpenVINO reserves memory that it does not use")
def test_a_batch_that_does_not_fit_into_memory_is_too_large(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    images = link_digits(tmp_path / "in", 5000)
    model = {
        "onnx": str(write_classifier(tmp_path / "large.onnx", edge=224)),
        "preprocess": {"resize": 224, "mean": [0.0] * 3, "std": [1.0] * 3},
    }
    job = write_tiny_job(tmp_path, input=str(images), model=model, batch_size=8)
    assert batchclf("export", job, tmp_path / "exported").exit_code == 0  # it is cached, then
    tune_until(
        job,
        *("--batch-sizes", "2500,5000", "--budget", "150"),  # the later one counts
        seen=["and larger batches: too large for the memory", "of its limit", "of its limit"],
        program=("-c", LITTLE_MEMORY),
    )
    lines = lines_of(tmp_path / "out")
    assert {line["batch_size"] for line in lines if line.get("too_large")} == {2500}
    fitting = [line for line in lines if line["type"] == "trial" and not line["too_large"]]
    assert 8 in {line["batch_size"] for line in fitting} <= {8, 16, 32}


# ---- what is tried and chosen --------------------------------------------------------------------


def session(
    batch_size: int = 8, *, precision: Precision = "fp32", streams: int = 2, threads: int = 1
) -> Session:
    return Session(precision, batch_size, streams, threads, part=batch_size)


def settings(
    batch_size: int = 8, *, precision: Precision = "fp32", streams: int = 2, threads: int = 1
) -> Settings:
    one = session(batch_size, precision=precision, streams=streams, threads=threads)
    return Settings(one, "exact", workers=2)


def decoding(rate: float, cpu_ms: float, *, workers: int = 2, first: bool = False) -> DecodeLimit:
    return DecodeLimit("exact", workers, first, 100, 0, rate, cpu_ms)


def result(one: Settings, rate: float, *, trials: int = 3, limit: float = 1000.0) -> Result:
    predicted = Prediction(one, 2000.0, limit, limit)
    times = {"p50": 1.0, "p95": 2.0}
    return Result(predicted, trials, rate, rate / limit, 1.0, times, "infer")


def limits(*, on_cpu: bool, decode: float, infer: float) -> Limits:
    """Two cores; decoding takes 1 ms of CPU time, inference 4 ms."""
    return Limits(
        2,
        on_cpu,
        {("exact", 2): decoding(decode, 1.0)},
        {session(): InferLimit(session(), False, infer, 4.0, 0.1)},
    )


def test_on_the_cpu_both_share_the_cores_and_elsewhere_the_slower_decides() -> None:
    shared = limits(on_cpu=True, decode=2000, infer=500).predict(settings())
    apart = limits(on_cpu=False, decode=2000, infer=500).predict(settings())
    assert shared is not None
    assert apart is not None
    assert shared.limit_images_per_s == pytest.approx(2 / 0.005)
    assert apart.limit_images_per_s == 500


def test_a_session_that_does_not_fit_is_no_candidate() -> None:
    found = Limits(
        2,
        True,
        {("exact", 2): decoding(100, 1.0)},
        {session(): InferLimit(session(), too_large=True)},
    )
    assert ranked([settings(), settings(16)], found, settings()) == []


def test_a_combination_whose_limit_is_below_the_best_is_not_tried() -> None:
    results = [result(settings(), 900, limit=1000)]
    assert can_win(Prediction(settings(16), 1, 1, 1000.0), results)
    assert not can_win(Prediction(settings(16), 1, 1, 900.0), results)
    assert can_win(Prediction(settings(16), 1, 1, 1.0), [])


def test_within_the_noise_the_simplest_settings_win() -> None:
    own = settings(64)
    fast, small, slow = settings(32, streams=1, threads=2), settings(16), settings(8)
    results = [result(fast, 1000), result(small, 990), result(own, 985), result(slow, 900)]
    assert choose(results, own).settings == own
    assert choose(results, settings(4)).settings == small
    assert choose([result(fast, 1000), result(own, 900)], own).settings == fast


def test_a_single_lucky_trial_does_not_win() -> None:
    results = [result(settings(32), 1300, trials=1), result(settings(8), 1000, trials=5)]
    assert choose(results, settings(64)).settings == settings(8)


def test_other_answers_are_chosen_only_for_more_speed() -> None:
    own, other = settings(64), settings(8, precision="int8")
    assert choose([result(other, 1010), result(own, 1000)], own).settings == own
    assert choose([result(other, 1500), result(own, 1000)], own).settings == other
    for other in (settings(8, precision="int8"), replace(settings(8), decode="fast")):
        same_answers = settings(32)
        results = [result(other, 1010), result(same_answers, 1000)]
        assert choose(results, own).settings == same_answers


def test_trials_of_one_combination_become_one_result() -> None:
    predicted = Prediction(settings(), 1.0, 1.0, 100.0)
    times = {"p50": 1.0, "p95": 2.0}
    trials = [
        Trial(predicted, False, 10, 1.0, rate, rate / 100, 1.0, times, "infer")
        for rate in (50.0, 90.0, 80.0, 20.0)
    ]
    (found,) = summarise([*trials, Trial(predicted, too_large=True)])
    assert (found.num_trials, found.images_per_s, found.efficiency) == (4, 80, 0.8)


def trials_of(one: Settings, *rates: float) -> list[Trial]:
    predicted = Prediction(one, 1.0, 1.0, 1000.0)
    return [Trial(predicted, too_large=False, images_per_s=rate) for rate in rates]


def test_a_choice_is_clear_when_nothing_else_is_likely_to_be_much_faster() -> None:
    own, other, once = settings(1), settings(2), settings(4)
    steady = [*trials_of(own, 100, 101, 99, 100), *trials_of(other, 98, 99, 100, 99)]
    assert possible_gains(steady, own)[other] < CLEAR
    noisy = [*trials_of(own, 100, 130, 70, 100), *trials_of(other, 98, 70, 130, 99)]
    assert possible_gains(noisy, own)[other] > 0.2
    assert set(possible_gains([*steady, *trials_of(once, 500)], own)) == {other}
    assert possible_gains([*trials_of(own, 100), *trials_of(other, 90)], own)[other] == math.inf


def test_results_stand_fastest_first() -> None:
    times = {"p50": 1.0, "p95": 2.0}
    trials = [
        Trial(Prediction(settings(size), 1.0, 1.0, 100.0), False, 10, 1.0, rate, 1.0, 1.0, times)
        for size, rate in ((4, 50.0), (8, 90.0), (16, 20.0))
    ]
    assert [one.images_per_s for one in summarise(trials)] == [90, 50, 20]


def test_the_jobs_own_settings_are_measured_to_the_end() -> None:
    results = [result(settings(size), 1000 - size) for size in (1, 2, 4, 8, 16)]
    again = [one.settings for one in finalists(results, settings(16), 3)]
    assert again == [settings(16), settings(1), settings(2)]


def test_the_smallest_batch_tells_how_long_others_take_and_the_jobs_own_is_next() -> None:
    assert in_measuring_order([128, 1, 32, 8], 64) == [1, 64, 8, 32, 128]
    assert in_measuring_order([128, 8], 8) == [8, 128]


@given(st.integers(0, 3000), st.integers(1, 40))
def test_a_sample_is_spread_evenly_over_a_listing_of_unknown_length(count: int, size: int) -> None:
    kept, seen, is_whole = spread((Entry(b"%d" % n) for n in range(count)), size, lambda: False)
    assert (seen, is_whole) == (count, True)
    assert min(count, size) <= len(kept) < 2 * size
    assert kept == [ImageRef(one.index, b"%d" % one.index) for one in kept]
    places = [one.index for one in kept]
    assert any(places == list(range(0, count, 2**power)) for power in range(13))


def test_the_bottleneck_is_named_with_its_figures() -> None:
    own = settings()
    predicted = limits(on_cpu=True, decode=2000, infer=500).predict(own)
    assert predicted is not None
    times = {"p50": 1.0, "p95": 2.0}
    best = Result(predicted, 3, 380.0, 0.95, 5.0, times, "infer")
    shared = judge(best, limits(on_cpu=True, decode=2000, infer=500))
    assert shared.bottleneck == "infer"
    assert "1.00 ms of CPU time to decode (20%) and 4.00 ms to infer (80%)" in shared.why
    assert any("not measured: --precisions" in one for one in shared.lift)
    predicted = Prediction(own, 5900.0, 14200.0, 5900.0)
    best = Result(predicted, 3, 5800.0, 0.98, 5.0, times, "decode")
    apart = judge(best, limits(on_cpu=False, decode=5900, infer=14200))
    assert apart.bottleneck == "decode"
    assert "workers 2 gives 5,900.0 images/s, inference 14,200.0" in apart.why
    assert any("not measured: --decodes" in one for one in apart.lift)


def test_what_would_lift_the_bottleneck_is_told_with_its_measured_gain() -> None:
    own, other = session(), session(precision="int8")
    both = Limits(
        2,
        False,
        {
            ("exact", 2): decoding(900, 1.0),
            ("fast", 2): DecodeLimit("fast", 2, False, 9, 0, 1800, 1),
        },
        {one: InferLimit(one, False, rate, 4.0) for one, rate in ((own, 500.0), (other, 1250.0))},
    )
    predicted = both.predict(settings())
    assert predicted is not None
    best = Result(predicted, 3, 480.0, 0.96, 5.0, {"p50": 1.0, "p95": 2.0}, "infer")
    assert "precision int8 (x 2.50 measured alone)" in judge(best, both).lift
    slow = replace(best, predicted=replace(predicted, decode_limit_images_per_s=400.0))
    assert "decode: fast (x 2.00 measured alone)" in judge(slow, both).lift


def test_a_disk_slower_than_decoding_is_noted() -> None:
    later = decoding(1000, 2.0)
    waiting, busy = decoding(150, 2.0, first=True), decoding(150, 13.3, first=True)
    assert "the disk" in (disk_note(waiting, later, 2) or "")
    assert disk_note(busy, later, 2) is None
    assert disk_note(decoding(950, 2.0, first=True), later, 2) is None


# ---- writing settings back -----------------------------------------------------------------------

ODD_FILES = {
    "inline": "# top\ninput:   'a b'      # spaces\noutput: \"x\"\n"
    "loader: {workers: auto,   prefetch: 2}   # inline\nmodel:\n    name:  resnet50\n"
    '    labels: ~\n\n# about errors\nerrors:\n    max: "2%"   # rate\n\n# the end\n',
    "comment between": "loader:\n  prefetch: 3   # some\n\n# engine part\nengine: local\n"
    "model: { name : x , weights: none }\ninput: a\noutput: b\n",
    "comment above": "input: a\noutput: b\nmodel: {name: x}\nruntime:  # r\n\n  # of a batch\n"
    "  threads: 1\nloader:\n  # ahead\n\n  # more of it\n  prefetch: 3\n  # last\n",
    "lists": "input: a\noutput: b\nmodel:\n    name: x\n    preprocess:\n        mean:\n"
    "          - 0.50\n          - +0.5 # half\n          - .5\nprovider:\n    name: cuda\n"
    "    devices:\n      - 0\n      - 1\n",
    "json": '{"input": "a", "output": "b", "model": {"name": "x"}, "loader": {}}',
    "quoted": 'input: a\noutput: b\nmodel: {name: x}\nloader: {"workers": "auto"} # w\n',
    "no newline": "input: a\noutput: b\nmodel: {name: x}\nruntime: {threads: auto}",
    "windows": "input: a\r\noutput: b\r\nmodel: {name: x}\r\nbatch_size: 1 # one\r\n",
    "with a mark": "\ufeffinput: a\noutput: b\nmodel: {name: x}\n",
    "ended": "# before\n---\ninput: a\noutput: b\nmodel: {name: x}\n...\n# after\n",
    "numbers": "batch_size: 0x10\ntop_k: 0_5\nmin_agreement: 0.90\ninput: 'no'\noutput: \"012\"\n"
    "model: {name: x, labels: Null, num_classes: ~}\nerrors: {max: NULL}\n",
    "long": f"input: {'photos and ' * 30}\noutput: b\nmodel: {{name: x}} # {'long ' * 40}\n",
    "not ascii": "input: fotos/été # où\noutput: b\nmodel: {name: x}\n",
}
SHIPPED = {
    **{path.name: path.read_text() for path in JOBS},
    "init": TEMPLATE.format(
        schema="job.schema.json", input='"a"', output='"b"', model='"resnet50"', provider="cpu"
    ),
}
SETTINGS: dict[str, int | str] = {
    "batch_size": 48,
    "loader.workers": 4,
    "runtime.streams": 2,
    "precision": "int8",
}


def expected_data(text: str, changes: dict[str, int | str]) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(text.removeprefix("\ufeff"))
    for key, value in changes.items():
        parent, _, leaf = key.rpartition(".")
        (data.setdefault(parent, {}) if parent else data)[leaf] = value
    return data


def written(path: Path, text: str, changes: dict[str, int | str]) -> str:
    """A job file's text after `write_settings`."""
    path.write_bytes(text.encode())
    write_settings(path, changes)
    return path.read_bytes().decode()


def outline(text: str) -> list[tuple[str, str]]:
    """The key and the comment of each line that has one of them."""
    lines = [re.fullmatch(r"\s*(?:- )?([^\s:#]*)[^#]*(#.*)?", line) for line in text.splitlines()]
    return [line.groups("") for line in lines if line is not None and any(line.groups())]  # type: ignore[misc]


def require_comments_beside_their_keys(before: str, after: str) -> None:
    """Without the keys added, all lines have the keys and comments that they had.

    A key added to a mapping stands right below that mapping's own key, above any comment.
    """
    old, new = outline(before), outline(after)
    added = {"workers", "streams", "loader", "runtime", "batch_size", "precision"}
    added -= {key for key, _ in old}
    assert [line for line in new if line[0] not in added] == old
    for above, below in itertools.pairwise(new):
        if below[0] in added & {"workers", "streams"}:
            assert above[0] in ("loader", "runtime")


@pytest.mark.parametrize("text", SHIPPED.values(), ids=SHIPPED)
def test_the_job_files_shipped_change_in_no_other_line(text: str, tmp_path: Path) -> None:
    found = written(tmp_path / "job.yaml", text, SETTINGS)
    changed = list(difflib.ndiff(text.splitlines(), found.splitlines()))
    removed = [line[2:].split()[0] for line in changed if line.startswith("- ")]
    added = [line[2:].split()[0] for line in changed if line.startswith("+ ")]
    names = ["batch_size:", "workers:", "streams:", "precision:", "loader:", "runtime:"]
    assert set(added) == set(names) - ({"loader:", "runtime:"} if "loader:" in text else set())
    assert set(removed) == {name for name in names[:4] if f"{name} " in text}
    require_comments_beside_their_keys(text, found)


@pytest.mark.parametrize(
    "text", [*SHIPPED.values(), *ODD_FILES.values()], ids=[*SHIPPED, *ODD_FILES]
)
def test_only_the_keys_written_change_and_comments_stay(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    found = written(path, text, SETTINGS)
    assert yaml.safe_load(found.removeprefix("\ufeff")) == expected_data(text, SETTINGS)
    assert load_job(path).batch_size == 48
    assert found.startswith("\ufeff") == text.startswith("\ufeff")
    assert found.count("\r\n") == (found.count("\n") if "\r" in text else 0)
    if not text.startswith("{"):
        require_comments_beside_their_keys(text, found)
    assert written(path, found, SETTINGS) == found


def test_what_is_not_set_stays_as_it_is_written(tmp_path: Path) -> None:
    text = ODD_FILES["numbers"]
    changed = text.replace("0x10", "8")
    assert written(tmp_path / "job.yaml", text, {"batch_size": 8}) == changed
    found = written(tmp_path / "job.yaml", ODD_FILES["lists"], {"batch_size": 8})
    assert found == ODD_FILES["lists"] + "batch_size: 8\n"
    found = written(tmp_path / "job.yaml", ODD_FILES["ended"], {"batch_size": 8})
    assert found == ODD_FILES["ended"].replace("...", "batch_size: 8\n...")


def test_a_quoted_value_stays_quoted_and_an_inline_mapping_inline(tmp_path: Path) -> None:
    text = "precision: \"fp32\"\nloader: {workers: 'auto', prefetch: 2}\nruntime: {threads: 2}\n"
    found = written(
        tmp_path / "job.yaml",
        text,
        {"precision": "int8", "loader.workers": 3, "runtime.streams": 2},
    )
    assert found == (
        'precision: "int8"\nloader: {workers: 3, prefetch: 2}\nruntime: {streams: 2, threads: 2}\n'
    )


def test_a_json_file_stays_json(tmp_path: Path) -> None:
    found = json.loads(written(tmp_path / "job.yaml", ODD_FILES["json"], SETTINGS))
    assert found == expected_data(ODD_FILES["json"], SETTINGS)


def test_a_comment_behind_a_value_keeps_its_column(tmp_path: Path) -> None:
    text = "input: a\noutput: b\nmodel: {name: x}\nbatch_size: 16   # images\n"
    found = written(tmp_path / "job.yaml", text, {"batch_size": 8})
    assert found.splitlines()[-1] == "batch_size: 8    # images"


def test_an_absent_key_is_not_added_for_its_default(tmp_path: Path) -> None:
    text = "input: a\noutput: b\nmodel: {name: x}\n"
    assert (
        written(tmp_path / "job.yaml", text, {"batch_size": 16, "loader.workers": "auto"}) == text
    )
    explicit = f"{text}batch_size: 8\n"
    assert written(tmp_path / "job.yaml", explicit, {"batch_size": 16}) == f"{text}batch_size: 16\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: a\nloader: {workers: 1, # one\n  prefetch: 2}\n", "without losing `# one`"),
        ("input: a\ninput: b\n", "duplicate key `input`"),
        ("input: &x a\noutput: *x\n", "aliases"),
        ("- a\n", "found a list"),
    ],
)
def test_a_file_that_would_lose_something_is_refused_and_stays(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobFileError, match=re.escape(message)):
        write_settings(path, SETTINGS)
    with pytest.raises(JobFileError, match=re.escape(message)):
        require_editable(path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_edit_that_changed_something_else_would_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SHIPPED["init"])
    monkeypatch.setattr(edit, "_put", lambda root, key, value: root.update(top_k=1))
    with pytest.raises(JobFileError, match="without changing more of it"):
        write_settings(path, SETTINGS)
    assert path.read_text() == SHIPPED["init"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_and_the_files_mode_stay(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SHIPPED["init"])
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    write_settings(link, SETTINGS)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert "batch_size: 48" in path.read_text()
    assert sorted(tmp_path.iterdir()) == [path, link]


_COMMENTS = st.sampled_from(["", "  # said", " #", "     # {not: a key}", "  "])
_VALUES: dict[str, Any] = {
    "batch_size": st.sampled_from(["1", "16", "0x10", "65536"]),
    "top_k": st.sampled_from(["5", "1"]),
    "precision": st.sampled_from(["fp32", "'int8'", '"fp16"']),
    "loader": st.sampled_from(
        [
            *("{}", "{workers: auto}", "{workers: 3, prefetch: 2 }", "{ prefetch: 2,}"),
            *("\n  workers: auto", "\n    prefetch: 2 # ahead\n    workers: 1"),
            "\n  # first\n  decode: exact\n  # last",
        ]
    ),
    "runtime": st.sampled_from(["{threads: 2}", "\n  streams: auto  # s\n\n  threads: 1"]),
    "errors": st.sampled_from(["{max: null}", "\n  max: '2%'", "\n  max:"]),
}


@st.composite
def job_texts(draw: st.DrawFn) -> str:
    keys = draw(st.permutations([*_VALUES, "input", "output", "model"]))
    lines = []
    for key in keys:
        if key in _VALUES and draw(st.booleans()):
            continue
        value = draw(_VALUES[key]) if key in _VALUES else "{name: x}" if key == "model" else "a"
        gap = "" if value.startswith("\n") else " "
        lines.append(f"{key}:{gap}{value}{draw(_COMMENTS)}")
        lines += draw(st.lists(st.sampled_from(["", "# alone", "  # indented"]), max_size=2))
    end = draw(st.sampled_from(["", "\n", "\n\n# the end\n"]))
    return "\n".join(lines) + end


@given(text=job_texts(), size=st.integers(1, 999), workers=st.sampled_from(["auto", 1, 64]))
def test_any_job_file_keeps_all_but_what_is_written(
    text: str, size: int, workers: int | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    before = load_job(path)
    changes: dict[str, int | str] = {
        "batch_size": size,
        "loader.workers": workers,
        "runtime.streams": 7,
    }
    found = written(path, text, changes)
    after = load_job(path)
    assert (after.batch_size, after.loader.workers, after.runtime.streams) == (size, workers, 7)
    untouched = {"batch_size": ..., "loader": {"workers"}, "runtime": {"streams"}}
    assert after.model_dump(exclude=untouched) == before.model_dump(exclude=untouched)  # type: ignore[arg-type]
    require_comments_beside_their_keys(text, found)


def test_apply_writes_the_best_settings_also_over_an_override(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    write_tiny_job(tmp_path)
    job = tmp_path / "commented.yaml"
    text = f"""\
# a job of mine
input: {ROOT / "samples" / "digits"}
output: out
model: {json.dumps(json.loads((tmp_path / "job.yaml").read_text())["model"])}
provider: {HERE}
batch_size: 64   # as it was
"""
    job.write_text(text)
    done = batchclf(
        "tune", job, "-b", "4", "--budget", "3", "--batch-sizes", "4", "--apply", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert done.json["applied"]
    assert done.json["settings"]["batch_size"] == 4
    found = job.read_text()
    assert "batch_size: 4    # as it was\n" in found
    assert found.startswith("# a job of mine\n")
    spec = load_job(job)
    runtime = spec.runtime
    written = (spec.batch_size, spec.loader.workers, runtime.streams, runtime.threads, runtime.part)
    assert written == tuple(done.json["settings"].values())
