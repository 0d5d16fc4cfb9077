"""Does a provider really open a session here? Told by running one convolution on it."""

from importlib import resources

import numpy as np

from batchclf.errors import BatchclfError
from batchclf.runtime.classifier import open_classifier
from batchclf.runtime.providers import require_provider


def probe(name: str) -> str | None:
    """Why the provider called `name` cannot run here; None when it can.

    The probe model (probe.onnx) is one 1x1 convolution with weights of 0.5 and a ReLU, float32
    input of shape (1, 3, 8, 8): ones give 1.5 everywhere.
    """
    model = resources.files("batchclf.runtime").joinpath("probe.onnx")
    try:
        with resources.as_file(model) as path:
            classify = open_classifier(path, require_provider(name), threads=1)
        scores = classify(np.ones((1, 3, 8, 8), np.float32))
    except BatchclfError as error:
        return str(error)
    if not np.allclose(scores, 1.5, atol=1e-2):
        return f"provider {name}: a convolution gave {scores.flat[0]:.3g}, not 1.5"
    return None
