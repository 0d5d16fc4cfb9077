"""Everything there is to measure on a CUDA machine, in one go, into one JSON file.

    python -m tests.benchmarks.gpu --out tests/benchmarks/results/gpu.json

In this order, the file written anew after each: the machine and `batchclf doctor`; the tests of the
providers; `batchclf verify` at fp32 and fp16; inference alone over batch sizes for fp32, TF32 and
fp16, bound and unbound, one and two batches in flight; decoding alone, on the CPU and on the GPU;
and whole runs from JPEG files against the smaller of the two limits. `--provider cpu` rehearses it
where there is no GPU (fp32 only). Models have random weights unless --bundle names exported ones.
"""

import argparse
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson

from batchclf.errors import BatchclfError
from batchclf.images.prefetch import zeroed_pixels
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.models.resolve import resolve_model
from batchclf.models.variants import needed_variant, resolve_variant
from batchclf.results.records import DecodeBackend, DecodeMode, refs_of
from batchclf.runtime.classifier import open_classifier, open_reference
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.runtime.timing import measure_throughput
from batchclf.sessions.open import Wanted, conversion_of, settle_provider, targets
from batchclf.sessions.sample import sample_input
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec, ProviderSpec
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import cpu_name_and_flags, usable_cores
from batchclf.tuning import measure
from tests.tiny import link_images

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("mobilenet_v2", "resnet50")
ROW_ERRORS: tuple[type[Exception], ...] = (BatchclfError, *ORT_ERRORS)
"""What one figure may fail with, such as out of memory, and the next one not."""
BATCH_SIZES = (1, 8, 32, 64, 128, 256)
TESTS = ("tests/runtime", "tests/sessions/test_refusals.py", "tests/test_precisions.py")


def log(text: str) -> None:
    """A line of progress on stderr."""
    print(f"gpu: {text}", file=sys.stderr, flush=True)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process from the project's root."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON object that a command printed last, or how it ended."""
    with suppress(IndexError, json.JSONDecodeError):
        return {"exit_code": done.returncode, **json.loads(done.stdout.splitlines()[-1])}
    return {"exit_code": done.returncode, "stderr": done.stderr[-2000:]}


