"""A machine with NVIDIA GPUs that is not there, for the real onnxruntime-gpu: see machine.py."""
