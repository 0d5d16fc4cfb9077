"""Folders of the cache that last as long as who uses them."""

import subprocess
import sys
from pathlib import Path

import pytest

from batchclf.system.cache import passing_folder

HOLD = """
import sys
from batchclf.system.cache import passing_folder
with passing_folder("kind") as folder:
    (folder / "file").write_text("something")
    print(folder, flush=True)
    sys.stdin.read()
"""


def started() -> tuple[subprocess.Popen[str], Path]:
    """A process that has such a folder until its stdin ends, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_of_a_process_that_was_killed_goes_and_that_of_one_that_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path))
    (living, theirs), (dead, left) = started(), started()
    with living, dead:
        dead.kill()
        dead.wait()
        assert (left / "file").exists()
        with passing_folder("kind") as own:
            assert sorted(tmp_path.glob("kind/*/file")) == [theirs / "file"]
            with passing_folder("kind") as other:
                assert {path for path in (tmp_path / "kind").iterdir() if path.is_dir()} == {
                    *(own, other, theirs)
                }
        living.communicate()
        assert living.returncode == 0
    assert list((tmp_path / "kind").iterdir()) == []