def machine() -> dict[str, Any]:
    """What this was measured on."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name_and_flags()[0],
        "usable_cores": usable_cores(),
    }
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,power.limit"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        found["gpus"] = done.stdout.strip().splitlines()
    return found


class Bench:
    """The steps, and the jobs that they share."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.provider: str = arguments.provider
        self.work = work
        self.images = link_images(arguments.images, work / "images", arguments.num_images)

    def job(self, model: str, **keys: Any) -> Path:
        """A job file for a model of the benchmark."""
        bundles = {Path(folder).name: folder for folder in self.arguments.bundle}
        spec = (
            {"bundle": str(Path(bundles[model]).resolve())}
            if model in bundles
            else {"name": model, "weights": "none"}
        )
        path = self.work / f"{model}.yaml"
        job = {
            "input": str(self.images),
            "output": str(self.work / "out"),
            "model": spec,
            "provider": self.provider,
            "min_agreement": 0.0,  # random weights tell classes apart by a hair
            **keys,
        }
        path.write_text(json.dumps(job))
        return path

    def precisions(self) -> list[tuple[str, str, dict[str, str]]]:
        """Name, the job's precision and the provider's options of each."""
        if self.provider != "cuda":
            return [("fp32", "fp32", {})]
        return [("fp32", "fp32", {}), ("tf32", "fp32", {"use_tf32": "1"}), ("fp16", "fp16", {})]

    def doctor(self) -> Any:
        """`batchclf doctor --json`."""
        return last_json(call("batchclf", "doctor", "--json"))

    def tests(self) -> Any:
        """The tests of the providers, as they end."""
        found = [path for path in TESTS if (ROOT / path).exists()]
        done = call("pytest", "-q", *found)
        return {"exit_code": done.returncode, "output": (done.stdout + done.stderr)[-3000:]}

    def verify(self) -> Any:
        """`batchclf verify` of each model and precision."""
        return {
            f"{model} {name}": last_json(
                call("batchclf", "verify", str(self.job(model, precision=precision)), "--json")
            )
            for model in self.arguments.models
            for name, precision, options in self.precisions()
            if not options
        }

    def inference(self) -> Any:
        """Images/s of inference alone."""
        rows = []
        settle_provider(load_job(self.job(self.arguments.models[0])), log)  # loads its libraries
        for model in self.arguments.models:
            for (name, precision, options), size, bind, streams in itertools.product(
                self.precisions(), self.arguments.batch_sizes, (False, True), (1, 2)
            ):
                row = {"model": model, "precision": name, "batch_size": size, "bound": bind}
                row |= {"in_flight": streams}
                try:
                    row["images_per_s"] = self._throughput(
                        model, precision, options, size, bind=bind, streams=streams
                    )
                except ROW_ERRORS as error:
                    row["error"] = str(error)
                log(json.dumps(row))
                rows.append(row)
        return rows

    def _throughput(
        self,
        model: str,
        precision: str,
        options: dict[str, str],
        size: int,
        *,
        bind: bool,
        streams: int,
    ) -> float:
        job = load_job(self.job(model, precision=precision))
        spec = ProviderSpec.model_validate({"name": self.provider, "options": options})
        bundle = self._bundle(job)
        (target,) = targets(spec, job)
        shape = (size, *bundle.meta.preprocess.crop, 3)
        if self.provider == "cuda" and bind:
            from batchclf.runtime.cuda import pinned_pixels

            pixels_NHWC = pinned_pixels(shape, 0)
        else:
            pixels_NHWC = zeroed_pixels(shape)
        pixels_NHWC[:] = np.random.default_rng(0).integers(0, 256, pixels_NHWC.shape)
        runs = [
            open_classifier(bundle.model_path, target, batch_size=size, bind=bind)
            for _ in range(streams)
        ]
        return round(measure_throughput(runs, pixels_NHWC).images_per_s, 1)

    def _bundle(self, job: JobSpec) -> Any:
        model = resolve_model(job.model, batch_size=64, open_reference=open_reference, log=log)
        precision = needed_variant(job.provider.name, job.precision)
        if precision is None:
            return model.bundle
        wanted = Wanted(job, model, 64, sample_input(job, model), log)
        return resolve_variant(model.bundle, precision, conversion_of(wanted))

    def decode(self) -> Any:
        """Images/s of reading and decoding alone, with every usable core."""
        job = load_job(self.job(self.arguments.models[0]))
        model = resolve_model(job.model, batch_size=64, open_reference=open_reference, log=log)
        source = source_of(job)
        refs = list(refs_of(open_store(source).entries()))
        found = {}
        for mode, backend in itertools.product(get_args(DecodeMode), get_args(DecodeBackend)):
            loader = job.loader.model_copy(update={"backend": backend})
            job = job.model_copy(update={"loader": loader})
            size = len(refs)
            bench = measure.Bench(job, source, model, refs, size, self.work, StopRequest(), print)
            limit = measure.measure_decoding(bench, mode, usable_cores(), self.arguments.decode_s)
            found[f"{mode} {backend}"] = round(limit.images_per_s, 1)
        return found

    def decode_on_gpu(self) -> Any:
        """Images/s of nvImageCodec over batch sizes, into the GPU's memory, not resized.

        An experiment: what it must beat is `decode`, for which the GPU does nothing.
        """
        try:
            from nvidia import nvimgcodec  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            return {"error": f"{error}: pip install 'nvidia-nvimgcodec-cu13[all]'"}
        files = [path.read_bytes() for path in sorted(self.images.iterdir())]
        decoder = nvimgcodec.Decoder(device_id=0)
        rows = []
        for size in self.arguments.batch_sizes:
            batches = [files[start : start + size] for start in range(0, len(files), size)]
            decoder.decode(batches[0])  # warms up
            num_failed = 0
            started = time.perf_counter()
            for batch in batches:
                images = [image for image in decoder.decode(batch) if image is not None]
                num_failed += len(batch) - len(images)
            if not images:
                return {"error": f"nvImageCodec decoded {len(files) - num_failed} images"}
            images[-1].cpu()  # decoding is asynchronous: waits for the last one
            rate = (len(files) - num_failed) / (time.perf_counter() - started)
            rows.append(
                {"batch_size": size, "images_per_s": round(rate, 1), "num_failed": num_failed}
            )
        return rows

    def end_to_end(self, limits: dict[str, Any]) -> Any:
        """Whole runs from files, against the smaller of the two limits."""
        rows = []
        for model, decode in itertools.product(self.arguments.models, ("exact", "fast")):
            for name, precision, options in self.precisions():
                size = self.arguments.batch_sizes[len(self.arguments.batch_sizes) // 2]
                job = self.job(
                    model,
                    precision=precision,
                    batch_size=size,
                    loader={"decode": decode},
                    provider={"name": self.provider, "options": options},
                )
                runs = [
                    last_json(call("batchclf", "run", str(job), "--overwrite", "--json"))
                    for _ in range(self.arguments.repeats)
                ]
                row = {"model": model, "precision": name, "decode": decode, "batch_size": size}
                rates = [run["images_per_s"] for run in runs if run["exit_code"] == 0]
                rows.append(row | self._efficiency(row, rates, limits) | {"last_run": runs[-1]})
                log(json.dumps({**row, "images_per_s": rates}))
        return rows

    def _efficiency(
        self, row: dict[str, Any], rates: list[float], limits: dict[str, Any]
    ) -> dict[str, Any]:
        inferred = [
            one["images_per_s"]
            for one in limits.get("inference", [])
            if (one["model"], one["precision"]) == (row["model"], row["precision"])
            and one["batch_size"] == row["batch_size"]
            and "images_per_s" in one
        ]
        if not rates or not inferred:
            return {}
        decoded = max(
            rate for name, rate in limits["decode"].items() if name.startswith(row["decode"])
        )
        limit = min(max(inferred), decoded)
        median = statistics.median(rates)
        return {
            "images_per_s": median,
            "inference_limit": max(inferred),
            "decode_limit": decoded,
            "efficiency": round(median / limit, 3),
        }


def steps(bench: Bench, results: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The steps by name, in their order."""
    yield "doctor", bench.doctor
    yield "tests", bench.tests
    yield "verify", bench.verify
    yield "inference", bench.inference
    yield "decode", bench.decode
    yield "decode_on_gpu", bench.decode_on_gpu
    yield "end_to_end", lambda: bench.end_to_end(results)


def main() -> None:
    """Measure, and write after each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--provider", default="cuda", choices=("cuda", "cpu", "openvino"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bundle", nargs="*", default=[], help="exported models, by folder name")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--images", type=Path, default=ROOT / "samples" / "photos")
    parser.add_argument("--num-images", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3, help="whole runs of each kind")
    parser.add_argument("--decode-s", type=float, default=5.0, help="seconds of each decoding")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        results: dict[str, Any] = {"machine": machine()}
        for name, step in steps(bench, results):
            if name in arguments.skip:
                continue
            log(name)
            results[name] = step()
            arguments.out.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2) + b"\n")
    for row in results.get("end_to_end", []):
        print(*(f"{row.get(key, '-')!s:>14}" for key in TABLE))
    print(json.dumps({key: results.get(key) for key in ("machine", "decode", "end_to_end")}))


TABLE = ("model", "precision", "decode", "batch_size", "images_per_s", "efficiency")

if __name__ == "__main__":
    main()
