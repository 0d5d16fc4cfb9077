"""WebDataset: what stands beside an image is no image, and holds its true label."""

import tarfile
from pathlib import Path

import pytest

from batchclf.images.entries import truth_of
from tests.images.archives.common import as_tar, as_zip, look, written

SAMPLES = {
    b"train/0.cls": b"7\n",
    b"train/0.jpg": b"0",
    b"train/0.json": b'{"label": "not this"}',
    b"train/0.txt": b"a caption",
    b"train/1.jpg": b"1",
    b"train/1.json": b'{"x": 1, "cls": 12}',
    b"train/2.seg.png": b"2",
    b"train/2.cls": b"tabby cat",
    b"train/3.jpg": b"3",
    b"train/3.json": b"no json",
    b"train/3.npy": b"\x93NUMPY",
    b"val/0.jpg": b"4",
    b"val/0.cls": b"x" * 5000,
    b"val/README.txt": b"no image has this key",
    b"val/5.webp": b"5",
    b"val/5.json": b'{"label": true, "class": "a:b,%c\xc3\xa9"}',
}


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".zip"])
def test_side_files_are_left_out_and_their_labels_kept(tmp_path: Path, suffix: str) -> None:
    data = (
        as_zip(SAMPLES) if suffix == ".zip" else as_tar(SAMPLES, "w:gz" * (suffix == ".tgz") or "w")
    )
    found = look(written(tmp_path / f"a{suffix}", data))
    assert found.images == [
        (b"train/0.jpg", b"0"),
        (b"train/1.jpg", b"1"),
        (b"train/2.seg.png", b"2"),
        (b"train/3.jpg", b"3"),
        (b"val/0.jpg", b"4"),
        (b"val/README.txt", b"no image has this key"),
        (b"val/5.webp", b"5"),
    ]
    assert found.truths == {
        b"train/0.jpg": b"7",
        b"train/1.jpg": b"12",
        b"train/2.seg.png": b"tabby cat",
        b"val/5.webp": "a:b,%cé".encode(),
    }
    assert found.num_left_out == 9


def test_labels_are_found_wherever_they_stand_in_the_archive(tmp_path: Path) -> None:
    files = {b"%d.jpg" % n: b"%d" % n for n in range(50)}
    files |= {b"%d.cls" % n: b"%d" % (n * n) for n in reversed(range(50))}
    found = look(written(tmp_path / "a.tar", as_tar(files, format_=tarfile.USTAR_FORMAT)))
    assert found.truths == {b"%d.jpg" % n: b"%d" % (n * n) for n in range(50)}
    assert len(found.images) == 50


def test_a_location_without_a_label_has_none() -> None:
    assert truth_of(b"") is None
    assert truth_of(b"range:0,3:00ff::a.tar") is None
    assert truth_of(b"12:range:0,3:00ff:7:a.tar") == b"7"
