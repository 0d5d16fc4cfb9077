"""The benchmarks run, and print what they promise; what they measure is nobody's assertion."""

import argparse
import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest

from batchclf.results.records import Scores
from batchclf.runtime.machine_code import MACHINE_CODE, PTX
from batchclf.runtime.providers import installed_flavours
from tests.benchmarks import gpu, gpu_bench, gpu_checks, gpu_kit, gpu_speeds, stores
from tests.benchmarks.overhead import BATCH_SIZE, whole
from tests.conftest import DIGITS_MODEL, ROOT, Batchclf, write_job
from tests.runtime.fat_library import fat_library


def run(module: str, *arguments: str) -> str:
    """A benchmark's stdout."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_for_cuda_machines_goes_through_all_its_steps_on_the_cpu(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    bundle = tmp_path / "digits"
    assert batchclf("export", write_job(tmp_path, model=DIGITS_MODEL), bundle).exit_code == 0
    out = tmp_path / "gpu.jsonl"
    printed = run(
        *("gpu", "--provider", "cpu", "--bundle", str(bundle), "--models", "digits"),
        *("--batch-sizes", "4", "--num-images", "12", "--seconds", "0.05", "--out", str(out)),
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["step"], row["name"]): row for row in rows}
    steps = ["look", "correctness", "copies", "throughput", "decode", "end_to_end"]
    assert list(dict.fromkeys(step for step, _ in found)) == steps
    assert {name for (_, name), row in found.items() if "error" in row} <= {"nvidia-smi"}
    right = [row[key] for row in rows for key in ("agree", "bitwise") if key in row]
    assert len(right) == 6
    assert all(right)
    assert found["correctness", "digits fp32 placement by profile"]["on_the_cpu"] == []
    kinds = itertools.product(("exact", "fast"), ("threads", "processes"))
    assert {name for step, name in found if step == "decode"} == {" ".join(kind) for kind in kinds}
    assert all(row["images_per_s"] > 0 for row in rows if row["step"] in steps[3:])
    whole = [row for row in rows if row["step"] == "end_to_end"]
    assert [row["run"]["num_ok"] for row in whole] == [12, 12]
    assert all(row["efficiency"] > 0 for row in whole)
    *table, last = printed.splitlines()
    assert len(table) == len(rows)
    assert last.startswith(f"{len(rows)} rows in ")


def test_a_whole_run_of_a_visit_ends_before_its_row_is_given_up_however_much_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.jsonl"
    rows = (
        {
            "images_per_s": 3000.0,
            "batch_size": 8,
            "model": "m",
            "precision": "fp32",
            "is_job": True,
        },
        {"images_per_s": 1000.0, "decode": "exact"},
    )
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = argparse.Namespace(
        models=["m"], bundle=[], provider="cpu", out=out, work=tmp_path, images=tmp_path,
        row_s=75.0, ends_at=time.monotonic() + 400, num_images=10**6,
    )  # fmt: skip
    commands: list[tuple[str, ...]] = []

    def run(*command: str, timeout_s: float) -> gpu_bench.Row:
        commands.append(command)
        return {"images_per_s": 1000.0}

    monkeypatch.setattr(gpu_speeds, "batchclf", run)
    monkeypatch.setattr(gpu_speeds, "images", lambda *_: tmp_path)
    monkeypatch.setattr(gpu_bench, "images", lambda *_: tmp_path)
    gpu_speeds.run_whole(gpu_bench.Bench(arguments), "fp32", "exact", 4)
    (command,) = commands
    num_images = int(command[-1])
    assert 20_000 < num_images <= gpu_speeds.LEAST_EFFICIENCY * 1000 * 75


def test_a_row_that_crashes_or_hangs_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = """import json, os, sys, time
for name in ("good", "crashes", "better", "hangs", "best"):
    if name in sys.argv:
        continue
    print(json.dumps({"begin": name}), flush=True)
    if name == "crashes":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"row": {"name": name}}), flush=True)
