"""Reading an archive ends or holds up the worker: what cannot be had pays, and nothing else."""

import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import Batchclf
from tests.engines.common import assert_as_undisturbed, fault, finished, summary_of, write_job
from tests.proxy import NAME, proxied_bucket
from tests.tiny import DIGITS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NUM = 40
GROUP = 10
DEATHS = {
    "segfault": "import ctypes; ctypes.string_at(0)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "hang": "time.sleep(1000)",
    "memory": "os.kill(os.getpid(), signal.SIGKILL) if IS_WORKER else _raise()",
}
CODES = {"segfault": "decoder_crash", "kill": "oom", "hang": "timeout", "memory": "oom"}
RAISE = "def _raise():\n    raise MemoryError\n"
"""In the process that tries an image alone, which may use less memory than there is."""
READING_ROWS = """
def change(module):
    batches = module.batches
    def batches_or_die(file, columns, num_rows, group=None):
        row = 0
        for batch in batches(file, columns, num_rows, group):
            if any((group, one) in AT for one in range(row, row + batch.num_rows)):
                die()
            row += batch.num_rows
            yield batch
    module.batches = batches_or_die
"""
READING_BYTES = """
def change(module):
    begin = module._Bytes.begin
    module.CHUNK_BYTES = 512
    def begin_or_die(self, start):
        for number, chunk in enumerate(begin(self, start)):
            if 512 * number >= AT:
                die()
            yield chunk
    module._Bytes.begin = begin_or_die
"""


INFLATING = """
def change(module):
    unpacked = module._unpacked
    def unpacked_or_die(data, method, flags, limits):
        content = unpacked(data, method, flags, limits)
        if content == AT:
            die()
        return content
    module._unpacked = unpacked_or_die
"""
LISTING = """
def change(module):
    batches = module.batches
    def batches_or_die(file, *arguments):
        if file.metadata.num_row_groups == AT:
            die()
        return batches(file, *arguments)
    module.batches = batches_or_die
"""
MODULES = {
    LISTING: "parquet_list",
    READING_ROWS: "parquet",
    READING_BYTES: "stream",
    INFLATING: "zips",
}


def dying(folder: Path, kind: str, program: str, at: object) -> Mapping[str, str]:
    """The environment of processes that die of reading at some places."""
    die = f"AT = {at!r}\ndef die():\n    {DEATHS[kind]}\n"
    return fault(folder, RAISE + die + program, f"batchclf.images.archives.{MODULES[program]}")


