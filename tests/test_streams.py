"""What is said to people where nobody, or hardly anybody, reads it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FILLED = 1 << 16
"""Bytes that a pipe holds (pipe(7))."""
SAY = """
import os, sys
from batchclf.cli.streams import say
os.set_blocking(2, False)
os.write(2, bytes({filled}))
os.set_blocking(2, True)
say("y" * 9000)
"""


@pytest.mark.parametrize("room", [0, 4096, 8192, 20_000])
def test_a_long_text_never_waits_for_who_does_not_read_it(room: int) -> None:
    reader, writer = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", SAY.format(filled=FILLED - room)],
            cwd=ROOT,
            stderr=writer,
            timeout=30,
            check=True,
        )
        os.close(writer)
        with os.fdopen(os.dup(reader), "rb") as pipe:
            said = pipe.read()[FILLED - room :]
    finally:
        os.close(reader)
    assert said == ("y" * 9000 + "\n").encode()[: len(said)]
    assert len(said) == {0: 0, 4096: 4096, 8192: 8192, 20_000: 9001}[room]
