"""Archives that were written to after they were listed: no image is given for another one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from batchclf.errors import ResumeRefused
from batchclf.images import remote
from batchclf.images.source import Sources, open_source, source_of
from batchclf.images.store import Store, open_store
from batchclf.results.records import Failure, refs_of
from batchclf.spec.file import load_job
from tests.images.archives.common import MAX_BYTES, PHOTOS, as_tar, as_zip, written
from tests.proxy import NAME, Bucket
from tests.tiny import write_tiny_job

SWAPPED = dict(zip(PHOTOS, reversed(list(PHOTOS.values())), strict=True))
"""The same names and sizes."""


def as_rows(files: Mapping[bytes, bytes]) -> bytes:
    """A Parquet file of some files."""
    pytest.importorskip("pyarrow")
    from tests.images.archives.test_parquet import as_parquet, structs

    return as_parquet({"image": structs([(data, name.decode()) for name, data in files.items()])})


def as_tgz(files: Mapping[bytes, bytes]) -> bytes:
    """A compressed tar archive."""
    return as_tar(files, "w:gz")


WRITERS: Mapping[str, Callable[[Mapping[bytes, bytes]], bytes]] = {
    "a.tar": as_tar,
    "a.zip": as_zip,
    "a.tgz": as_tgz,
    "a.parquet": as_rows,
}


def read_all(store: Store) -> Callable[[], list[bytes | str]]:
    """What reads all that is listed now: contents, and codes of failures."""
    refs = list(refs_of(store.entries()))

    def read() -> list[bytes | str]:
        found = [store.read(ref, MAX_BYTES) for ref in refs]
        return [one.code if isinstance(one, Failure) else one for one in found]

    return read


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_no_member_of_a_changed_archive_is_read(tmp_path: Path, name: str, in_place: bool) -> None:
    path = written(tmp_path / name, WRITERS[name](PHOTOS))
    store = open_store(Sources((open_source(path),), (b"",)))
    before = read_all(store)
    assert before() == list(PHOTOS.values())
    if not in_place:
        path.unlink()
    written(path, WRITERS[name](SWAPPED))
    os.utime(path, ns=(0, 0))
    assert before() == ["changed"] * len(PHOTOS)
    assert read_all(store)() == list(SWAPPED.values())


@pytest.mark.parametrize("name", WRITERS)
def test_a_changed_archive_is_refused_before_its_images_are_asked_for(
    tmp_path: Path, name: str
) -> None:
    path = written(tmp_path / name, WRITERS[name](PHOTOS))
    store = open_store(Sources((open_source(path),), (b"",)))
    entries = list(store.entries())
    store.require_unchanged(entries)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ResumeRefused, match=f"{name} was written to after it was listed.*overwr"):
        store.require_unchanged(entries)
    path.unlink()
    store.require_unchanged(entries)


# ---- in a bucket ---------------------------------------------------------------------------------


def test_no_member_of_a_changed_archive_in_a_bucket_is_read(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("changing/a.tar", as_tar(PHOTOS))
    source = source_of(load_job(write_tiny_job(tmp_path, input=f"s3://{NAME}/changing/a.tar")))
    store = open_store(source)
    before = read_all(store)
    entries = list(store.entries())
    assert before() == list(PHOTOS.values())
    bucket.put("changing/a.tar", as_tar(SWAPPED))
    assert before() == ["changed"] * len(PHOTOS), "as this process read the other one"
    remote._versions.cache_clear()
    assert before() == ["changed"] * len(PHOTOS), "as another process listed the other one"
    with pytest.raises(ResumeRefused, match=r"a\.tar was written to after it was listed"):
        store.require_unchanged(entries)
    assert read_all(store)() == list(SWAPPED.values())
