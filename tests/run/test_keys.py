"""Every key of the job file changes what it should: one row of a table each, on real runs."""

import copy
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from pydantic import BaseModel

from batchclf.errors import BatchclfError
from batchclf.images.load import Loader
from batchclf.images.memory import SharedRoom
from batchclf.results.records import ImageRef, Loaded, Pixels, Scores
from batchclf.runtime.classifier import OnnxClassifier
from batchclf.runtime.parts import InParts
from batchclf.runtime.providers import PROVIDERS, compiled_in
from batchclf.spec.job import JobSpec
from tests.conftest import DIGITS_MODEL, ROOT, command, read_records
from tests.engines.common import fault, finished, run_json, summary_of
from tests.faults.poison import poisoned_environment, write_poison
from tests.images.common import encode
from tests.tiny import NUM_CLASSES, run_here, write_classifier

WAIT_S = 60.0
RESIZE = (8, 16)
"""Height and width: the crop of 8 pixels then takes the middle of an image's width, and all of its
height."""


# ---- one run, as seen from outside ---------------------------------------------------------------


@dataclass
class Outcome:
    """What a run of a job did."""

    output: Path
    error: BatchclfError | None = None
    batch_sizes: set[int] = field(default_factory=set)
    """Of the batches handed over."""
    parts: list[int] = field(default_factory=list)
    """Images of each call of a session."""
    call_threads: set[int] = field(default_factory=set)
    """ONNX Runtime's threads per call."""
    num_children: int = 0
    """Processes that the run's own had at once."""
    thread_names: list[str] = field(default_factory=list)
    num_ahead: int = 0
    """Images loaded before the first batch was inferred; counted where that is held."""
    room_limits: set[int] = field(default_factory=set)
    """Bytes that large images were allowed together."""

    @property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        return {one["path"]: one for one in read_records(self.output)}

    @property
    def summary(self) -> Mapping[str, Any]:
        return summary_of(self.output)

    @property
    def run(self) -> Mapping[str, Any]:
        return run_json(self.output)

    def scores(self, name: str) -> list[float]:
        """An image's scores in the order of the classes; the job's top_k must be all of them."""
        ranked = sorted(self.records[name]["predictions"], key=lambda one: one["index"])
        return [one["score"] for one in ranked]

    def outcome(self, name: str) -> str:
        """An image's error code, or else its warnings, or `ok`."""
        record = self.records[name]
        code: str = record["error"]["code"] if "error" in record else ""
        return code or ",".join(record.get("warnings", ())) or "ok"


@contextmanager
def watching(seen: Outcome, *, is_held: bool) -> Iterator[None]:
    """Note what happens in this process; `is_held`: the first batch waits for `num_ahead`."""
    infer, load, start = OnnxClassifier.__call__, Loader.__call__, threading.Thread.start
    take, hand_over = SharedRoom.take, InParts.__call__
    num_loaded = 0
    looking = threading.Lock()

    def infer_watched(self: OnnxClassifier, pixels_NHWC: Pixels) -> Scores:
        if threading.current_thread().name.startswith("stream-"):
            seen.parts.append(len(pixels_NHWC))
            seen.call_threads.add(self._session.get_session_options().intra_op_num_threads)
            decoding = [
                one
                for one in psutil.Process().children()
                if any("batchclf.images" in part for part in one.cmdline())
            ]
            seen.num_children = max(seen.num_children, len(decoding))
            if is_held:
                wait_for_the_loader()
        return infer(self, pixels_NHWC)

    def hand_over_watched(
        self: InParts, pixels_NHWC: Pixels, num_rows: int | None = None
    ) -> Scores:
        if threading.current_thread().name.startswith("stream-"):
            seen.batch_sizes.add(len(pixels_NHWC))
        return hand_over(self, pixels_NHWC, num_rows)

    def wait_for_the_loader() -> None:
        ends_at = time.monotonic() + WAIT_S
        while not seen.num_ahead and time.monotonic() < ends_at:
            time.sleep(0.01)
            with looking:
                if not seen.num_ahead and all_wait("decode-"):  # for a batch to be released
                    seen.num_ahead = num_loaded

    def load_counted(self: Loader, ref: ImageRef, slot_HWC: Pixels) -> Loaded:
        nonlocal num_loaded
        num_loaded += 1
        return load(self, ref, slot_HWC)

    def take_noted(self: SharedRoom, num_bytes: int, limit: int) -> None:
        seen.room_limits.add(limit)
        take(self, num_bytes, limit)

    def start_noted(self: threading.Thread) -> None:
        seen.thread_names.append(self.name)
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxClassifier, "__call__", infer_watched)
        patch.setattr(InParts, "__call__", hand_over_watched)
        patch.setattr(Loader, "__call__", load_counted)
        patch.setattr(SharedRoom, "take", take_noted)
        patch.setattr(threading.Thread, "start", start_noted)
        yield


