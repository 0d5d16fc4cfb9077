"""Folders of the cache that last as long as who uses them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchclf.system.cache import OLD_S, VARIABLE, passing_folder

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


def test_an_old_folder_that_another_machine_left_goes_and_a_new_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    root = tmp_path / "kind"
    for name, age_s in (("old", 2 * OLD_S), ("new", 0.0)):
        (root / name).mkdir(parents=True)
        mark = root / f"{name}.lock"
        mark.touch()
        os.utime(mark, (time.time() - age_s,) * 2)
    with passing_folder("kind"):
        assert not (root / "old").exists()
        assert (root / "new").exists()
