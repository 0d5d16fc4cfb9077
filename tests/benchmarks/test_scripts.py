"""The benchmarks run, and print what they promise; what they measure is nobody's assertion."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchclf.runtime.providers import installed_flavours
from tests.benchmarks.overhead import BATCH_SIZE, whole
from tests.conftest import DIGITS_MODEL, ROOT, Batchclf, write_job


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
    out = tmp_path / "gpu.json"
    printed = run(
        *("gpu", "--provider", "cpu", "--bundle", str(bundle), "--models", "digits"),
        *("--batch-sizes", "4", "--num-images", "12", "--repeats", "1"),
        *("--out", str(out), "--skip", "tests", "--decode-s", "0.1"),
    )
    found = json.loads(out.read_bytes())
    assert list(found) == [
        *("machine", "doctor", "verify", "inference"),
        *("decode", "decode_on_gpu", "end_to_end"),
    ]
    assert found["doctor"]["providers"]["cpu"]["opens"]
    assert found["verify"]["digits fp32"]["agree"]
    rows = {(row["batch_size"], row["bound"], row["in_flight"]) for row in found["inference"]}
    assert rows == {(size, bound, n) for size in (4,) for bound in (False, True) for n in (1, 2)}
    assert all(row["images_per_s"] > 0 for row in found["inference"])
    kinds = itertools.product(("exact", "fast"), ("threads", "processes"))
    assert set(found["decode"]) == {" ".join(kind) for kind in kinds}
    assert [row["decode"] for row in found["end_to_end"]] == ["exact", "fast"]
    assert all(row["last_run"]["num_ok"] == 12 for row in found["end_to_end"])
    assert all(row["efficiency"] > 0 for row in found["end_to_end"])
    assert json.loads(printed.splitlines()[-1])["end_to_end"] == found["end_to_end"]


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
    printed = run("overhead", "--num-images", "128", "--workers", "1", "3")
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [row["part"] for row in rows if row["decode"] == "exact"] == [
        *("read", "decode", "rank", "encode"),
        *("whole, 1 threads", "whole, 3 threads"),
        *("whole, 16 threads of 2.5 ms", "whole, 16 threads of 1.0 ms"),
        *("whole, 1 processes", "whole, 3 processes"),
        *("whole, 16 processes of 2.5 ms", "whole, 16 processes of 1.0 ms"),
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
    assert set(found["photos"]) == {"folder", "50 tar", "50 tar.gz", "1 zip", "10 parquet"}
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
