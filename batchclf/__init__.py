"""Classify folders of images through batched ONNX Runtime sessions, one record per image."""

__version__ = "0.1.0"
