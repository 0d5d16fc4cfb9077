"""The rows of a visit that tell how fast it is: copies, inference, decoding, whole runs.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import itertools
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from batchclf.images.prefetch import zeroed_pixels
from batchclf.images.shared import SharedPixels
from batchclf.images.source import source_of
from batchclf.images.store import open_store
from batchclf.results.records import (
    DecodeBackend,
    DecodeMode,
    Failure,
    Pixels,
    Prediction,
    Scores,
    refs_of,
)
from batchclf.runtime.classifier import OnnxClassifier
from batchclf.runtime.ranking import rank
from batchclf.runtime.timing import measure_throughput
from batchclf.system.interrupt import StopRequest
from batchclf.system.machine import usable_cores
from batchclf.tuning import measure
from tests.benchmarks.gpu_bench import (
    PRECISIONS,
    Bench,
    Row,
    Rows,
    allocate,
    batchclf,
    images,
    log,
    settle,
    varied,
)

PHOTO_BYTES = 224 * 224 * 3
NUM_FIRST = 12
"""Throughputs that matter more than where answers are ranked."""
TOP_K = 5
SAME_SCORE = 1e-3
Ranked = Sequence[tuple[Prediction, ...] | Failure]
ROUNDS = 3
"""Of a throughput; the median counts."""


# ---- copies --------------------------------------------------------------------------------------


def copies(bench: Bench) -> Rows:
    """How fast pixels get to the GPU, and who waits meanwhile."""
    settle(bench)
    first, *_ = bench.arguments.models
    if bench.on_cuda:
        for size, kind in itertools.product((256, 64), ("pageable", "pinned", "registered")):
            yield f"{kind} batch of {size}", partial(copied, kind, size)
    yield f"{first} stall of a bound batch", partial(stall, bench, first)


def copied(kind: str, size: int) -> Row:
    """GB/s from host memory of a kind to the device and back, of so many photos."""
    import onnxruntime as ort

    from batchclf.runtime.cuda import Copies

    num_bytes = size * PHOTO_BYTES
    device = ort.OrtValue.ortvalue_from_shape_and_type((num_bytes,), np.uint8, "cuda", 0)
    copy = Copies(0)
    with host_memory(kind, num_bytes) as host:
        places = device.data_ptr(), host.ctypes.data
        rates = {
            "to_device": gb_per_s(partial(copy, *places, num_bytes), num_bytes),
            "from_device": gb_per_s(partial(copy, *places[::-1], num_bytes), num_bytes),
        }
    return {"gb_per_s": rates["to_device"], **rates, "num_bytes": num_bytes}


def gb_per_s(copy: Callable[[], object], num_bytes: int) -> float:
    """Of the median of some copies."""
    times = []
    for _ in range(12):
        started = time.perf_counter()
        copy()
        times.append(time.perf_counter() - started)
    return round(num_bytes / statistics.median(times[2:]) / 1e9, 2)


@contextmanager
def host_memory(kind: str, num_bytes: int) -> Iterator[Pixels]:
    """Memory of this process as a copy finds it: ordinary, of a job's threads, of its processes.

    Raises:
        AssertionError: it is not to be page-locked.
    """
    from batchclf.runtime.cuda import page_locked, pinned_pixels

    refused: list[str] = []
    with ExitStack() as held:
        if kind == "pinned":
            pixels = pinned_pixels((num_bytes,), 0, refused.append)
        elif kind == "registered":
            shared = held.enter_context(closing(SharedPixels(1, (num_bytes,))))
            pixels = shared.pixels_NHWC[0]
            held.enter_context(page_locked(pixels, 0, refused.append))
        else:
            pixels = zeroed_pixels((num_bytes,))
        assert not refused, refused[0]
        pixels[:] = 1
        yield pixels


def stall(bench: Bench, model: str) -> Row:
    """The longest that another Python thread stands still while batches are classified."""
    classify = bench.open(model, bench.precisions[-1], 256)
    pixels_NHWC = allocate(
        bench, (256, *bench.resolved(model).bundle.meta.preprocess.crop, 3), True
    )
    classify(pixels_NHWC)
    ended = threading.Event()
    gaps: list[float] = []

    def tick() -> None:
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.0002)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    started = time.perf_counter()
    for _ in range(5):
        classify(pixels_NHWC)
    batch_ms = 200 * (time.perf_counter() - started)
    ended.set()
    ticking.join()
    return {"stall_ms": round(1000 * max(gaps), 2), "batch_ms": round(batch_ms, 2)}


# ---- throughput ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a throughput is measured; the defaults are a job's."""

    model: str
    precision: str
    size: int
    streams: int = 2
    bind: bool | None = None
    pinned: bool = True
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What differs from a job's own."""
        changed = [f"{self.streams} stream"] if self.streams == 1 else []
        changed += ["unbound"] if self.bind is False else []
        changed += [] if self.pinned else ["pageable"]
        changed += [f"{key}={value}" for key, value in self.options]
        return " ".join((self.model, self.precision, f"batch {self.size}", *changed))


