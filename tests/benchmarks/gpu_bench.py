"""What the rows of a visit to a CUDA machine share: models, jobs, sessions, images, commands.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from batchclf.images.prefetch import zeroed_pixels
from batchclf.models.bundle import Bundle
from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.models.variants import needed_variant, resolve_variant
from batchclf.results.records import Pixels, Precision
from batchclf.runtime.classifier import OnnxClassifier, open_classifier, open_reference
from batchclf.sessions.open import Wanted, conversion_of, settle_provider, targets
from batchclf.sessions.sample import sample_input
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec, ProviderSpec
from tests.links import link_images

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Names of rows, and what measures them."""

PRECISIONS: dict[str, tuple[Precision, dict[str, str]]] = {
    "fp32": ("fp32", {}),
    "tf32": ("fp32", {"use_tf32": "1"}),
    "fp16": ("fp16", {}),
}


def log(text: str) -> None:
    """For whoever asks why a row failed."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, eq=False)
class Bench:
    """What the rows share."""

    arguments: argparse.Namespace

    @property
    def work(self) -> Path:
        """A folder that lasts as long as the visit."""
        path: Path = self.arguments.work
        return path

    @property
    def on_cuda(self) -> bool:
        """Whether this is no rehearsal."""
        return bool(self.arguments.provider == "cuda")

    @property
    def precisions(self) -> list[str]:
        """What the provider runs."""
        return list(PRECISIONS) if self.on_cuda else ["fp32"]

    @property
    def ends_at(self) -> float:
        """By the monotonic clock."""
        return float(self.arguments.ends_at)

    def job_file(self, name: str, **keys: Any) -> Path:
        """A job for a model of the visit."""
        given = {Path(folder).name: folder for folder in self.arguments.bundle}
        bundle = given.get(name, str(self.work / "bundles" / name))
        path = self.work / f"{name}-{os.getpid()}.yaml"
        job = {
            "input": str(images(self.arguments.images, self.work, 600)),
            "output": str(self.work / "out"),
            "model": {"bundle": bundle},
            "provider": self.arguments.provider,
            "min_agreement": 0.0,  # random weights tell classes apart by a hair
            **keys,
        }
        path.write_text(json.dumps(job))
        return path

    def job(self, name: str, **keys: Any) -> JobSpec:
        """The same, read."""
        return load_job(self.job_file(name, **keys))

    def resolved(self, model: str) -> ResolvedModel:
        """The model of a job."""
        return resolve_model(
            self.job(model).model, batch_size=64, open_reference=open_reference, log=log
        )

    def bundle(self, model: str, precision: Precision) -> Bundle:
        """The model at a precision."""
        resolved, job = self.resolved(model), self.job(model, precision=precision)
        if needed_variant(job.provider.name, precision) is None:
            return resolved.bundle
        wanted = Wanted(job, resolved, 64, sample_input(job, resolved), log)
        return resolve_variant(resolved.bundle, precision, conversion_of(wanted))

    def open(
        self,
        model: str,
        name: str,
        size: int,
        *,
        bind: bool | None = None,
        path: Path | None = None,
        **options: str,
    ) -> OnnxClassifier:
        """A session at one of PRECISIONS for batches of `size`; `path`: of what is made of it."""
        precision, own = PRECISIONS[name]
        job = self.job(model, precision=precision)
        spec = ProviderSpec.model_validate(
            {"name": self.arguments.provider, "options": {**own, **options}}
        )
        target = targets(spec, job)[0]
        path = path or self.bundle(model, precision).model_path
        return open_classifier(path, target, batch_size=size, bind=bind)


@cache
def images(originals: Path, work: Path, num_images: int) -> Path:
    """A folder of so many JPEG files."""
    folder = work / f"images-{num_images}"
    return folder if folder.exists() else link_images(originals, folder, num_images)


def varied(bench: Bench, model: str, num_images: int) -> Pixels:
    """Different images: the photos shifted, and some of them with their colours turned."""
    resolved = bench.resolved(model)
    photos_NHWC = sample_input(bench.job(model), resolved, size=6).pixels
    made = [
        np.roll(photos_NHWC[number % len(photos_NHWC)], (7 * number, 11 * number), (0, 1))
        ^ np.uint8(255 * (number % 4 == 3))
        for number in range(num_images)
    ]
    return np.ascontiguousarray(made)


def called(
    *command: str, timeout_s: float, without: str | None = None
) -> subprocess.CompletedProcess[str]:
    """A finished command; `without` a variable of the environment.

    Raises:
        OSError: there is none of that name.
        SubprocessError: it takes longer than `timeout_s`.
    """
    environment = {key: value for key, value in os.environ.items() if key != without}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def batchclf(*arguments: str, timeout_s: float, without: str | None = None) -> Row:
    """What a command of ours printed last, and how it ended."""
    command = (sys.executable, "-m", "batchclf", *arguments)
    done = called(*command, timeout_s=timeout_s, without=without)
    lines = done.stdout.splitlines()
    if lines and lines[-1].startswith("{"):
        return {"exit_code": done.returncode, **json.loads(lines[-1])}
    return {"exit_code": done.returncode, "said": done.stderr[-1000:]}


@cache
def settle(bench: Bench) -> None:
    """Prove that the provider works, which loads its libraries."""
    # The probe looks at the provider alone; the model need not be there yet.
    job = {"input": ".", "output": "out", "model": {"name": "resnet50"}}
    settle_provider(JobSpec.model_validate({**job, "provider": bench.arguments.provider}), log)


def allocate(bench: Bench, shape: Sequence[int], is_pinned: bool) -> Pixels:
    """A batch's memory, filled."""
    if is_pinned and bench.on_cuda:
        from batchclf.runtime.cuda import pinned_pixels

        pixels_NHWC = pinned_pixels(shape, 0, log)
    else:
        pixels_NHWC = zeroed_pixels(shape)
    pixels_NHWC[:] = np.random.default_rng(0).integers(0, 256, pixels_NHWC.shape, np.uint8)
    return pixels_NHWC
