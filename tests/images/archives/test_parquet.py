"""Parquet files as Hugging Face, Spark and Ray write them: a record for each row."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.errors import NoImagesError, UsageError
from batchclf.images.archives import parquet, parquet_file, passage
from batchclf.images.archives.members import Pace, Rows
from batchclf.images.source import Sources, open_source
from batchclf.images.store import open_store
from batchclf.results.records import Failure, ImageRef, refs_of
from tests.conftest import ROOT
from tests.images.archives.common import look, photo, written

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def as_parquet(columns: Mapping[str, Any], group: int = 4, **options: Any) -> bytes:
    """A Parquet file with some columns, in row groups of a few rows."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer, row_group_size=group, **options)
    return buffer.getvalue()


def structs(rows: Sequence[tuple[bytes | None, str | None] | None]) -> Any:
    """A column of images as the library `datasets` writes it."""
    return pa.array([row and {"bytes": row[0], "path": row[1]} for row in rows], STRUCT)


TEN = [(photo(number), f"{number}.jpg") for number in range(10)]
NAMED = [(name.encode(), content) for content, name in TEN]
PLAIN = pa.array([content for content, _ in TEN], pa.binary())
NUMBERED = [(b"%d" % number, content) for number, (content, _) in enumerate(TEN)]


# ---- what others write ---------------------------------------------------------------------------


