"""Classify folders of images through batched ONNX Runtime sessions, one record per image."""

import os
import time

__version__ = "0.1.0"
STARTED = time.perf_counter()
"""When this process became batchclf: start-up time counts from here."""
# ONNX Runtime's events to Microsoft are on by default; a job's images are nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
