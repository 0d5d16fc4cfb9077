"""Hides the C extension from every process that has this folder in PYTHONPATH: Pillow resizes."""

import sys

sys.modules["batchclf.images._resize"] = None  # type: ignore[assignment]  # importing it fails
