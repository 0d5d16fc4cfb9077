"""Does a provider really run here? Told by opening one convolution on it, in milliseconds."""

from importlib import resources

import numpy as np

from batchclf.errors import ProviderError
from batchclf.runtime.classifier import open_classifier, warm_up
from batchclf.runtime.sessions import Target


def require_working(target: Target) -> None:
    """Refuse a target on which no convolution runs.

    The probe model (probe.onnx) is one 1x1 convolution with weights of 0.5 and a ReLU, float32
    input of shape (1, 3, 8, 8): ones give 1.5 everywhere.

    Raises:
        ProviderError: with the cause and what mends it.
        UsageError: an option that the provider does not know.
    """
    name = target.provider.name
    if name == "cuda":
        from batchclf.runtime.cuda import require_cuda

        require_cuda([target.device_id])
    model = resources.files("batchclf.runtime").joinpath("probe.onnx")
    with resources.as_file(model) as path:
        classify = open_classifier(path, target)
    scores = warm_up(classify, np.ones((1, 3, 8, 8), np.float32))
    if not np.allclose(scores, 1.5, atol=1e-2):
        raise ProviderError(
            f"provider {name}: a convolution gave {scores.flat[0]:.3g}, not 1.5; the provider or "
            "its device is broken"
        )
