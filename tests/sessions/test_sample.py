"""What tells one sample of a job's images from another, and when they are decoded."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchclf.models.resolve import ResolvedModel, resolve_model
from batchclf.runtime.classifier import open_reference
from batchclf.sessions import sample
from batchclf.sessions.sample import Sample, sample_input
from batchclf.spec.file import load_job
from batchclf.spec.job import JobSpec
from tests.tiny import DIGITS, write_tiny_job


def prepared(folder: Path, **keys: Any) -> tuple[JobSpec, ResolvedModel]:
    job = load_job(write_tiny_job(folder, **keys))
    model = resolve_model(job.model, batch_size=4, open_reference=open_reference, log=print)
    return job, model


def copy_digits(folder: Path, num_images: int) -> Path:
    """Files of which nobody else makes a link, which would change them."""
    folder.mkdir()
    for path in sorted(DIGITS.rglob("*.jpg"))[:num_images]:
        shutil.copyfile(path, folder / path.name)
    return folder


def digest(folder: Path, **keys: Any) -> str:
    return sample_input(*prepared(folder, **keys)).digest


def test_a_sample_of_files_is_told_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = str(copy_digits(tmp_path / "images", 5))
    job, model = prepared(tmp_path, input=images)
    loads: list[Any] = []
    load = sample.load_sample

    def load_noted(*all_: Any) -> Any:
        loads.append(all_)
        return load(*all_)

    monkeypatch.setattr(sample, "load_sample", load_noted)
    found = sample_input(job, model)
    assert found.digest == digest(tmp_path, input=images)
    assert loads == []
    assert found.pixels is found.pixels
    assert (len(loads), len(found.pixels)) == (1, 5)


def test_another_sample_has_another_digest(tmp_path: Path) -> None:
    images = copy_digits(tmp_path / "images", 5)
    first = digest(tmp_path, input=str(images))
    others = {
        digest(tmp_path, input=str(images), loader={"decode": "fast"}),
        digest(tmp_path, input=str(images), preprocess={"resize": 9}),
        digest(tmp_path, input=str(copy_digits(tmp_path / "more", 6))),
    }
    assert digest(tmp_path, input=str(images), batch_size=3, loader={"workers": 3}) == first
    victim = min(images.iterdir())
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content)
    os.utime(victim, (1, 1))
    others.add(digest(tmp_path, input=str(images)))
    victim.unlink()
    others.add(digest(tmp_path, input=str(images)))
    assert len({*others, first}) == 6


def test_a_sample_whose_files_were_replaced_by_others_as_large_and_as_old_is_another(
    tmp_path: Path,
) -> None:
    images = copy_digits(tmp_path / "images", 3)
    victim = min(images.iterdir())
    content = victim.read_bytes()
    before = victim.stat()
    victim.unlink()
    victim.write_bytes(content)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    first = digest(tmp_path, input=str(images))
    assert digest(tmp_path, input=str(images)) == first
    victim.write_bytes(content[::-1])
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest(tmp_path, input=str(images)) != first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIXELS_RECIPE", 99),
        ("decoder_name", lambda: "simplejpeg 0"),
        ("pillow_version", lambda: "0"),
        ("goes_tall_first", lambda: None),
        ("installed_readers", lambda: {"rawpy": "0"}),
    ],
)
def test_a_sample_that_something_else_decodes_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    images = str(copy_digits(tmp_path / "images", 3))
    first = digest(tmp_path, input=images)
    monkeypatch.setattr(sample, name, value)
    assert digest(tmp_path, input=images) != first


def test_what_lies_far_is_told_by_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model = prepared(tmp_path, input=str(copy_digits(tmp_path / "images", 3)))
    near = sample_input(job, model)
    again = Sample(job, near._loader, list(near._refs))
    monkeypatch.setattr("batchclf.images.store.FileStore.lies_far", lambda *_: True)
    seen = again.digest
    assert "pixels" in vars(again)
    assert seen == sample_input(job, model).digest