"""
    arguments = argparse.Namespace(deadline=60.0)
    step = gpu.Step("step", 30, 1.5)

    def command(*given: Any) -> list[str]:
        return [sys.executable, "-c", says, *given[-1]]

    monkeypatch.setattr(gpu.Visit, "command", command)
    with (tmp_path / "out.jsonl").open("w") as file:
        visit = gpu.Visit(arguments, tmp_path, file)
        gpu.run_step(visit, step, time.monotonic() + 30)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["good", "crashes", "better", "hangs", "best"]
    problems = [str(row.get("error", ""))[:13] for row in rows]
    assert problems == ["", "ended with -6", "", "killed, since", ""]


def test_a_reduced_precision_agrees_in_all_scores_and_not_in_the_top_class_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    expected_NK = rng.normal(size=(8, 100)).astype(np.float32)
    expected_NK[:, 7] = 9

    def rounded_by(share: float) -> Scores:
        return expected_NK * (1 + rng.normal(size=(8, 100), scale=share)).astype(np.float32)

    def row(found_NK: Scores) -> gpu_bench.Row:
        classify = Mock(return_value=found_NK, active=Mock(nodes={}, cpu_nodes=[]))
        bench = cast(gpu_bench.Bench, Mock(open=Mock(return_value=classify)))
        found = gpu_checks.against_cpu(bench, "m", "fp16")
        json.dumps(found, allow_nan=False)
        return found

    def rounded_to_bf16(own_N: list[float] | None) -> None:
        golden = (None, expected_NK[:2], None if own_N is None else np.array(own_N))
        monkeypatch.setattr(gpu_checks, "_read", lambda _: golden)

    monkeypatch.setattr(gpu_checks, "cpu_scores", lambda *_: (np.zeros(8), expected_NK))
    rounded_to_bf16(None)
    assert row(rounded_by(1e-3))["agree"]
    assert not row(rounded_by(0.06))["agree"]
    found = row(expected_NK[::-1])
    assert found["top1"] == 1
    assert not found["agree"]
    assert not row(np.full_like(expected_NK, np.nan))["agree"]
    rounded_to_bf16([0.1, 0.4])  # a model as sensitive as that may err by more
    assert row(rounded_by(0.06))["agree"]


def test_what_a_kit_is_cut_into_is_put_together_on_the_host(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 300_000, np.uint8).tobytes()
    with (
        gpu_kit.Parts(tmp_path, 65_536) as parts,
        tarfile.open(fileobj=parts, mode="w|xz") as archive,
    ):
        member = tarfile.TarInfo("repo/data")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("kit.*"))]
    assert sizes[:-1] == [65_536] * 4
    gpu_kit.unpack(tmp_path, tmp_path / "host")
    assert (tmp_path / "host" / "repo" / "data").read_bytes() == data
    assert f"cd {tmp_path}/host/repo\n" in (tmp_path / "host" / "env.sh").read_text()


def test_machine_code_for_other_gpus_is_zeroed_and_nothing_else(tmp_path: Path) -> None:
    def library(code_80: bytes, code_86: bytes, code_90: bytes, ptx: bytes) -> bytes:
        machine_code = [(80, code_80), (86, code_86), (90, code_90)]
        some = [(MACHINE_CODE, *one) for one in machine_code]
        return fat_library(some, [*some, (PTX, 86, ptx)])

    path = tmp_path / "library.so"
    path.write_bytes(library(b"A" * 99, b"B" * 50, b"C" * 70, b"P" * 9))
    gpu_kit.keep_arch(path, 89)  # code for 86 runs on it
    assert path.read_bytes() == library(bytes(99), b"B" * 50, bytes(70), bytes(9))
    with pytest.raises(SystemExit, match=r"--arch 100: .* for \[80, 86, 90\] only"):
        gpu_kit.keep_arch(path, 100)


def test_the_precisions_are_compared_in_one_run() -> None:
    printed = run(
        *("precisions", "--images", str(ROOT / "samples" / "photos"), "--batch-size", "2"),
        *("--models", "shufflenet_v2_x0_5", "--rounds", "1", "--calls", "1"),
    )
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8"]
    assert rows[0]["speed"] == rows[0]["cpu"] == 1
    assert rows[1]["top1_agreement"] is not None


def test_the_overhead_of_each_step_and_of_the_whole_is_measured() -> None:
    printed = run("overhead", "--num-images", "256", "--workers", "1", "3", "--feeders", "2")
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["part"] for row in rows if row["decode"] == "exact"] == [
        *("read", "decode", "rank", "encode"),
        *("whole, 1 threads", "whole, 3 threads"),
        *("whole, 16 threads of 2.5 ms", "whole, 16 threads of 1.0 ms"),
        *("whole, 1 processes", "whole, 3 processes"),
        *("whole, 16 processes of 2.5 ms", "whole, 16 processes of 1.0 ms", "fed by 2"),
    ]
    assert all(row["cpu_us"] > 0 for row in rows)


def test_a_long_night_is_measured_in_small(tmp_path: Path) -> None:
    out = tmp_path / "nights.json"
    printed = run(
        *("nights", "--num-files", "1500", "--num-images", "1500", "--repeats", "1"),
        *("--sample-s", "0.01", "--cache", str(tmp_path / "cache"), "--out", str(out)),
    )
    found = json.loads(out.read_bytes())
    assert json.loads(printed.splitlines()[-1]) == found
    assert set(found["listing"]) == {"one folder", "folders of 1,000", "text list"}
    assert all(row["num_files"] == 1500 for row in found["listing"].values())
    assert all(0 < row["peak_rss_mb"] < 200 for row in found["listing"].values())
    assert found["memory"]["num_samples"] > 1
    assert found["resume"]["num_records"] == 1400
    assert len(found["resume"]["first_record_s"]) == len(found["resume"]["complete_s"]) == 1


def test_the_forms_in_which_photos_lie_are_compared() -> None:
    pytest.importorskip("pyarrow")
    printed = run(
        *("stores", "--num-images", "20", "--rounds", "1", "--num-members", "200"),
        *("--repeats", "1"),
    )
    found = json.loads(printed.splitlines()[-1])
    assert set(found["photos"]) == set(stores.FORMS)
    assert found["photos"]["folder"]["speed"] == 1
    assert all(row["images_per_s"] > 0 for row in found["photos"].values())
    assert set(found["members"]) == {"tar", "zip"}
    assert all(row["resume_num_records"] == 100 for row in found["members"].values())


def test_the_decoders_are_compared_on_photos_large_and_tiny_images() -> None:
    printed = run(
        *("decode", "--images", str(ROOT / "samples" / "photos"), "--num-images", "2"),
        *("--num-large", "1", "--rounds", "1"),
    )
    found = json.loads(printed.splitlines()[-1])
    own = ("exact", "exact, Pillow alone", "fast", "fast, Pillow alone")
    for files in ("photos", "12 megapixels", "16 pixels"):
        rows = {row["decoder"]: row for row in found["rows"] if row["files"] == files}
        assert set(own) <= set(rows)
        assert rows["exact"]["speed"] == 1
        for name in rows.keys() & {"exact, Pillow alone", "exact, Pillow resizes", "exact, plain"}:
            assert rows[name]["pixel"] == 0
        assert rows["fast"]["mean"] <= 2
        assert all(row["cpu_ms"] > 0 for row in rows.values())


def test_the_throughput_is_compared_with_that_of_peers(tmp_path: Path) -> None:
    peer = (
        "import json, pathlib, sys\n"
        "names = sorted(path.name for path in pathlib.Path(sys.argv[1]).iterdir())\n"
        "lines = [json.dumps({'path': name, 'top5': [[0, 1.0]]}) for name in names]\n"
        "pathlib.Path(sys.argv[3]).write_text('\\n'.join(lines))\n"
    )
    (tmp_path / "seed_loop.py").write_text(peer)
    provider = "openvino" if "onnxruntime-openvino" in installed_flavours() else "cpu"
    out = tmp_path / "throughput.json"
    printed = run(
        *("throughput", "--images", str(ROOT / "samples" / "photos"), "--num-images", "6"),
        *("--model", "shufflenet_v2_x0_5=none", "--python", f"{provider}={sys.executable}"),
        *("--peers", str(tmp_path), "--repeats", "1", "--only", "fp32|tutorial"),
        *("--out", str(out)),
    )
    found = json.loads(out.read_bytes())
    assert json.loads(printed.splitlines()[-1]) == found
    ours, theirs = found["rows"]
    assert (ours["contestant"], ours["top1_agreement"]) == (f"batchclf {provider} fp32", 1.0)
    assert ours["efficiency"] > 0
    assert ours["limit_parts"].keys() >= {"decode_cpu_ms", "infer_cpu_ms"}
    assert (theirs["contestant"], theirs["speed"]) == ("tutorial loop", 1.0)
    assert theirs["top1_agreement"] < 1


def test_what_tune_picks_is_compared_with_a_sweep(tmp_path: Path) -> None:
    job = str(write_job(tmp_path, batch_size=4))
    printed = run(
        *("tune", job, "--budget", "10", "--batch-sizes", "4,8"),
        *("--rounds", "1", "--seconds", "0.05"),
    )
    found = json.loads(printed.splitlines()[-1])
    assert found["num_combinations"] >= 2
    assert found["share_of_best"] > 0


def test_the_overhead_of_a_rehearsed_machine_counts_the_time_that_each_image_takes_there(
    tmp_path: Path,
) -> None:
    found = whole(tmp_path, 2 * BATCH_SIZE, "exact", workers=1, outside_ms=5.0)
    assert 0 < found["images_per_s"] < 1000 / 5
    assert found["cpu_us"] < 5_000


def test_the_start_is_timed_from_outside_and_by_its_own_summary(tmp_path: Path) -> None:
    job = write_job(tmp_path, model=DIGITS_MODEL)
    figures = json.loads(run("startup", str(job), "--repeats", "1").splitlines()[-1])
    assert figures["job"] == job.name
    assert 0 < figures["startup_s"] < figures["first_record_s"]
    assert figures["help_s"] > 0
