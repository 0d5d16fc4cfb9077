"""Where this program keeps what it can make again."""

import os
from pathlib import Path

import platformdirs

VARIABLE = "BATCHCLF_CACHE_DIR"


def cache_root() -> Path:
    """`BATCHCLF_CACHE_DIR`, or the user's cache folder."""
    base = os.environ.get(VARIABLE)
    return Path(base) if base else platformdirs.user_cache_path("batchclf")
