"""Locations: whatever they are made of, they come back, and none has a NUL."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.images.ahead import Fetched
from batchclf.images.archives import MODULES, Archives, failure_of, passage, row_of, stretch_of
from batchclf.images.archives.location import File, failed, fields_of, located, parse, truth_of
from batchclf.images.decode import Decoder
from batchclf.images.load import Loader
from batchclf.images.source import Sources, open_source
from batchclf.images.store import FileStore, open_store
from batchclf.results.records import Failure, Preprocess, Stretch, refs_of
from tests.images.archives.common import MAX_BYTES, PHOTOS, as_tar, written

PATHS = st.binary(min_size=1).filter(lambda path: b"\0" not in path)


@given(
    st.sampled_from([b"range", b"row"]),
    st.lists(st.integers(0) | st.binary(min_size=1), min_size=1),
    st.binary(),
    PATHS,
)
def test_a_location_comes_back_as_it_was_made(
    kind: bytes, values: list[int | bytes], truth: bytes, archive: bytes
) -> None:
    location = located(fields_of(kind, *values), File(b"", archive, b"00ff"), truth)
    found = parse(location)
    assert (found.kind, found.version, found.archive) == (kind, b"00ff", archive)
    assert found.fields == tuple(
        b"%d" % value if isinstance(value, int) else value for value in values
    )
    assert truth_of(location) == (truth or None)
    assert b"\0" not in location


@given(st.text(st.characters(codec="utf-8")), PATHS)
def test_a_failure_comes_back_as_it_was_made(message: str, archive: bytes) -> None:
    failure = Failure("corrupt", message)
    assert failure_of(located(failed(failure), File(b"", archive))) == failure


def test_only_what_is_read_in_passing_is_fetched_for_another_process() -> None:
    assert stretch_of(b"range:0,3:::a.tar") is None
    assert stretch_of(b"stream:5,3:00ff::a.tgz") == Stretch(b"00ff:a.tgz", 5, 8)
    assert stretch_of(b"row:5,image:00ff::a.parquet") == Stretch(b"00ff:a.parquet", 5, 6)


@pytest.mark.parametrize("suffix", [".tgz", ".parquet"])
def test_what_was_fetched_is_loaded_without_the_archive(tmp_path: Path, suffix: str) -> None:
    content = as_tar(PHOTOS, "w:gz")
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        from tests.images.archives.test_parquet import as_parquet, structs

        rows = [(content, name.decode()) for name, content in PHOTOS.items()]
        content = as_parquet({"image": structs(rows)})
    path = written(tmp_path / f"a{suffix}", content)
    store = open_store(Sources((open_source(path), open_source(path)), (b"", b"b/")))
    loader = Loader(store, Decoder(Preprocess(8, (8, 8), "bilinear", None, None)))
    with loader.fetched(list(refs_of(store.entries()))) as refs:
        path.unlink()
    passage._cursors.clear()
    fetched = [ref.content for ref in refs if isinstance(ref, Fetched)]
    assert fetched == list(PHOTOS.values()) * 2
    with loader.fetched(refs) as again:
        assert again == refs
    failures = [loader(ref, np.zeros((8, 8, 3), np.uint8)).failure for ref in refs]
    assert {one.code for one in failures if one} == {"unsupported_mode"}, "they are no real photos"


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_an_archive_that_a_list_names_otherwise_is_opened_where_it_lies(
    tmp_path: Path, suffix: str
) -> None:
    content = as_tar(PHOTOS)
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        from tests.images.archives.test_parquet import as_parquet

        content = as_parquet({"image": list(PHOTOS.values())})
    place = written(tmp_path / f"x{suffix}", content)
    store = open_store(open_source(place))
    assert isinstance(store, FileStore)
    file = File(b"named" + suffix.encode(), bytes(place))
    entries = list(Archives(store.files, None, lambda text: None).entries(file))
    assert [entry.path.partition(b"/")[0] for entry in entries] == [file.path] * len(PHOTOS)
    assert [store.read(ref, MAX_BYTES) for ref in refs_of(entries)] == list(PHOTOS.values())
    rows = [file.path + b"/%d" % number for number in range(len(PHOTOS))]
    assert [row_of(entry.location) for entry in entries] == (
        rows if suffix == ".parquet" else [None] * len(PHOTOS)
    )


@pytest.mark.parametrize(("kind", "module"), MODULES.items())
def test_each_kind_of_location_is_read_where_it_is_made(kind: bytes, module: str) -> None:
    assert kind == importlib.import_module(f"batchclf.images.archives.{module}").KIND
