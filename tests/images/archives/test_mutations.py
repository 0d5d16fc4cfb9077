"""Damaged archives give members or failures with a code, whatever the damage; nothing crashes.

BATCHCLF_MUTATIONS=20000 tries so many instead of 1,000, 1,000 in a process.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NUMBER = int(os.environ.get("BATCHCLF_MUTATIONS", "1000"))
CHUNK = 1000
CODES = {
    *("corrupt", "truncated", "damaged_archive", "unsupported_format", "unsafe_member"),
    *("too_large_bytes", "not_found", "changed", "bytes", "refused"),
}


@pytest.mark.parametrize("first", range(0, NUMBER, CHUNK))
def test_damaged_archives_give_bytes_or_failures_with_a_known_code(first: int) -> None:
    number = min(CHUNK, NUMBER - first)
    program = ["-m", "tests.images.archives.mutations", f"--first={first}", f"--number={number}"]
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert set(found["outcomes"]) <= CODES
    assert found["outcomes"]["bytes"] > number, "hardly any was damaged lightly"
    assert found["outcomes"]["damaged_archive"] > number / 20
    assert found["its_cpu_s"] < 20
    assert found["peak_rss_mb"] < 700