def all_wait(name: str) -> bool:
    """Whether all threads whose names begin so wait for another to notify them."""
    frames = sys._current_frames()
    threads = [one for one in threading.enumerate() if one.name.startswith(name)]
    at = [frames[one.ident] for one in threads if one.ident in frames]
    return all(frame.f_code is threading.Condition.wait.__code__ for frame in at)


def run_watched(job: Path, *, is_held: bool) -> Outcome:
    """Run a job in this process; what it did, and what was seen meanwhile."""
    seen = Outcome(job.parent / json.loads(job.read_text())["output"])
    with watching(seen, is_held=is_held):
        try:
            run_here(job)
        except BatchclfError as error:
            seen.error = error
    return seen


# ---- what is run ---------------------------------------------------------------------------------


def bands() -> Image.Image:
    """Bands from top to bottom, a bright one in the middle, with enough detail for any filter."""
    noise_HWC = np.random.default_rng(3).integers(0, 90, (60, 90, 3), np.uint8)
    noise_HWC[:, 36:57, 0] += 150
    return Image.fromarray(noise_HWC)


def by_hand(
    image: Image.Image,
    *,
    size: tuple[int, int] = RESIZE,
    crop: int = 8,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    seed: int = 0,
) -> Any:
    """The tiny classifier's scores, through Pillow and numpy alone."""
    pixels_HWC = np.asarray(image.resize((size[1], size[0]), resample)) / 255
    top, left = (round((edge - crop) / 2) for edge in size)
    pixels_HWC = pixels_HWC[top : top + crop, left : left + crop]
    colour_C = ((pixels_HWC - np.array(mean)) / np.array(std)).mean(axis=(0, 1))
    return softmax_of(colour_C, seed)


def logits_of(colour_C: Any, seed: int = 0) -> Any:
    """The tiny classifier's output for a mean colour."""
    weights_CK = np.random.default_rng(seed).normal(size=(3, NUM_CLASSES)).astype(np.float32) * 3
    return colour_C @ weights_CK


def softmax_of(colour_C: Any, seed: int = 0) -> Any:
    """The scores of a mean colour."""
    exp_K = np.exp(logits_of(colour_C, seed))
    return pytest.approx(list(exp_K / exp_K.sum()), abs=1e-4)