def names(numbers: Sequence[int]) -> list[str]:
    return [f"{number:02d}.jpg" for number in numbers]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A Parquet file of 40 images in 4 row groups."""
    images = [path.read_bytes() for path in sorted(DIGITS.rglob("*.jpg"))[:NUM]]
    structs = [
        {"bytes": one, "path": name} for one, name in zip(images, names(range(NUM)), strict=True)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": structs}), path, row_group_size=GROUP)
    return path


@pytest.mark.parametrize("backend", ["threads", "processes"])
@pytest.mark.parametrize("kind", DEATHS)
def test_rows_that_cannot_be_read_become_errors_and_all_others_are_unharmed(
    tmp_path: Path, rows: Path, kind: str, backend: str
) -> None:
    loader = {"workers": 2, "backend": backend, "max_seconds": 2}
    job = write_job(tmp_path, input=str(rows), loader=loader)
    env = dying(tmp_path, kind, READING_ROWS, {(1, 4), (3, 0)})
    exit_code, said = finished(job, env=env)
    assert exit_code == 0, said
    lost = names([*range(14, 20), *range(30, 40)])
    assert_as_undisturbed(tmp_path, but=dict.fromkeys(lost, CODES[kind]))
    assert said.count("and what else is read behind the same place of its archive") == 2, said
    if backend == "threads":
        assert said.count("starting it again") <= 2, "no row behind such a place is tried again"
    assert summary_of(tmp_path / "out")["num_errors"] == len(lost)


@pytest.mark.parametrize("kind", DEATHS)
def test_members_behind_a_place_that_cannot_be_inflated_become_errors(
    tmp_path: Path, kind: str
) -> None:
    archive = tmp_path / "a.tar.gz"
    starts = []
    with tarfile.open(archive, "w:gz") as tar:
        for path, name in zip(sorted(DIGITS.rglob("*.jpg")), names(range(NUM)), strict=False):
            tar.add(path, name)
            starts.append(tar.offset)
    loader = {"workers": 2, "max_seconds": 2}
    job = write_job(tmp_path, input=str(archive), loader=loader)
    exit_code, said = finished(job, env=dying(tmp_path, kind, READING_BYTES, starts[24]))
    assert exit_code == 0, said
    lost = [f"a.tar.gz/{name}" for name in names(range(25, NUM))]
    assert_as_undisturbed(tmp_path, but=dict.fromkeys(lost, CODES[kind]))


def test_a_crash_while_others_read_costs_no_row(tmp_path: Path, rows: Path) -> None:
    job = write_job(tmp_path, input=str(rows))
    program = READING_ROWS.replace("die()", "once('died') and die()")
    die = f"AT = {{(2, 3)}}\ndef die():\n    {DEATHS['segfault']}\n"
    env = fault(tmp_path, die + program, "batchclf.images.archives.parquet")
    exit_code, said = finished(job, env=env)
    assert exit_code == 0, said
    assert re.search(r"2\d\.jpg: tried alone, does no harm", said), said
    assert_as_undisturbed(tmp_path)


def test_rows_of_a_bucket_that_cannot_be_read_become_errors_as_well(
    tmp_path: Path, rows: Path
) -> None:
    with proxied_bucket() as bucket:
        (tmp_path / "up").mkdir()
        rows.rename(tmp_path / "up" / rows.name)
        bucket.put_folder(tmp_path / "up", "rows")
        address = f"s3://{NAME}/rows/{rows.name}"
        job = write_job(tmp_path, input=address, loader={"workers": 2, "max_seconds": 4})
        exit_code, said = finished(job, env=dying(tmp_path, "hang", READING_ROWS, {(2, 7)}))
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path, but=dict.fromkeys(names(range(27, 30)), "timeout"))


def test_a_member_of_a_bucket_that_cannot_be_inflated_is_one_error(tmp_path: Path) -> None:
    """It is inflated where it is read ahead."""
    images = [path.read_bytes() for path in sorted(DIGITS.rglob("*.jpg"))[:NUM]]
    with proxied_bucket() as bucket:
        (tmp_path / "up").mkdir()
        with zipfile.ZipFile(tmp_path / "up" / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, image in zip(names(range(NUM)), images, strict=True):
                archive.writestr(name, image)
        bucket.put_folder(tmp_path / "up", "zips")
        job = write_job(tmp_path, input=f"s3://{NAME}/zips/a.zip")
        exit_code, said = finished(job, env=dying(tmp_path, "segfault", INFLATING, images[17]))
    assert exit_code == 0, said
    assert_as_undisturbed(tmp_path, but={"a.zip/17.jpg": "decoder_crash"})
    assert said.count("starting it again") == 1, said


@pytest.mark.parametrize("kind", DEATHS)
def test_an_archive_that_cannot_be_listed_is_one_error(
    tmp_path: Path, rows: Path, kind: str
) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    rows.rename(archives / rows.name)
    table = pq.read_table(archives / rows.name)
    loader = {"workers": 2, "max_seconds": 2}
    job = write_job(tmp_path, input={"parquet": str(archives)}, loader=loader, stall_timeout=3)
    for number in (1, 2):
        pq.write_table(table, archives / f"bad{number}.parquet", row_group_size=NUM // 2)
    exit_code, said = finished(job, env=dying(tmp_path, kind, LISTING, 2))
    assert exit_code == 0, said
    bad = {f"bad{number}.parquet": "damaged_archive" for number in (1, 2)}
    assert_as_undisturbed(tmp_path, but=bad)
    assert said.count("starting it again") == 2, said
    assert "bad1.parquet: recorded as damaged_archive: cannot be listed: " in said


@pytest.mark.parametrize("kind", ["segfault", "kill", "hang"])
def test_validate_outlives_an_archive_that_cannot_be_listed(
    tmp_path: Path, rows: Path, kind: str, batchclf: Batchclf
) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    rows.rename(archives / rows.name)
    job = write_job(tmp_path, input={"parquet": str(archives)}, loader={"max_seconds": 8})
    table = pq.read_table(archives / rows.name)
    pq.write_table(table, archives / "bad.parquet", row_group_size=NUM // 2)
    done = batchclf("validate", str(job), env=dying(tmp_path, kind, LISTING, 2))
    assert done.exit_code == 0, done.stderr
    assert f"images:   {NUM + 1} in {archives}\n" in done.stdout
    assert "bad.parquet: damaged_archive: cannot be listed: " in done.stderr


def test_validate_waits_for_an_archive_that_takes_long_to_list(
    tmp_path: Path, batchclf: Batchclf
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path, name in zip(sorted(DIGITS.rglob("*.jpg"))[:12], names(range(12)), strict=True):
            tar.add(path, name)
    job = write_job(tmp_path, input=str(tmp_path / "a.tar"), loader={"max_seconds": 2})
    program = "def change(module):\n    add = module.Index.add\n    def add_slowly(self, found):\n"
    program += "        time.sleep(0.25)\n        return add(self, found)\n"
    program += "    module.Index.add = add_slowly\n"
    env = fault(tmp_path, program, "batchclf.images.archives.index")
    done = batchclf("validate", str(job), env=env)
    assert done.exit_code == 0, done.stderr
    assert "images:   12 in " in done.stdout


def test_an_archive_at_which_a_process_is_killed_once_is_listed(tmp_path: Path, rows: Path) -> None:
    job = write_job(tmp_path, input=str(rows))
    program = LISTING.replace("== AT", "== AT and once('died')")
    die = f"AT = {NUM // GROUP}\ndef die():\n    {DEATHS['kill']}\n"
    env = fault(tmp_path, die + program, "batchclf.images.archives.parquet_list")
    exit_code, said = finished(job, env=env)
    assert exit_code == 0, said
    assert "a.parquet: listed alone, does no harm" in said
    assert_as_undisturbed(tmp_path)
