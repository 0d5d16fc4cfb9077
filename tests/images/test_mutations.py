"""Damaged images are pixels or a failure with a code, whatever the damage; nothing crashes.

BATCHCLF_MUTATIONS=100000 tries so many instead of 400, 1,000 in a process.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.images.mutations import mutated, originals
from tests.images.test_odd_images import CODES

NUMBER = int(os.environ.get("BATCHCLF_MUTATIONS", "400"))
CHUNK = 1000


@pytest.mark.parametrize("first", range(0, NUMBER, CHUNK))
def test_damaged_images_are_pixels_or_failures_with_a_known_code(first: int) -> None:
    number = min(CHUNK, NUMBER - first)
    program = ["-m", "tests.images.mutations", f"--first={first}", f"--number={number}"]
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    codes = Counter(found["codes"])
    assert set(codes) <= CODES | {"pixels"}
    assert codes.total() == number
    assert codes["pixels"] > number / 20, "hardly any was damaged lightly"
    assert codes["corrupt"] + codes["truncated"] > number / 20
    assert found["peak_rss_mb"] < 500
    assert found["unforeseen"] == []


def test_the_same_seed_damages_the_same_files_in_the_same_way_also_piecewise() -> None:
    files = originals()[::50] or originals()
    together = list(mutated(3, 12, files))
    assert together == [*mutated(3, 5, files), *mutated(3, 7, files, first=5)]
    assert together != list(mutated(4, 12, files))
    assert len({name for name, _ in together}) == 12