def googlenet(*, transform_input: bool = False) -> Any:
    """With random weights, always the same, that let the input through."""
    import torch
    from torchvision import models as zoo

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = zoo.googlenet(
            num_classes=NUM_CLASSES,
            aux_logits=False,
            init_weights=False,
            transform_input=transform_input,
        )
        for one in module.modules():
            if isinstance(one, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(one.weight)
        return module.eval()


def googlenet_of_black(*, transform_input: bool) -> Any:
    """Its scores of a black image, through PyTorch alone."""
    import torch

    with torch.inference_mode():
        logits_NK = googlenet(transform_input=transform_input)(torch.full((1, 3, 32, 32), -1.0))
    return logits_NK.softmax(1)[0].numpy()


PLAIN: Mapping[str, Any] = {"resize": list(RESIZE), "mean": [0.0] * 3, "std": [1.0] * 3}
"""The preprocessing of jobs unless a row says otherwise."""


LARGE = encode(
    Image.fromarray(np.random.default_rng(4).integers(0, 2, (600, 900, 3), np.uint8) * 255),
    "JPEG",
    quality=20,
)
"""Black and white noise: scaled down before its values are clipped, it is darker or brighter."""


def write_images(here: Path) -> None:
    """The folder `images`, one kind of oddity each, and what it must not show by itself."""
    images, more = here / "images", here / "more"
    images.mkdir()
    more.mkdir()
    bands().save(images / "bands.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned a quarter clockwise
    bands().save(images / "turned.png", exif=exif)
    (images / "large.jpg").write_bytes(LARGE)
    damaged = (ROOT / "samples" / "digits" / "0" / "0079.jpg").read_bytes()
    half = len(damaged) // 2
    (images / "damaged.jpg").write_bytes(damaged[:half] + bytes(half - 2) + b"\xff\xd9")
    bands().save(more / "bands.png")
    (here / "black").mkdir()
    Image.new("RGB", (40, 40)).save(here / "black" / "black.png")
    (images / "outside.png").symlink_to(more / "bands.png")
    (here / "bad").mkdir()
    for number in range(4):
        (here / "bad" / f"{number}.jpg").write_bytes(b"\xff\xd8")
    (here / "tones").mkdir()
    for tone in range(200):
        Image.new("RGB", (8, 8), (tone, 255 - tone, 128)).save(here / "tones" / f"{tone:03d}.png")
    (here / "deep").mkdir()
    ramp_HW = np.arange(2000, dtype=np.uint16).reshape(40, 50)
    Image.fromarray(ramp_HW).save(here / "deep" / "deep.png")
    (here / "huge").mkdir()
    (here / "huge" / "huge.jpg").write_bytes(encode(Image.new("L", (4000, 2400)), "JPEG"))
    (here / "hanging").mkdir()
    write_poison(here / "hanging" / "0.jpg", "hang")


def write_models(here: Path) -> None:
    """Classifiers, beside the usual one, that a row needs."""
    write_classifier(here / "tiny.onnx")
    write_classifier(here / "other.onnx", seed=1)
    write_classifier(here / "square.onnx", edge=3)
    any_size = onnx.load(here / "tiny.onnx")
    for dimension in any_size.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "edge"
    onnx.save(any_size, here / "any.onnx")
    two = onnx.load(here / "tiny.onnx")
    two.graph.node.append(helper.make_node("Neg", ["logits"], ["opposite"]))
    two.graph.output.append(copy.deepcopy(two.graph.output[0]))
    two.graph.output[1].name = "opposite"
    onnx.save(two, here / "two.onnx")
    twins = onnx.load(here / "tiny.onnx")
    weights_CK = numpy_helper.to_array(twins.graph.initializer[0]).copy()
    weights_CK[:, 5:] = weights_CK[:, :5]  # but for what int8 does not tell
    weights_CK[:, 5:] += np.random.default_rng(6).normal(size=(3, 5)) * 0.02
    twins.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights_CK, "weights"))
    onnx.save(twins, here / "twins.onnx")
    if importlib.util.find_spec("torch"):
        from safetensors.torch import save_file

        save_file(googlenet().state_dict(), here / "googlenet.safetensors")
    (here / "names.txt").write_text("".join(f"class {index}\n" for index in range(NUM_CLASSES)))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and models, and of the job files that name them."""
    folder = tmp_path_factory.mktemp("keys")
    write_images(folder)
    write_models(folder)
    for name in ("bilinear", "nearest"):
        job = write_keys(folder, name, {"model.preprocess.interpolation": name})
        subprocess.run(command("export", job, folder / f"bundle-{name}"), cwd=ROOT, check=True)
    return folder


def write_keys(here: Path, name: str, keys: Mapping[str, object]) -> Path:
    """A job file of the usual keys, and of these, with dots where they lie deeper."""
    job: dict[str, Any] = {
        "input": "images",
        "output": f"out/{name}",
        "model": {"onnx": "tiny.onnx", "preprocess": dict(PLAIN)},
        "top_k": NUM_CLASSES,
    }
    for key, value in keys.items():
        *above, last = key.split(".")
        inner = job
        for one in above:
            inner = inner.setdefault(one, {})
        inner[last] = copy.deepcopy(value)
    path = here / f"{name}.yaml"
    path.write_text(json.dumps(job))
    return path


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What shows that a key has an effect: what is seen of a job with this value, or with that."""

    look: Callable[[Outcome], object]
    seen: Sequence[tuple[object, object]]
    """Each value of the key, and what `look` then finds."""
    also: Mapping[str, object] = field(default_factory=dict)
    """Other keys of the job, for the key to matter."""
    needs: str = "cpu"
    """A provider that must be compiled into the ONNX Runtime here."""
    is_held: bool = False
    """Whether the first batch waits until the loader comes no further."""

    def __post_init__(self) -> None:
        first = self.seen[0][1]
        assert any(what != first for _, what in self.seen[1:]), "a row that shows nothing"


