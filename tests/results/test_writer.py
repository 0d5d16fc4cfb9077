"""Records to lines and back, what a cut or damaged file resumes from, the files of a run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.errors import EnvironmentFailed, ResumeRefused
from batchclf.results.files import RunFiles, read_lines, temporary_of
from batchclf.results.identity import Extent
from batchclf.results.lines import Done, decode_record, encode, encode_record, find_done
from batchclf.results.listing import Listing, open_listing
from batchclf.results.lock import only_writer
from batchclf.results.records import Failure, ImageRef, Prediction, Record, Shard
from batchclf.results.run_record import read_run, write_run
from batchclf.results.writer import (
    RecordWriter,
    cut_surplus,
    discard,
    failed_refs,
    remove_leftovers,
    replace_failed,
    sync_records,
)
from tests.conftest import ROOT
from tests.results.common import IDENTITY, a_record
from tests.tiny import name_in

ODD_NAMES = (
    b"caf\xe9.jpg",
    b"two\nlines.jpg",
    b'"quotes".jpg',
    b"back\\slash.jpg",
    b"tab\t.jpg",
    b"\x01\x7f.jpg",
    "line\u2028separator.jpg".encode(),
    "\u202egpj.exe".encode(),
    "cafe\u0301.jpg".encode(),
    "smile \U0001f600.jpg".encode(),
    b"-rf.jpg",
    b"=cmd|' /C calc'!A0.jpg",
    b"<script>alert(1)</script>.jpg",
    b"a" * 255,
    b"\xff",
    b"\xed\xa0\x80.jpg",  # a surrogate, written as UTF-8 may not be
)
NAMES = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"_"))
NAMES |= st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(
    str.encode
)
NAMES |= st.sampled_from(ODD_NAMES)
SCORES = st.floats(0, 1, width=32)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PREDICTIONS = st.lists(st.builds(Prediction, TEXTS, st.integers(0, 10**6), SCORES), max_size=5)
OUTCOMES = PREDICTIONS.map(tuple) | st.builds(Failure, st.sampled_from(["truncated", "x"]), TEXTS)


def record_of(path: bytes, outcome: tuple[Prediction, ...] | Failure) -> Record:
    return Record(ImageRef(0, path), outcome)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


# ---- lines ---------------------------------------------------------------------------------------


@given(path=NAMES, outcome=OUTCOMES, warnings=st.lists(TEXTS, max_size=2).map(tuple))
def test_a_record_is_one_line_of_json_that_gives_everything_back(
    path: bytes, outcome: tuple[Prediction, ...] | Failure, warnings: tuple[str, ...]
) -> None:
    line = encode_record(Record(ImageRef(7, path), outcome, warnings))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    parsed = json.loads(line)
    assert name_in(parsed) == path
    assert tuple(parsed.get("warnings", ())) == warnings
    if isinstance(outcome, Failure):
        assert parsed["status"] == "error"
        assert parsed["error"] == {"code": outcome.code, "message": outcome.message}
        assert "predictions" not in parsed
    else:
        assert parsed["status"] == "ok"
        assert "error" not in parsed
        found = [(one["label"], one["index"]) for one in parsed["predictions"]]
        assert found == [(one.label, one.index) for one in outcome]
        for one, expected in zip(parsed["predictions"], outcome, strict=True):
            assert one["score"] == pytest.approx(expected.score, abs=1e-6)


@given(path=NAMES, outcome=OUTCOMES, warnings=st.lists(TEXTS, max_size=2).map(tuple))
def test_a_line_is_read_back_as_the_record_of_which_it_is_the_line(
    path: bytes, outcome: tuple[Prediction, ...] | Failure, warnings: tuple[str, ...]
) -> None:
    line = encode_record(Record(ImageRef(7, path), outcome, warnings))
    found = decode_record(line, 7)
    assert found.ref == ImageRef(7, path)
    assert encode_record(found) == line


@given(NAMES)
def test_only_names_that_are_not_utf8_carry_base64(path: bytes) -> None:
    parsed = json.loads(encode_record(record_of(path, ())))
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        assert "path_b64" in parsed
    else:
        assert "path_b64" not in parsed
        assert parsed["path"] == path.decode("utf-8")


def test_the_keys_of_a_line_stand_in_the_order_of_the_contract() -> None:
    good = encode_record(record_of(b"cats/1.jpg", (Prediction("tabby", 281, 0.78612345),)))
    bad = encode_record(record_of(b"bad.jpg", Failure("truncated", "ends after 1,024 bytes")))
    assert good == (
        b'{"path":"cats/1.jpg","status":"ok",'
        b'"predictions":[{"label":"tabby","index":281,"score":0.786123}]}\n'
    )
    assert bad == (
        b'{"path":"bad.jpg","status":"error",'
        b'"error":{"code":"truncated","message":"ends after 1,024 bytes"}}\n'
    )


# ---- what is done --------------------------------------------------------------------------------


def done_in(data: bytes, paths: list[bytes]) -> Done:
    with tempfile.TemporaryDirectory() as folder:
        predictions = Path(folder) / "predictions.jsonl"
        predictions.write_bytes(data)
        return find_done(predictions, paths)


@given(entries=st.lists(st.tuples(NAMES, OUTCOMES), max_size=6), data=st.data())
def test_a_file_cut_anywhere_is_done_up_to_its_last_whole_line(
    entries: list[tuple[bytes, Any]], data: st.DataObject
) -> None:
    lines = [encode_record(record_of(path, outcome)) for path, outcome in entries]
    whole = b"".join(lines)
    end = data.draw(st.integers(0, len(whole)))
    done = done_in(whole[:end], [path for path, _ in entries])
    kept = 0
    while kept < len(lines) and len(b"".join(lines[: kept + 1])) <= end:
        kept += 1
    assert done.num_bytes == len(b"".join(lines[:kept]))
    assert done.num_images == kept
    failures = [outcome for _, outcome in entries[:kept] if isinstance(outcome, Failure)]
    assert done.errors_by_code.total() == len(failures)
    assert done.num_ok == kept - len(failures)


@given(
    entries=st.lists(st.tuples(NAMES, OUTCOMES), min_size=1, max_size=4),
    position=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_a_changed_byte_anywhere_is_never_an_error_and_never_hides_a_line(
    entries: list[tuple[bytes, Any]], position: float, value: int
) -> None:
    lines = [encode_record(record_of(path, outcome)) for path, outcome in entries]
    whole = bytearray(b"".join(lines))
    offset = int(position * len(whole))
    whole[offset] = value
    done = done_in(bytes(whole), [path for path, _ in entries])
    assert done.num_images <= len(lines)
    assert done.num_bytes in {len(b"".join(lines[:count])) for count in range(len(lines) + 1)}
    assert done.num_bytes == len(b"".join(lines[: done.num_images]))


GOOD = encode_record(record_of(b"a.jpg", (Prediction("cat", 0, 0.5),)))


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        GOOD.replace(b"a.jpg", b"b.jpg")[:-1],
        GOOD.replace(b"a.jpg", b"b.jpg")[:20],
        b"\n",
        b"\0" * 512,
        b"\0" * 512 + b"\n",
        b'{"path":"b.jpg","status":"ok","predictions":[{"label":"caf\xc3',
        b"garbage\n",
        b"[1,2]\n",
        b"null\n",
        b"{}\n",
        b'{"path":"b.jpg"}\n',
        b'{"path":"b.jpg","status":"ok"}\n',
        b'{"path":"b.jpg","status":"error","error":{}}\n',
        b'{"path":"b.jpg","status":"error","error":"truncated"}\n',
        b'{"path":"c.jpg","status":"ok","predictions":[]}\n',
        b'{"path":1,"status":"ok","predictions":[]}\n',
        b'{"path":"x","path_b64":"abc","status":"ok","predictions":[]}\n',
        b'{"path":"x","path_b64":1,"status":"ok","predictions":[]}\n',
        b'{"path":"\\ud800","path_b64":null,"status":"ok","predictions":[]}\n',
        GOOD,
    ],
)
def test_a_tail_that_is_no_record_of_the_next_image_is_not_counted(tail: bytes) -> None:
    done = done_in(GOOD + tail, [b"a.jpg", b"b.jpg"])
    assert (done.num_images, done.num_bytes) == (1, len(GOOD))


def test_more_records_than_the_listing_has_are_not_counted() -> None:
    assert done_in(GOOD + GOOD, [b"a.jpg"]).num_bytes == len(GOOD)


def test_without_a_file_nothing_is_done(tmp_path: Path) -> None:
    assert find_done(tmp_path / "predictions.jsonl", [b"a.jpg"]) == Done()


# ---- writing -------------------------------------------------------------------------------------


def test_a_writer_cuts_off_what_is_not_done_and_goes_on_there(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(GOOD + b"torn")
    with RecordWriter(path, len(GOOD)) as records:
        records.write(encode([record_of(b"b.jpg", ()), record_of(b"c.jpg", ())]))
        records.write(encode([]))
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["a.jpg", "b.jpg", "c.jpg"]


def test_records_are_in_the_file_as_soon_as_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    with RecordWriter(path, 0) as records:
        records.write(encode([record_of(b"a.jpg", ())]))
        assert path.read_bytes() == encode_record(record_of(b"a.jpg", ()))


def test_the_time_of_every_write_and_sync_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    clock = iter(range(100))
    with RecordWriter(tmp_path / "predictions.jsonl", 0, told.append) as records:
        monkeypatch.setattr("batchclf.results.writer.time.perf_counter", clock.__next__)
        records.write(encode([record_of(b"a.jpg", ())]))
        records.sync()
        assert told == [1, 1]
    assert told == [1, 1, 1], "the last sync"


def test_a_write_that_the_system_takes_in_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "predictions.jsonl"
    write = os.write
    with RecordWriter(path, 0) as records:
        monkeypatch.setattr(os, "write", lambda to, data: write(to, bytes(data[:7])))
        records.write(encode([record_of(b"a.jpg", ()), record_of(b"b.jpg", ())]))
    assert path.read_bytes() == b"".join(
        encode_record(record_of(name, ())) for name in (b"a.jpg", b"b.jpg")
    )


def test_new_records_take_the_places_of_the_failed_ones(files: RunFiles) -> None:
    names = [b"a.jpg", b"caf\xe9.jpg", b"c.jpg", b"d.jpg"]
    refs = [ImageRef(index, name) for index, name in enumerate(names)]
    bad = Failure("io_error", "reading failed")
    other = Failure("truncated", "ends after 9 bytes")
    outcomes: list[tuple[Prediction, ...] | Failure] = [(), bad, other, bad]
    old = [Record(ref, outcome) for ref, outcome in zip(refs, outcomes, strict=True)]
    with RecordWriter(files.predictions, 0) as records:
        records.write(encode(old))
    failed = list(failed_refs(files.predictions, refs, {"io_error"}))
    assert failed == [refs[1], refs[3]]
    new = [Record(ref, (Prediction("cat", 0, 1.0),)) for ref in failed]
    with RecordWriter(files.retry, 0) as records:
        records.write(encode(new))
    replace_failed(files, {"io_error"}, 4)
    expected = [old[0], new[0], old[2], new[1]]
    assert files.predictions.read_bytes() == b"".join(map(encode_record, expected))
    assert os.listdir(files.folder) == ["predictions.jsonl"]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_output_that_fails_ends_with_exit_code_5_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def write_while_broken(path: Path, call: str) -> None:
        with RecordWriter(path, 0) as records:
            monkeypatch.setattr(os, call, full)
            records.write(encode([record_of(b"a.jpg", ())]))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    path = tmp_path / "predictions.jsonl"
    with pytest.raises(EnvironmentFailed, match="No space left") as failed:
        write_while_broken(path, call)
    assert failed.value.exit_code == 5
    assert str(path) in str(failed.value)


def test_a_record_file_that_cannot_be_opened_is_the_environments_failure(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.mkdir()
    with pytest.raises(EnvironmentFailed, match=r"predictions\.jsonl: cannot be written: Is a dir"):
        RecordWriter(path)
    with pytest.raises(EnvironmentFailed, match=r"predictions\.jsonl: cannot be written: Is a dir"):
        sync_records(path, 0)


REF = ImageRef(0, b"a.jpg")
READERS: dict[str, Callable[[RunFiles], object]] = {
    "open_listing": open_listing,
    "paths": lambda files: list(Listing(files.listing, Extent(1, ""), 0, IDENTITY).paths()),
    "find_done": lambda files: find_done(files.predictions, [b"a.jpg"]),
    "failed_refs": lambda files: list(failed_refs(files.predictions, [REF], {"io_error"})),
    "read_lines": lambda files: list(read_lines(files.stats)),
    "read_run": read_run,
}


@pytest.mark.parametrize("reader", READERS)
def test_an_output_that_cannot_be_read_ends_with_exit_code_5_and_names_the_file(
    files: RunFiles, reader: str
) -> None:
    for path in (files.listing, files.predictions, files.stats, files.run):
        path.symlink_to("/proc/self/mem")  # opens, and reading its beginning is EIO
    with pytest.raises(
        EnvironmentFailed, match=r"^output: .*: cannot be read: Input/output error; .* to resume$"
    ) as failed:
        READERS[reader](files)
    assert failed.value.exit_code == 5


def test_what_stands_behind_is_cut_off_once(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    assert cut_surplus(path, 0) == 0
    path.write_bytes(b"kept\nsurplus\n")
    assert cut_surplus(path, 5) == 8
    assert path.read_bytes() == b"kept\n"
    os.utime(path, ns=(0, 0))
    assert cut_surplus(path, 5) == 0
    assert path.stat().st_mtime_ns == 0


def test_a_surplus_that_cannot_be_cut_off_ends_with_exit_code_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"kept\nsurplus\n")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentFailed, match=r"predictions\.jsonl: cannot be written"):
        cut_surplus(path, 5)


def test_run_json_is_replaced_whole_and_leaves_nothing_beside_it(files: RunFiles) -> None:
    write_run(files, a_record())
    write_run(files, a_record(status="complete"))
    assert json.loads(files.run.read_bytes())["status"] == "complete"
    assert os.listdir(files.folder) == ["run.json"]


def test_run_json_is_replaced_any_number_of_times_without_running_out_of_descriptors(
    files: RunFiles,
) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    write_run(files, a_record())
    before = num_open()
    for _ in range(3):
        write_run(files, a_record())
    assert num_open() == before


def test_a_failed_replacement_keeps_the_old_run_json(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_run(files, a_record())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailed):
        write_run(files, a_record(status="complete"))
    assert read_run(files) == a_record()
    assert os.listdir(files.folder) == ["run.json"]


# ---- the folder ----------------------------------------------------------------------------------


@given(count=st.integers(1, 50), num_images=st.integers(0, 300))
def test_shards_cover_every_image_once_and_evenly(count: int, num_images: int) -> None:
    bounds = [Shard(index, count).bounds(num_images) for index in range(count)]
    covered = [number for first, last in bounds for number in range(first, last)]
    assert covered == list(range(num_images))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_a_shards_files_carry_its_number_and_share_the_listing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, Shard(3, 16))
    assert files.predictions.name == "predictions-00003-of-00016.jsonl"
    assert files.stats.name == "stats-00003-of-00016.jsonl"
    assert files.run.name == "run-00003-of-00016.json"
    assert files.listing == RunFiles(tmp_path).listing
    assert files.lock != RunFiles(tmp_path, Shard(4, 16)).lock


def test_the_output_has_one_writer_until_it_lets_go(files: RunFiles) -> None:
    with only_writer(files):
        with pytest.raises(ResumeRefused, match="another batchclf is writing there"):  # noqa: SIM117
            with only_writer(files):
                pass
        with only_writer(RunFiles(files.folder, Shard(0, 2))):
            pass
    with only_writer(files):
        pass


def test_the_kernel_frees_the_output_of_a_process_that_was_killed(files: RunFiles) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from batchclf.results.files import RunFiles\n"
            "from batchclf.results.lock import only_writer\n"
            "with only_writer(RunFiles(Path(sys.argv[1]))):\n"
            "    print('held', flush=True)\n"
            "    time.sleep(60)\n",
            os.fspath(files.folder),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ResumeRefused), only_writer(files):
            pass
        holder.kill()
    with only_writer(files):
        pass


def test_discarding_removes_the_runs_own_files_only(files: RunFiles) -> None:
    mine = (files.run, files.predictions, files.stats, files.listing)
    kept = files.folder / "notes.txt"
    for path in (*mine, kept):
        path.write_text("x")
    discard(files)
    discard(files)
    assert sorted(os.listdir(files.folder)) == ["listing.nul", "notes.txt"]


def test_what_a_killed_run_left_half_written_is_removed_and_only_its_own(tmp_path: Path) -> None:
    files, other = RunFiles(tmp_path, Shard(0, 2)), RunFiles(tmp_path, Shard(1, 2))
    left = [*(temporary_of(path) for path in (files.predictions, files.run)), files.new_draft()]
    kept = [temporary_of(other.predictions), other.new_draft(), RunFiles(tmp_path).new_draft()]
    for path in (*left, *kept):
        path.write_bytes(b"half")
    files.retry.write_bytes(b"half")
    remove_leftovers(files, is_complete=False)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, files.retry])
    remove_leftovers(files, is_complete=True)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.rename(path.with_name("elsewhere")), "is gone"),
        (lambda path: os.truncate(path, 0), "has 0 bytes, not the"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "bytes, not the"),
        (lambda path: (path.unlink(), path.write_bytes(b"x")), "is another file now"),
    ],
)
def test_a_file_that_somebody_else_changes_is_noticed_at_the_next_sync(
    tmp_path: Path, change: Callable[[Path], object], what: str
) -> None:
    path = tmp_path / "predictions.jsonl"
    writer = RecordWriter(path, 0)
    writer.write(encode([record_of(b"a.jpg", ())]))
    writer.sync()
    change(path)
    with pytest.raises(EnvironmentFailed, match=what):
        writer.sync()


def test_a_folder_that_cannot_be_made_is_the_environments_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFailed), only_writer(RunFiles(tmp_path / "file" / "out")):
        pass
