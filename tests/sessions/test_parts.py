"""Parts of a batch: what each image is answered, which size is chosen, and what is refused."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.errors import UsageError
from batchclf.results.records import Pixels, Scores
from batchclf.runtime.classifier import OnnxClassifier
from batchclf.runtime.parts import InParts
from batchclf.sessions import part
from batchclf.sessions.part import fastest_part
from tests.conftest import read_records
from tests.engines.common import run_json, summary_of
from tests.tiny import assert_same_records, link_digits, run_here, tiny_model, write_tiny_job

# ---- inferred in parts ---------------------------------------------------------------------------


@dataclass
class _Session:
    """One that answers with the mean colour, for one size of batch or for any."""

    size: int | str
    sizes: list[int] = field(default_factory=list)

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixels", shape=[self.size, 2, 2, 3])]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="scores")]

    def run(self, names: list[str], inputs: dict[str, Pixels]) -> list[Scores]:
        self.sizes.append(len(inputs["pixels"]))
        return [inputs["pixels"].mean(axis=(1, 2), dtype=np.float32)]


@given(
    num_slots=st.integers(1, 20),
    num_rows=st.integers(1, 20),
    size=st.integers(1, 20),
    is_fixed=st.booleans(),
)
def test_each_row_has_its_own_answer_whatever_the_parts(
    num_slots: int, num_rows: int, size: int, *, is_fixed: bool
) -> None:
    num_rows, size = min(num_rows, num_slots), min(size, num_slots)
    pixels_NHWC = np.random.default_rng(5).integers(0, 256, (num_slots, 2, 2, 3), np.uint8)
    session: Any = _Session(size if is_fixed else "n")
    infer = InParts(OnnxClassifier(session, active=None), size, print)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        infer(pixels_NHWC, num_rows), pixels_NHWC[:num_rows].mean(axis=(1, 2), dtype=np.float32)
    )
    assert len(session.sizes) == -(-num_rows // size)
    assert set(session.sizes[: -1 if not is_fixed else None]) <= {size}
    assert is_fixed or sum(session.sizes) == num_rows


def test_a_record_is_the_same_whatever_the_parts_and_the_batches(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 30)
    for number in (0, 4, 5, 17, 29):
        victim = sorted(images.iterdir())[number]
        victim.unlink()
        victim.write_bytes(b"\xff\xd8")
    keys: dict[str, Any] = {"input": str(images), "model": tiny_model(tmp_path), "top_k": 10}
    for number, (batch_size, size) in enumerate([(30, 30), (1, 1), (8, 3), (16, 1), (7, "auto")]):
        name = f"out{number}"
        job = write_tiny_job(
            tmp_path,
            **keys,
            output=str(tmp_path / name),
            batch_size=batch_size,
            runtime={"part": size},
        )
        run_here(job)
        found = read_records(tmp_path / name)
        assert sum(one["status"] == "error" for one in found) == 5
        assert_same_records(found, read_records(tmp_path / "out0"))


def test_a_batch_without_a_good_image_is_not_inferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sorted(link_digits(tmp_path / "images", 96).iterdir())
    listed = tmp_path / "list.txt"
    names = [*map(str, there), *(f"absent/{number}.jpg" for number in range(2000))]
    listed.write_text("\n".join(names))
    job = write_tiny_job(tmp_path, input=str(listed), batch_size=8)
    infer, sizes = OnnxClassifier.__call__, []

    def infer_noted(self: OnnxClassifier, pixels_NHWC: Pixels) -> Scores:
        if threading.current_thread().name.startswith("stream-"):
            sizes.append(len(pixels_NHWC))
        return infer(self, pixels_NHWC)

    monkeypatch.setattr(OnnxClassifier, "__call__", infer_noted)
    run_here(job)
    assert sum(sizes) == 96
    assert summary_of(tmp_path / "out")["num_errors"] == 2000


# ---- the size of a part --------------------------------------------------------------------------


def open_costing(seconds_of: Callable[[int], float], opened: list[int]) -> part.OpenFor:
    """Two streams of calls that take so long each."""

    def open_for(size: int) -> Sequence[Callable[[Any], Any]]:
        opened.append(size)

        def call(pixels_NHWC: Any) -> Any:
            assert len(pixels_NHWC) == size
            time.sleep(seconds_of(size))
            return pixels_NHWC

        return [call, call]

    return open_for


@pytest.mark.parametrize(
    ("seconds_of", "fastest", "tried"),
    [
        (lambda size: 0.04 * size * (1 + 0.1 * size), 1, [1, 2, 4]),
        (lambda size: 0.004 + 0.0001 * size, 16, [1, 2, 4, 8, 16]),
        (lambda size: 0.02 if size == 4 else 0.01 * size, 4, [1, 2, 4, 8, 16]),
    ],
    ids=["the smallest", "the largest", "beyond one that gains nothing"],
)
def test_the_part_is_doubled_as_long_as_that_pays(
    seconds_of: Callable[[int], float],
    fastest: int,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part, "BUDGET_S", 100.0)
    opened: list[int] = []
    found = fastest_part(
        open_costing(seconds_of, opened), np.zeros((16, 1, 1, 3), np.uint8), by_cpu=False
    )
    assert (found.num_images, opened) == (fastest, tried)


def test_a_slow_model_is_not_measured_for_long() -> None:
    opened: list[int] = []
    slow = open_costing(lambda size: 0.3 * size, opened)
    assert fastest_part(slow, np.zeros((16, 1, 1, 3), np.uint8), by_cpu=False).num_images == 1
    assert opened == [1, 2]


def test_a_part_for_which_memory_does_not_suffice_is_not_chosen() -> None:
    opened: list[int] = []

    def seconds_of(size: int) -> float:
        if size > 4:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9")
        return 0.004

    found = fastest_part(
        open_costing(seconds_of, opened), np.zeros((32, 1, 1, 3), np.uint8), by_cpu=False
    )
    assert (found.num_images, opened) == (4, [1, 2, 4, 8])


def test_a_part_is_measured_once_for_a_model(tmp_path: Path) -> None:
    images = str(link_digits(tmp_path / "images", 8))
    model = tiny_model(tmp_path, mean=[float(np.random.default_rng().random())] * 3)
    found: list[dict[str, Any]] = []
    for batch_size in (8, 11, 2, 1):
        job = write_tiny_job(
            tmp_path,
            input=images,
            model=model,
            batch_size=batch_size,
            name=f"{len(found)}.yaml",
            output=str(tmp_path / f"out{len(found)}"),
        )
        run_here(job)
        found.append(run_json(tmp_path / f"out{len(found)}")["part"])
    chosen = ["measured", "remembered", "measured", "whole"]
    assert [one["chosen"] for one in found] == chosen
    assert found[0]["num_images"] == found[1]["num_images"] <= 8
    assert found[2]["num_images"] <= 2
    assert found[3]["num_images"] == 1


@pytest.mark.parametrize(
    ("batch_size", "largest"), [(1, 1), (2, 2), (3, 2), (24, 16), (32, 32), (1000, 32)]
)
def test_no_part_is_tried_for_which_batches_are_too_small(batch_size: int, largest: int) -> None:
    assert part.largest_part(batch_size) == largest


def test_batches_of_few_are_measured_on_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may have been given small batches for the memory that larger ones take."""
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    infer, sizes = OnnxClassifier.__call__, set()

    def infer_noted(self: OnnxClassifier, pixels_NHWC: Pixels) -> Scores:
        sizes.add(len(pixels_NHWC))
        return infer(self, pixels_NHWC)

    monkeypatch.setattr(OnnxClassifier, "__call__", infer_noted)
    monkeypatch.setattr(part, "GAIN", 100.0)  # every larger part pays
    images = str(link_digits(tmp_path / "images", 8))
    run_here(write_tiny_job(tmp_path, input=images, batch_size=5))
    assert run_json(tmp_path / "out")["part"] == {"num_images": 4, "chosen": "measured"}
    assert max(sizes) <= 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 4, "runtime": {"part": 5}}, "runtime.part: found 5.*at most 4"),
        ({"provider": "cuda", "runtime": {"part": 2}}, "provider cuda infers whole batches"),
        (
            {
                "provider": {"name": "openvino", "device_type": "GPU"},
                "runtime": {"part": 2},
            },
            "provider openvino, device_type GPU infers whole batches",
        ),
    ],
)
def test_a_part_that_cannot_be_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_here(write_tiny_job(tmp_path, **keys))


def test_a_part_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    fixed = onnx.load(model["onnx"])
    for end in (fixed.graph.input[0], fixed.graph.output[0]):
        end.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, model["onnx"])
    images = str(link_digits(tmp_path / "images", 8))
    keys: dict[str, Any] = {"input": images, "model": model, "batch_size": 8}
    with pytest.raises(UsageError, match=r"runtime\.part: found 4, but tiny takes 2 at once"):
        run_here(write_tiny_job(tmp_path, **keys, runtime={"part": 4}))
    run_here(write_tiny_job(tmp_path, **keys, runtime={"part": 2}))
    assert summary_of(tmp_path / "out")["part"] == {"num_images": 2, "chosen": "whole"}


def test_a_short_job_has_no_part_larger_than_its_only_batch(tmp_path: Path) -> None:
    images = str(link_digits(tmp_path / "images", 3))
    run_here(write_tiny_job(tmp_path, input=images, batch_size=16, runtime={"part": 8}))
    assert summary_of(tmp_path / "out")["part"] == {"num_images": 3, "chosen": "asked"}