def error_of(outcome: Outcome) -> str:
    """What a run ended with; empty: it did not."""
    return "" if outcome.error is None else type(outcome.error).__name__


def says(text: str) -> Callable[[Outcome], bool]:
    return lambda outcome: text in str(outcome.error)


def num_threads(kind: str) -> Callable[[Outcome], int]:
    """How many threads of a name were started."""
    return lambda outcome: sum(name.startswith(f"{kind}-") for name in outcome.thread_names)


def scores_of(name: str) -> Callable[[Outcome], object]:
    return lambda outcome: outcome.scores(name)


def outcome_of(name: str) -> Callable[[Outcome], object]:
    return lambda outcome: outcome.outcome(name)


def num_predictions(outcome: Outcome) -> int:
    return len(next(iter(outcome.records.values()))["predictions"])


BANDS = by_hand(bands())
LOGITS = logits_of(
    np.asarray(bands().resize(RESIZE[::-1], Image.Resampling.BILINEAR))[
        (RESIZE[0] - 8) // 2 :, (RESIZE[1] - 8) // 2 :
    ][:8, :8].mean(axis=(0, 1))
    / 255
)
EXACT = by_hand(Image.open(io.BytesIO(LARGE)))
NEAREST = by_hand(bands(), resample=Image.Resampling.NEAREST)
TORCH = {"num_classes": 10, "preprocess": DIGITS_MODEL["preprocess"]}
ONE_BY_ONE = {"batch_size": 1, "runtime": {"streams": 1}, "input": str(ROOT / "samples/digits/0")}
THREE_BY_THREE = np.asarray(bands().resize((3, 3), Image.Resampling.BILINEAR)) / 255
DIGIT = {"input": str(ROOT / "samples" / "digits" / "0"), "top_k": 1}