def test_a_hugging_face_dataset_has_its_own_paths_and_labels(tmp_path: Path) -> None:
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"]}}}}
    table = pa.table({"image": structs(TEN), "label": pa.array(range(10), pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=3)
    found = look(tmp_path / "train-00000-of-00001.parquet")
    assert found.images == NAMED
    assert found.truths == {b"%d.jpg" % number: b"%d" % number for number in range(10)}


def test_a_folder_of_spark_is_all_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    for label, number in (("cat", 0), ("dog", 1)):
        part = folder / f"label={label}"
        part.mkdir(parents=True)
        content = as_parquet({"content": [photo(number)], "length": [700]})
        written(part / "part-00000-x.snappy.parquet", content)
        written(part / ".part-00000-x.snappy.parquet.crc", b"crc")
    (folder / "_temporary").mkdir()
    written(folder / "_temporary" / "part-1.parquet", b"unfinished")
    written(folder / "_SUCCESS", b"")
    found = look(folder)
    assert found.images == [
        (b"label=cat/part-00000-x.snappy.parquet/0", photo(0)),
        (b"label=dog/part-00000-x.snappy.parquet/0", photo(1)),
    ]
    assert found.num_left_out == 4


def test_ray_writes_bytes_and_path_beside_each_other(tmp_path: Path) -> None:
    columns = {"bytes": PLAIN, "path": [f"/data/{name}" for _, name in TEN]}
    file = written(tmp_path / "a.parquet", as_parquet(columns))
    assert look(file).images == NUMBERED
    named = look(file, Rows(id="path"))
    assert named.images == [(b"/data/" + name, content) for name, content in NAMED]


@pytest.mark.parametrize(
    "type_", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(20)], ids=str
)
def test_binary_columns_of_every_type_hold_images(tmp_path: Path, type_: Any) -> None:
    contents = [photo(number)[:3] + b"%017d" % number for number in range(10)]
    options = {"store_schema": True, "use_dictionary": False}
    try:
        file = as_parquet({"photo": pa.array(contents, type_)}, **options)
    except pa.ArrowNotImplementedError as error:  # an older pyarrow
        pytest.skip(str(error))
    assert look(written(tmp_path / "a.parquet", file)).images == [
        (b"%d" % number, content) for number, content in enumerate(contents)
    ]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_compression_and_page_version_is_read(
    tmp_path: Path, compression: str, version: str
) -> None:
    options: dict[str, Any] = {"compression": compression, "data_page_version": version}
    file = as_parquet({"image": structs(TEN)}, **options)
    assert look(written(tmp_path / "a.parquet", file)).images == NAMED


# ---- which column --------------------------------------------------------------------------------


TENSOR = pa.field(
    "image", pa.list_(pa.uint8()), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"}
)
REFUSALS: dict[str, tuple[Any, Rows, str]] = {
    "several": (
        pa.table({"image": structs(TEN), "small": PLAIN}),
        Rows(),
        "several columns hold images: image, small; choose one",
    ),
    "none": (
        pa.table({"x": [1], "y": ["text"]}),
        Rows(),
        r"no column holds images .*found x \(int64\), y \(string\)",
    ),
    "a wrong column": (
        pa.table({"image": structs(TEN)}),
        Rows(column="imgae"),
        r"there is no column 'imgae'; did you mean 'image'\? \(found: image\)",
    ),
    "a wrong id": (
        pa.table({"image": structs(TEN), "key": ["a"] * 10}),
        Rows(id="keys"),
        "there is no column 'keys'; did you mean 'key'",
    ),
    "text": (
        pa.table({"image": ["aGVsbG8="]}),
        Rows(column="image"),
        "'image' holds string, not bytes",
    ),
    "a tensor of Ray": (
        pa.table([pa.array([[1, 2]], pa.list_(pa.uint8()))], schema=pa.schema([TENSOR])),
        Rows(),
        "'image' holds pixels, not encoded images",
    ),
    "a tensor as a struct": (
        pa.table({"image": [{"data": [1, 2], "shape": [2]}]}),
        Rows(column="image"),
        "'image' holds pixels, not encoded images",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_column_that_is_not_clear_is_refused(tmp_path: Path, case: str) -> None:
    table, rows, message = REFUSALS[case]
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=message):
        look(tmp_path / "a.parquet", rows)


def test_among_binary_columns_the_one_with_images_is_taken(tmp_path: Path) -> None:
    audio = structs([(b"RIFF", "1.wav")] * 10)
    hashes = pa.array([None, *[b"\x01\x02"] * 9], pa.binary())
    images = pa.array([None, *[content for content, _ in TEN[1:]]], pa.binary())
    columns = {"audio": audio, "hash": hashes, "photo": images}
    file = written(tmp_path / "a.parquet", as_parquet(columns))
    assert look(file).images == [(b"0", b""), *NUMBERED[1:]]
    assert look(file, Rows(column="audio")).images[0] == (b"1.wav", b"RIFF")


def test_a_file_without_the_column_of_the_others_is_one_record(tmp_path: Path) -> None:
    folder = tmp_path / "all.parquet"
    folder.mkdir()
    written(folder / "0.parquet", as_parquet({"image": structs(TEN[:1])}))
    written(folder / "1.parquet", as_parquet({"other": PLAIN}))
    found = look(folder)
    assert found.images == [(b"0.jpg", photo(0)), (b"1.parquet", "damaged_archive")]
    assert "no column 'image'" in found.messages[b"1.parquet"]


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", as_parquet({"image": structs(TEN)}))
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from tests.images.archives.common import look\n"
        "from pathlib import Path\n"
        f"look(Path({str(file)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "UsageError" in done.stderr
    assert "pip install 'batchclf[parquet]'" in done.stderr


# ---- rows without an image, or with the path of another ------------------------------------------


def test_rows_without_bytes_are_empty_or_say_what_they_name(tmp_path: Path) -> None:
    rows = [None, (None, None), (None, "/nfs/2.jpg"), (b"", "3.jpg"), (photo(4), None)]
    found = look(written(tmp_path / "a.parquet", as_parquet({"image": structs(rows)})))
    assert found.images == [
        (b"0", b""),
        (b"1", b""),
        (b"/nfs/2.jpg", "not_found"),
        (b"3.jpg", b""),
        (b"4", photo(4)),
    ]
    assert "/nfs/2.jpg" in found.messages[b"/nfs/2.jpg"]


def test_a_path_that_another_row_has_costs_no_image(tmp_path: Path) -> None:
    folder = tmp_path / "all.parquet"
    folder.mkdir()
    for number in range(2):
        rows = [(photo(10 * number + row), f"{row % 2}.jpg") for row in range(3)]
        written(folder / f"{number}.parquet", as_parquet({"image": structs(rows)}))
    found = look(folder)
    assert found.images == [
        (b"0.jpg", photo(0)),
        (b"1.jpg", photo(1)),
        (b"0.parquet/2", photo(2)),
        (b"1.parquet/0", photo(10)),
        (b"1.parquet/1", photo(11)),
        (b"1.parquet/2", photo(12)),
    ]
    assert found.log == [
        "input: 4 rows have the path of another row, so their records are named for their file "
        "and row"
    ]


@pytest.mark.parametrize("several", [False, True])
def test_rows_with_listed_paths_are_added_to_a_listing_by_their_files_and_rows(
    tmp_path: Path, several: bool
) -> None:
    def rows(*named: tuple[int, str]) -> bytes:
        return as_parquet({"image": structs([(photo(number), name) for number, name in named])})

    folder = tmp_path / "all.parquet"
    folder.mkdir()
    written(folder / "b.parquet", rows((0, "x"), (1, "y"), (2, "y")))
    source = open_source(folder)
    store = open_store(Sources((source,), (b"in/",)) if several else source)
    before = list(store.entries())
    written(folder / "a.parquet", rows((3, "x"), (4, "z")))
    log: list[str] = []
    after = list(store.entries(log.append).after(before))
    assert after[:3] == before
    names = [b"x", b"y", b"b.parquet/2", b"a.parquet/0", b"z"]
    assert [one.path for one in after] == [b"in/" * several + name for name in names]
    found = [store.read(ref, 2**20) for ref in refs_of(after)]
    assert found == [photo(number) for number in range(5)]
    assert [line.split(" have")[0] for line in log] == ["input: 1 rows"]
    assert list(store.entries().after(after)) == after


def test_ids_are_numbers_or_names_and_rows_where_there_is_none(tmp_path: Path) -> None:
    columns = {"image": structs(TEN[:4]), "id": pa.array([7, None, 8, 7])}
    file = written(tmp_path / "a.parquet", as_parquet(columns))
    assert look(file, Rows(id="id")).paths == [b"7", b"1", b"8", b"3"]


IDS: dict[str, Any] = {
    "float": pa.array([0.5, 1.5]),
    "date": pa.array([0, 1], pa.date32()),
    "bool": pa.array([True, False]),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
    "list": pa.array([["a"], ["b"]]),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_column_of_ids_that_are_neither_text_nor_whole_numbers_is_refused(
    tmp_path: Path, ids: Any
) -> None:
    file = written(tmp_path / "a.parquet", as_parquet({"image": structs(TEN[:2]), "id": ids}))
    said = r"a\.parquet: the column 'id' \(id\) holds .*, neither text nor whole numbers"
    with pytest.raises(UsageError, match=said):
        look(file, Rows(id="id"))


TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary()]


@pytest.mark.parametrize("type_", [*TEXTS, pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_ids_may_be_text_of_any_kind(tmp_path: Path, type_: Any) -> None:
    columns = {"image": structs(TEN[:2]), "id": pa.array(["x", "y"]).cast(type_)}
    file = written(tmp_path / "a.parquet", as_parquet(columns))
    assert look(file, Rows(id="id")).paths == [b"x", b"y"]


def test_values_larger_than_allowed_are_refused(tmp_path: Path) -> None:
    file = as_parquet({"image": structs([(photo(1, 5000), "1.jpg"), (photo(2), "2.jpg")])})
    found = look(written(tmp_path / "a.parquet", file), max_bytes=1000)
    assert found.images == [(b"1.jpg", "too_large_bytes"), (b"2.jpg", photo(2))]


def test_a_label_that_is_not_clear_is_no_truth(tmp_path: Path) -> None:
    columns = {"image": structs(TEN), "label": range(10), "target": range(10)}
    file = written(
        tmp_path / "a.parquet",
        as_parquet({k: pa.array(v) if k != "image" else v for k, v in columns.items()}),
    )
    assert look(file).truths == {}
    columns = {"image": structs(TEN), "label": [0.5] * 10, "cls": ["x"] * 10}
    assert set(look(written(file, as_parquet(columns))).truths.values()) == {b"x"}


# ---- memory --------------------------------------------------------------------------------------

BIG = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
noise = np.random.default_rng(0).bytes(2**20)
rows = [b"\\xff\\xd8\\xff" + noise[n:] + noise[:n] for n in range(256)]
table = pa.table({"image": pa.array(rows, pa.binary())})
options = {"row_group_size": 256, "use_dictionary": False, "write_batch_size": 1}
pq.write_table(table, sys.argv[1], **options)
"""
BOMB = """
import sys
import pyarrow as pa, pyarrow.parquet as pq
value = {"bytes": b"\\xff\\xd8\\xff" + bytes(2**22), "path": "x" * 2**20}
type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
table = pa.table({"image": pa.chunked_array([pa.array([value], type_)] * 300)})
pq.write_table(table, sys.argv[1], dictionary_pagesize_limit=2**24)
"""
READ = """
import sys
from pathlib import Path
from batchclf.images.source import Sources, open_source
from batchclf.images.store import open_store
from batchclf.results.records import refs_of
from batchclf.system.machine import peak_rss_mb
import pyarrow.parquet
store = open_store(open_source(Path(sys.argv[1])))
before = peak_rss_mb()
num_bytes = sum(len(store.read(ref, 2**30)) for ref in refs_of(store.entries()))
print(num_bytes >> 20, round(peak_rss_mb() - before))
"""


def test_a_large_row_group_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    subprocess.run([sys.executable, "-c", BIG, file], check=True)
    done = subprocess.run(
        [sys.executable, "-c", READ, file], cwd=ROOT, check=True, capture_output=True, text=True
    )
    num_mb, grown_mb = map(int, done.stdout.split())
    assert num_mb == 256
    assert grown_mb < 100


def test_values_that_a_file_has_once_for_many_rows_are_not_in_memory_for_all(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.parquet"
    subprocess.run([sys.executable, "-c", BOMB, file], check=True)
    assert file.stat().st_size < 2**20
    done = subprocess.run(
        [sys.executable, "-c", READ, file], cwd=ROOT, check=True, capture_output=True, text=True
    )
    num_mb, grown_mb = map(int, done.stdout.split())
    assert num_mb == 1200
    assert grown_mb < 200


LARGE = [
    photo(number, 100_000) + np.random.default_rng(number).bytes(50_000) for number in range(20)
]
PREFIXES = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
AT_ONCE: dict[str, tuple[Sequence[bytes], Mapping[str, Any], Pace, list[int]]] = {
    "small": ([photo(number) for number in range(20)], {}, "many", [16]),
    "large": (LARGE, {}, "many", [6]),
    "larger": ([one * 20 for one in LARGE], {"use_dictionary": False}, "many", [1]),
    "shared": ([LARGE[0] * 8] * 20, {"dictionary_pagesize_limit": 2**24}, "many", [16, 1]),
    "prefixes": (LARGE, PREFIXES, "many", [6]),
    "suspected": (LARGE, {}, "one", [1]),
    "tried": (LARGE, {}, "tried", [1]),
}
"""Values, how they are written, the pace, and how many are read at once."""


@pytest.mark.parametrize("case", AT_ONCE)
def test_as_many_rows_are_read_at_once_as_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    values, options, pace, expected = AT_ONCE[case]
    numbers = []
    batches = parquet_file.batches

    def noted(file: Any, columns: Sequence[str], number: int, group: int | None) -> Iterator[Any]:
        numbers.append(number)
        return batches(file, columns, number, group)

    monkeypatch.setattr(parquet, "batches", noted)
    data = as_parquet({"image": pa.array(values, pa.binary())}, 20, **options)
    store = open_store(open_source(written(tmp_path / "a.parquet", data)))
    found = [store.read(ref, 2**30, pace=pace) for ref in refs_of(store.entries())]
    assert found == values
    assert numbers == expected


def test_to_go_on_in_the_middle_only_one_row_group_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    batches = parquet_file.batches

    def watched(file: Any, columns: Sequence[str], num: int, group: int | None = None) -> Any:
        if group is not None:
            read.append(group)
        return batches(file, columns, num, group)

    monkeypatch.setattr(parquet, "batches", watched)
    rows = [(photo(number), None) for number in range(100)]
    file = written(tmp_path / "a.parquet", as_parquet({"image": structs(rows)}, group=10))
    store = open_store(open_source(file))
    location = list(store.entries())[57].location
    assert store.read(ImageRef(57, b"", location), 2**20) == photo(57)
    assert read == [5]


# ---- damaged -------------------------------------------------------------------------------------


FOOTERS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-20],
    "empty": lambda data: b"",
    "a page of HTML": lambda data: b"<html>404</html>" * 10,
    "a footer of noise": lambda data: data[:-200] + bytes(range(192)) + data[-8:],
    "a length beyond the file": lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],
}


@pytest.mark.parametrize("damage", FOOTERS)
def test_a_file_that_cannot_be_listed_is_one_record(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "all.parquet"
    folder.mkdir()
    written(folder / "0.parquet", FOOTERS[damage](as_parquet({"image": structs(TEN)})))
    written(folder / "1.parquet", as_parquet({"image": structs(TEN)}))
    assert look(folder).images == [(b"0.parquet", "damaged_archive"), *NAMED]
    with pytest.raises(NoImagesError, match=r"found 0 images \(1 members.*0\.parquet: no Parquet"):
        open_store(open_source(folder / "0.parquet")).require_images()


def test_of_a_damaged_page_the_rows_before_it_and_other_groups_are_read(tmp_path: Path) -> None:
    options = {"compression": "snappy", "data_page_size": 600, "use_dictionary": False}
    data = bytearray(as_parquet({"image": PLAIN}, group=5, write_batch_size=1, **options))
    at = data.index(b"7,7,")  # in a page of the second group
    data[at - 20 : at + 20] = b"\xff" * 40
    found = look(written(tmp_path / "a.parquet", bytes(data)))
    assert found.images[:7] == NUMBERED[:7]
    assert dict(found.images[7:]) == {b"7": "corrupt", b"8": "corrupt", b"9": "corrupt"}
    passage._cursors.clear()
    at = data.index(b"2,2,")
    data[at - 20 : at + 20] = b"\xff" * 40
    codes = [
        c if isinstance(c, str) else ""
        for _, c in look(written(tmp_path / "a.parquet", bytes(data))).images
    ]
    assert codes == ["", "", *["corrupt"] * 3, "", "", *["corrupt"] * 3]


def test_a_file_that_shrank_since_it_was_listed_is_told_of(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", as_parquet({"image": structs(TEN)}))
    store = open_store(open_source(file))
    entries = list(store.entries())
    written(file, as_parquet({"image": structs(TEN[:4])}))
    passage._cursors.clear()
    found = store.read(ImageRef(9, *entries[9]), 2**20)
    assert isinstance(found, Failure)
    assert (found.code, "written to after it" in found.message) == ("changed", True)
    file.unlink()
    passage._cursors.clear()
    found = store.read(ImageRef(9, *entries[9]), 2**20)
    assert isinstance(found, Failure)
    assert found.code == "vanished"


@settings(max_examples=50)
@given(
    st.lists(
        st.none() | st.tuples(st.none() | st.binary(max_size=500), st.none() | st.text()),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 7),
    st.booleans(),
)
def test_any_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[bytes | None, str | None] | None],
    group: int,
    is_dictionary: bool,
) -> None:
    data = as_parquet({"image": structs(rows)}, group, use_dictionary=is_dictionary)
    found = look(written(tmp_path_factory.mktemp("parquet") / "a.parquet", data))
    expected = [
        (row[0] if row[0] is not None else "not_found" if row[1] is not None else b"")
        if row
        else b""
        for row in rows
    ]
    assert [content for _, content in found.images] == expected
    assert len({path for path in found.paths if not re.fullmatch(rb"\d+", path)}) == len(
        [path for path in found.paths if not re.fullmatch(rb"\d+", path)]
    )


def test_files_that_were_read_to_their_end_keep_no_row_group(tmp_path: Path) -> None:
    """Which has its values twice: as it was inflated, and as a dictionary."""
    size = 2**20
    for number in range(3):
        rows = pa.array([bytes([number]) * size, bytes([number + 1]) * size], pa.binary())
        pq.write_table(pa.table({"image": rows}), tmp_path / f"{number}.parquet")
    passage._cursors.clear()
    before = pa.total_allocated_bytes()
    assert len(look(tmp_path, Rows()).images) == 6
    assert len(passage._cursors) == 3
    assert pa.total_allocated_bytes() - before < 3 * 2.5 * size, "the rows that are kept"
