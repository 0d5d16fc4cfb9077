"""Image files that end or hold up, for real, the process that decodes them.

They work in processes that are started with `poisoned_environment`, and are `not_an_image` in
others.
"""

import os
from pathlib import Path

from tests.faults.poison.sitecustomize import KINDS, MARK, SWITCH

CODES = {
    "segfault": "decoder_crash",
    "abort": "decoder_crash",
    "exit": "decoder_crash",
    "loop": "timeout",
    "hang": "timeout",
    "native_loop": "timeout",
    "bomb": "oom",
    "kill": "oom",
}
"""Each kind of poison, and the code of its record."""
assert CODES.keys() == KINDS.keys()


def write_poison(path: Path, kind: str) -> Path:
    """Write a file of one of the kinds of CODES."""
    assert kind in CODES
    path.write_bytes(MARK + kind.encode())
    return path


def poisoned_environment() -> dict[str, str]:
    """Added to the environment of a process: in it, and in its children, poison works."""
    paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), SWITCH: "1"}