ROWS: Mapping[str, Row] = {
    "input": Row(lambda o: len(o.records), [("images", 5), ("more", 1)]),
    "output": Row(
        lambda o: sorted(path.parent.name for path in o.output.parent.glob("*/predictions.jsonl")),
        [("moved/a", ["a"]), ("moved/b", ["a", "b"])],
    ),
    "model.name": Row(
        lambda o: o.summary["provider"]["nodes"]["CPUExecutionProvider"] > 100,
        [("shufflenet_v2_x0_5", True), ("squeezenet1_1", False)],
        {"model": {"weights": "none", **TORCH}, **DIGIT},
    ),
    "model.weights": Row(
        lambda o: {one["predictions"][0]["index"] for one in o.records.values()} == {0},
        [(DIGITS_MODEL["weights"], True), ("none", False)],
        {"model": {"name": "shufflenet_v2_x0_5", **TORCH}, **DIGIT},
    ),
    "model.labels": Row(
        lambda o: min(one["label"] for one in o.records["bands.png"]["predictions"]),
        [(None, "0"), ("names.txt", "class 0")],
    ),
    "model.num_classes": Row(
        num_predictions,
        [(10, 10), (3, 3)],
        {
            "model": {"name": "shufflenet_v2_x0_5", "weights": "none", **TORCH},
            **DIGIT,
            "top_k": 1000,
        },
    ),
    "model.transform_input": Row(
        lambda o: min(
            (False, True),
            key=lambda value: np.abs(
                np.subtract(o.scores("black.png"), googlenet_of_black(transform_input=value))
            ).max(),
        ),
        [(False, False), (True, True)],
        {
            "model": {
                "name": "googlenet",
                "weights": "googlenet.safetensors",
                "preprocess": {"resize": 32, "crop": 32, "mean": [0.5], "std": [0.5]},
            },
            "input": "black",
        },
    ),
    "model.activation": Row(
        scores_of("bands.png"),
        [
            (None, BANDS),
            ("softmax", BANDS),
            ("sigmoid", pytest.approx(list(1 / (1 + np.exp(-LOGITS))), abs=1e-4)),
            ("none", pytest.approx(list(LOGITS), abs=1e-4)),
        ],
    ),
    "model.onnx": Row(
        scores_of("bands.png"), [("tiny.onnx", BANDS), ("other.onnx", by_hand(bands(), seed=1))]
    ),
    "model.layout": Row(
        scores_of("bands.png"),
        [
            ("NCHW", softmax_of(THREE_BY_THREE.mean(axis=(0, 1)))),
            ("NHWC", softmax_of(THREE_BY_THREE.mean(axis=(1, 2)))),
        ],
        {"model.onnx": "square.onnx", "model.preprocess.resize": [3, 3]},
    ),
    "model.output_name": Row(
        lambda o: np.argsort(o.scores("bands.png")).tolist(),
        [
            ("logits", np.argsort(BANDS.expected).tolist()),
            ("opposite", np.argsort(BANDS.expected).tolist()[::-1]),
        ],
        {"model.onnx": "two.onnx"},
    ),
    "model.bundle": Row(
        scores_of("bands.png"),
        [("bundle-bilinear", BANDS), ("bundle-nearest", NEAREST)],
        {"model": {}},
    ),
    "model.preprocess.resize": Row(
        scores_of("bands.png"), [(list(RESIZE), BANDS), (8, by_hand(bands(), size=(8, 12)))]
    ),
    "model.preprocess.resize, of a bundle's": Row(
        scores_of("bands.png"),
        [(None, BANDS), (8, by_hand(bands(), size=(8, 12)))],
        {"model": {"bundle": "bundle-bilinear"}},
    ),
    "model.preprocess.crop": Row(
        scores_of("bands.png"),
        [(8, BANDS), (4, by_hand(bands(), crop=4))],
        {"model.onnx": "any.onnx"},
    ),
    "model.preprocess.mean": Row(
        scores_of("bands.png"),
        [([0.0] * 3, BANDS), ([0.5, 0.1, 0.2], by_hand(bands(), mean=(0.5, 0.1, 0.2)))],
    ),
    "model.preprocess.std": Row(
        scores_of("bands.png"),
        [([1.0] * 3, BANDS), ([0.5, 0.8, 2.0], by_hand(bands(), std=(0.5, 0.8, 2)))],
    ),
    "model.preprocess.channels": Row(
        scores_of("bands.png"),
        [
            ("rgb", BANDS),
            ("bgr", by_hand(Image.merge("RGB", bands().split()[::-1]))),
            ("grey", by_hand(bands().convert("L").convert("RGB"))),
        ],
    ),
    "model.preprocess.interpolation": Row(
        scores_of("bands.png"), [("bilinear", BANDS), ("nearest", NEAREST)]
    ),
    "model.preprocess.interpolation, of a bundle's": Row(
        scores_of("bands.png"),
        [(None, NEAREST), ("bilinear", BANDS)],
        {"model": {"bundle": "bundle-nearest"}},
    ),
    "model.preprocess.exif_transpose": Row(
        scores_of("turned.png"),
        [(False, BANDS), (True, by_hand(bands().transpose(Image.Transpose.ROTATE_270)))],
    ),
    "model.preprocess.exif_transpose, of a bundle's": Row(
        scores_of("turned.png"),
        [(False, BANDS), (True, by_hand(bands().transpose(Image.Transpose.ROTATE_270)))],
        {"model": {"bundle": "bundle-bilinear"}},
    ),
    "provider.name": Row(error_of, [("cpu", ""), ("cuda", "ProviderError")]),
    "provider.device_type": Row(
        says("NPU"),
        [("CPU", False), ("NPU", True)],
        {"provider": {"name": "openvino"}},
        needs="openvino",
    ),
    "provider.devices": Row(
        says("17"), [([0], False), ([17], True)], {"provider": {"name": "cuda"}}, needs="cuda"
    ),
    "provider.options": Row(
        says("no_such_option"),
        [({}, False), ({"no_such_option": 1}, True)],
        {"provider": {"name": "cpu"}},
    ),
    "provider.allow_fallback": Row(
        lambda o: error_of(o) or o.summary["provider"]["active"],
        [(False, "ProviderError"), (True, "CPUExecutionProvider")],
        {"provider": {"name": "cuda"}},
    ),
    "precision": Row(
        lambda o: (o.summary["precision"], o.run["converted_model"] is not None),
        [("fp32", ("fp32", False)), ("int8", ("int8", True))],
        {"min_agreement": 0.0},
    ),
    "min_agreement": Row(
        error_of,
        [(0.1, ""), (1.0, "PrecisionRefused")],
        {"precision": "int8", "input": "tones", "model.onnx": "twins.onnx"},
    ),
    "batch_size": Row(lambda o: o.batch_sizes, [(2, {2}), (3, {3})]),
    "top_k": Row(num_predictions, [(2, 2), (7, 7)], {"input": "more"}),
    "loader.workers": Row(num_threads("decode"), [(1, 1), (3, 3)]),
    "loader.backend": Row(
        lambda o: o.num_children, [("threads", 0), ("processes", 2)], {"loader.workers": 2}
    ),
    # A batch that is inferred, one that may wait to be written, and those ahead of them.
    "loader.prefetch": Row(
        lambda o: o.num_ahead,
        [(1, 3), (4, 6), ("auto", 4)],
        {**ONE_BY_ONE, "loader.workers": 3},
        is_held=True,
    ),
    "loader.prefetch, with more streams": Row(
        lambda o: o.num_ahead,
        [("auto", 7), (4, 8)],
        {**ONE_BY_ONE, "loader.workers": 3, "runtime": {"streams": 3}},
        is_held=True,
    ),
    "loader.decode": Row(
        lambda o: (o.scores("large.jpg") == EXACT, o.scores("bands.png") == BANDS),
        [("exact", (True, True)), ("fast", (False, True))],
    ),
    "loader.max_pixels": Row(
        outcome_of("bands.png"), [(90 * 60, "ok"), (90 * 60 - 1, "too_large")]
    ),
    "loader.max_bytes": Row(outcome_of("large.jpg"), [(2**31, "ok"), (1000, "too_large_bytes")]),
    "loader.max_seconds": Row(
        lambda o: o.records["0.jpg"]["error"]["message"].partition(" s")[0].split()[-1],
        [(0.5, "0.5"), (0.75, "0.75")],
        {"input": "hanging", "loader": {"backend": "processes", "workers": 1}},
    ),
    "loader.max_memory": Row(
        lambda o: [one if one in (10**6, 2**50) else "what is there" for one in o.room_limits],
        [(10**6, [10**6]), (2**50, [2**50]), ("auto", ["what is there"])],
        {"input": "huge"},
    ),
    "loader.sixteen_bit": Row(
        lambda o: [w.partition(":")[0] for w in o.records["deep.png"]["warnings"]],
        [
            ("scale", ["16bit_scaled", "16bit_range"]),
            ("stretch", ["16bit_stretched"]),
            ("clip", ["16bit_clipped"]),
        ],
        {"input": "deep"},
    ),
    "loader.strict": Row(outcome_of("damaged.jpg"), [(False, "jpeg_corrupt"), (True, "corrupt")]),
    "loader.allow_outside_links": Row(
        outcome_of("outside.png"), [(False, "outside_root"), (True, "ok")]
    ),
    "runtime.streams": Row(num_threads("stream"), [(1, 1), (3, 3)]),
    "runtime.threads": Row(
        lambda o: o.call_threads, [(1, {1}), (3, {3})], {"runtime": {"streams": 1}}
    ),
    "runtime.part": Row(lambda o: sorted(o.parts), [(2, [2, 2]), (3, [1, 3]), (1, [1, 1, 1, 1])]),
    "errors.max": Row(
        error_of,
        [(4, ""), (3, "ErrorLimitPassed"), ("100%", ""), ("99%", "ErrorLimitPassed")],
        {"input": "bad"},
    ),
}
"""A row for each key of the job file but those below; what follows a comma tells two rows apart."""
SEEN_ELSEWHERE = (
    "stall_timeout",
    *("engine.name", "engine.address", "engine.workers", "engine.num_cpus", "engine.num_gpus"),
    *("engine.resources", "engine.max_retries", "engine.runtime_env", "engine.allow_fewer"),
    "engine.wait_for_nodes",
)
"""Keys of the process above the run: the tests below; and where it goes: tests/engines/ray/."""