def settings_of(bench: Bench) -> Iterator[Setting]:
    """What is measured, what matters most first."""
    first, *others = bench.arguments.models
    sizes = bench.arguments.batch_sizes
    middle = sizes[len(sizes) // 2]
    names = bench.precisions[::-1]
    for size, name in itertools.product(sorted(sizes, key=lambda size: size != middle), names):
        yield Setting(first, name, size)
    for name in names:
        yield Setting(first, name, middle, streams=1)
    for name, pinned, bind in itertools.product(names[::2], (True, False), (None, False)):
        if (pinned, bind) != (True, None):
            yield Setting(first, name, middle, pinned=pinned, bind=bind)
    if bench.on_cuda:
        yield from ablations(first, middle)
    for name, model in itertools.product(names, others):
        yield Setting(model, name, middle)


def ablations(model: str, size: int) -> Iterator[Setting]:
    """One option at a time, beside what a job sets."""
    layouts = {"fp16": "0", "fp32": "1"}  # what a job does not set
    for name, layout in layouts.items():
        for option in (
            ("use_tf32", "0" if name == "fp16" else "1"),
            ("prefer_nhwc", layout),
            ("fuse_conv_bias", "1"),
            ("cudnn_conv_algo_search", "EXHAUSTIVE"),
        ):
            if (name, *option) != ("fp32", "use_tf32", "1"):  # that is tf32
                yield Setting(model, name, size, options=(option,))
        graph = (("enable_cuda_graph", "1"),)
        for streams in (1, 2):
            yield Setting(model, name, size, streams=streams, options=graph)


def throughput(bench: Bench) -> Rows:
    """Images per second of inference alone."""
    settle(bench)
    settings = list(settings_of(bench))
    rows = [(one.name, partial(throughput_of, bench, one)) for one in settings]
    rows.insert(NUM_FIRST, (f"{settings[0].name} ranked", partial(ranked, bench, settings[0])))
    yield from rows


def throughput_of(bench: Bench, setting: Setting) -> Row:
    """The median of some rounds."""
    started = time.perf_counter()
    shape = (setting.size, *bench.resolved(setting.model).bundle.meta.preprocess.crop, 3)
    pixels_NHWC = allocate(bench, shape, setting.pinned)
    options = dict(setting.options)
    one = partial(bench.open, setting.model, setting.precision, setting.size)
    runs = [one(bind=setting.bind, path=None, **options) for _ in range(setting.streams)]
    opened_s = time.perf_counter() - started
    found = [
        measure_throughput(
            runs, pixels_NHWC, num_warm_up=3 if turn == 0 else 1,
            budget_s=bench.arguments.seconds / ROUNDS,
        )
        for turn in range(ROUNDS)
    ]  # fmt: skip
    rates = [one.images_per_s for one in found]
    return {
        "images_per_s": round(statistics.median(rates), 1),
        "rounds": [round(rate, 1) for rate in rates],
        "cpu_ms_per_image": round(statistics.median(one.cpu_ms_per_image for one in found), 4),
        "opened_s": round(opened_s, 2),
        "model": setting.model,
        "precision": setting.precision,
        "batch_size": setting.size,
        "is_job": setting == Setting(setting.model, setting.precision, setting.size),
    }


# ---- softmax and top k, here or there ------------------------------------------------------------


def ranked(bench: Bench, setting: Setting) -> Row:
    """Images per second and CPU time of inference with ranking: as a job does it, or in the graph.

    In the graph, an image's best classes are all that is copied from the device.
    """
    bundle = bench.bundle(setting.model, PRECISIONS[setting.precision][0])
    assert bundle.meta.activation == "softmax", "another one would be another graph"
    labels = bundle.meta.labels
    shape = (setting.size, *bundle.meta.preprocess.crop, 3)
    batch_NHWC = allocate(bench, shape, is_pinned=True)
    batch_NHWC[:] = varied(bench, setting.model, setting.size)
    model = with_ranking(bundle.model_path, bench.work / f"ranking-{os.getpid()}.onnx")
    open_one = partial(bench.open, setting.model, setting.precision, setting.size)
    plain = [open_one() for _ in range(setting.streams)]
    inside = [open_one(path=model) for _ in range(setting.streams)]

    def by_host(run: OnnxClassifier, pixels_NHWC: Pixels) -> Ranked:
        return rank(run(pixels_NHWC), labels, TOP_K, activation="softmax")

    def by_device(run: OnnxClassifier, pixels_NHWC: Pixels) -> Ranked:
        return predictions(run(pixels_NHWC), labels)

    ways = {
        "host": [partial(by_host, run) for run in plain],
        "device": [partial(by_device, run) for run in inside],
    }
    agree = same_answers(ways["host"][0](batch_NHWC), ways["device"][0](batch_NHWC))
    row: Row = {"agree": agree, "model": setting.model, "precision": setting.precision}
    for way, runs in ways.items():
        found = [
            measure_throughput(runs, batch_NHWC, budget_s=bench.arguments.seconds / ROUNDS)
            for _ in range(ROUNDS)
        ]
        row[f"{way}_images_per_s"] = round(statistics.median(one.images_per_s for one in found), 1)
        row[f"{way}_cpu_us"] = round(
            1000 * statistics.median(one.cpu_ms_per_image for one in found), 2
        )
    return {"images_per_s": row["device_images_per_s"], **row}


def with_ranking(model: Path, target: Path) -> Path:
    """A model with softmax and top k behind its scores: TOP_K scores, then as many indices, NT."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = onnx.load(model)
    (scores,) = made.graph.output
    made.graph.initializer.append(numpy_helper.from_array(np.array([TOP_K]), "top_k"))
    made.graph.node.extend(
        [
            helper.make_node("Softmax", [scores.name], ["shares"], axis=-1),
            helper.make_node("TopK", ["shares", "top_k"], ["best", "places"], axis=-1),
            # As numbers of float32, which are exact up to 16 million.
            helper.make_node("Cast", ["places"], ["indices"], to=TensorProto.FLOAT),
            helper.make_node("Concat", ["best", "indices"], ["ranked"], axis=-1),
        ]
    )
    batch = scores.type.tensor_type.shape.dim[0]
    size = batch.dim_param or batch.dim_value
    found = helper.make_tensor_value_info("ranked", TensorProto.FLOAT, [size, 2 * TOP_K])
    scores.CopyFrom(found)
    onnx.save(made, target)
    return target


def predictions(ranked_NT: Scores, labels: Sequence[str]) -> Ranked:
    """What a graph that ranks says, as `rank` tells it."""
    scores_NT, indices_NT = np.hsplit(ranked_NT, 2)
    return [
        tuple(Prediction(labels[index], index, score) for index, score in zip(*row, strict=True))
        for row in zip(indices_NT.astype(np.intp).tolist(), scores_NT.tolist(), strict=True)
    ]


def same_answers(host: Ranked, device: Ranked) -> bool:
    """Whether both name the same best class for each image, and give it the same score."""
    return all(
        not isinstance(one, Failure)
        and not isinstance(other, Failure)
        and one[0].index == other[0].index
        and abs(one[0].score - other[0].score) < SAME_SCORE
        for one, other in zip(host, device, strict=True)
    )


# ---- decoding ------------------------------------------------------------------------------------


def decode(bench: Bench) -> Rows:
    """Images per second of reading and decoding alone, with every usable core."""
    ways: tuple[tuple[DecodeMode, DecodeBackend], ...] = (
        *(("exact", "processes"), ("fast", "processes")),
        *(("exact", "threads"), ("fast", "threads")),
    )
    for mode, backend in ways:
        yield f"{mode} {backend}", partial(decoded, bench, mode, backend)


def decoded(bench: Bench, mode: DecodeMode, backend: DecodeBackend) -> Row:
    """Images per second of one way."""
    model = bench.arguments.models[0]
    job = bench.job(model, loader={"backend": backend})
    source = source_of(job)
    refs = list(refs_of(open_store(source).entries()))
    work = measure.Bench(
        job, source, bench.resolved(model), refs, len(refs), bench.work, StopRequest(), log
    )
    found = measure.measure_decoding(work, mode, usable_cores(), 3 * bench.arguments.seconds)
    return {
        "images_per_s": round(found.images_per_s, 1),
        "cpu_ms_per_image": round(found.cpu_ms_per_image, 3),
        "num_failed": found.num_errors,
        "decode": mode,
    }


# ---- whole runs ----------------------------------------------------------------------------------

START_S = 12.0
"""Of a run's share, for its start and end."""
LEAST_EFFICIENCY = 0.6
"""What a run must reach to end within its share."""


def end_to_end(bench: Bench) -> Rows:
    """Whole runs from JPEG files, against the smaller of what was measured before."""
    model = bench.arguments.models[0]
    names = ("fp16", "fp32") if bench.on_cuda else ("fp32",)
    ways = list(itertools.product(("exact", "fast"), names))
    for number, (mode, name) in enumerate(ways):
        row = f"{model} {name} {mode}"
        yield row, partial(run_whole, bench, name, mode, len(ways) - number)


def run_whole(bench: Bench, name: str, mode: str, num_left: int) -> Row:
    """One run, of as many images as its share of the time has room for."""
    model = bench.arguments.models[0]
    share_s = (bench.ends_at - time.monotonic()) / num_left
    share_s = min(share_s, bench.arguments.row_s - START_S)
    size, inferred, decoded = limits(bench.arguments.out, model, name, mode)
    limit = min(inferred, decoded)
    num_images = int(max(1_000, LEAST_EFFICIENCY * limit * (share_s - START_S)))
    num_images = min(num_images, bench.arguments.num_images)
    job = bench.job_file(
        model,
        input=str(images(bench.arguments.images, bench.work, 1 << num_images.bit_length())),
        precision=PRECISIONS[name][0],
        batch_size=size,
        loader={"decode": mode},
    )
    found = batchclf(
        *("run", str(job), "--overwrite", "--json", "--limit", str(num_images)),
        timeout_s=max(20.0, share_s + START_S),
    )
    shutil.rmtree(bench.work / "out", ignore_errors=True)
    rate = found.get("images_per_s")
    return {
        "images_per_s": rate,
        "efficiency": None if rate is None else round(rate / limit, 3),
        "inferred_per_s": inferred,
        "decoded_per_s": decoded,
        "batch_size": size,
        "run": found,
    }


def limits(out: Path, model: str, name: str, mode: str) -> tuple[int, float, float]:
    """The best batch size, and the images per second of inference and of decoding.

    Raises:
        AssertionError: they are not known.
    """
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    inferred = [
        (row["images_per_s"], row["batch_size"])
        for row in rows
        if (row.get("model"), row.get("precision"), row.get("is_job")) == (model, name, True)
    ]
    decoded = [row["images_per_s"] for row in rows if row.get("decode") == mode]
    assert inferred, f"no throughput of {model} {name} is known"
    assert decoded, f"how fast decoding is ({mode}) is not known"
    rate, size = max(inferred)
    return size, rate, max(decoded)
