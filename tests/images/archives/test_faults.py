"""Disks that fail for a moment: archives are asked again, as files are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchclf.images.source import open_source
from batchclf.images.store import open_store
from tests.conftest import ROOT
from tests.images.archives.common import PHOTOS, written
from tests.images.archives.test_changed import WRITERS

READ = """
import json, os, sys
from pathlib import Path
from batchclf.images.source import open_source
from batchclf.images.store import open_store
from batchclf.results.records import Entry, Failure, refs_of
store = open_store(open_source(Path(sys.argv[1])))
listed = json.load(sys.stdin)
entries = [Entry(*map(os.fsencode, one)) for one in listed] or list(store.entries())
found = [store.read(ref, 2**20) for ref in refs_of(entries)]
print([one.code if isinstance(one, Failure) else len(one) for one in found])
"""


def with_faults(path: Path, calls: str, when: str, listed: list[tuple[str, str]]) -> str:
    """What is read of an archive where some system calls on it fail; it may have been listed."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = ["strace", "-f", "-o", os.devnull, "-P", str(path), "-e", f"trace={calls}"]
    if subprocess.run([*trace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    done = subprocess.run(
        [*trace, "-e", f"inject={calls}:error=EIO:when={when}", sys.executable, "-c", READ, path],
        cwd=ROOT,
        input=json.dumps(listed),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout or done.stderr


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_that_cannot_be_read_twice_is_read_at_the_third_try(
    tmp_path: Path, name: str, is_listed: bool
) -> None:
    path = written(tmp_path / name, WRITERS[name](PHOTOS))
    entries = open_store(open_source(path)).entries() if is_listed else ()
    listed = [(os.fsdecode(one.path), os.fsdecode(one.location)) for one in entries]
    found = with_faults(path, "read,readv,pread64", "1..2", listed)
    assert found == f"{list(map(len, PHOTOS.values()))}\n"


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.parquet"])
def test_an_archive_that_cannot_be_read_at_all_is_an_io_error_of_each_image(
    tmp_path: Path, name: str
) -> None:
    path = written(tmp_path / name, WRITERS[name](PHOTOS))
    entries = list(open_store(open_source(path)).entries())[:1]
    listed = [(os.fsdecode(one.path), os.fsdecode(one.location)) for one in entries]
    found = with_faults(path, "read,readv,pread64", "1+", listed)
    assert found == "['io_error']\n"