def keys_of(spec: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of a job file that may hold more than one value, with its place."""
    for name, info in spec.model_fields.items():
        inner = [one for one in (info.annotation, *get_args(info.annotation)) if is_spec(one)]
        if inner:
            yield from keys_of(inner[0], f"{above}{name}.")
        elif not (get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1):
            yield above + name


def is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def test_every_key_of_the_job_file_has_a_row() -> None:
    assert {key.partition(",")[0] for key in (*ROWS, *SEEN_ELSEWHERE)} == set(keys_of(JobSpec))


@pytest.mark.parametrize("key", ROWS)
def test_a_key_changes_what_it_should(
    key: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[key]
    if PROVIDERS[row.needs].execution_provider not in compiled_in():
        pytest.skip(f"another environment's: no {PROVIDERS[row.needs].execution_provider} here")
    for variable, text in poisoned_environment().items():  # for processes that decode
        monkeypatch.setenv(variable, text)
    for number, (value, what) in enumerate(row.seen):
        job = write_keys(
            here, f"{key.replace(', ', '-')}-{number}", {**row.also, key.partition(",")[0]: value}
        )
        seen = run_watched(job, is_held=row.is_held)
        assert row.look(seen) == what, f"{key}: {value} ({seen.error})"


@pytest.mark.parametrize("stall_timeout", [1.5, 2.5])
def test_the_stall_timeout_is_that_of_the_job(
    here: Path, tmp_path: Path, stall_timeout: float
) -> None:
    program = """
def change(module):
    infer = module.OnnxClassifier.__call__
    def infer_late(self, pixels_NHWC):
        if "stream" in threading.current_thread().name and once("hung"):
            time.sleep(1000)
        return infer(self, pixels_NHWC)
    module.OnnxClassifier.__call__ = infer_late
"""
    job = write_keys(here, f"stalled-{stall_timeout}", {"stall_timeout": stall_timeout})
    env = fault(tmp_path, program, "batchclf.runtime.classifier")
    exit_code, said = finished(job, env=env)
    assert exit_code == 0, said
    assert f"no progress for stall_timeout ({stall_timeout:g} s" in said
