"""Does a provider really run here? Told by opening one convolution on it, in milliseconds."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from batchclf.errors import ProviderError, UsageError
from batchclf.runtime.classifier import open_classifier, warm_up
from batchclf.runtime.openvino import device_names, options_of_one, require_fitting
from batchclf.runtime.sessions import Target


def require_working(targets: Sequence[Target]) -> None:
    """Refuse targets, all of one provider, unless a convolution runs on each of them.

    The probe model (probe.onnx) is one 1x1 convolution with weights of 0.5 and a ReLU, float32
    input of shape (1, 3, 8, 8): ones give 1.5 everywhere.

    Raises:
        ProviderError: with the cause and what mends it.
        UsageError: an option that the provider does not know.
    """
    if targets[0].provider.name == "cuda":
        from batchclf.runtime.cuda_machine import require_cuda

        require_cuda([target.device_id for target in targets])
    model = resources.files("batchclf.runtime").joinpath("probe.onnx")
    with resources.as_file(model) as path:
        for target in targets:
            _require_with_options(path, target)


def _require_with_options(model: Path, target: Target) -> None:
    """Each device of the target must work; where it does only without the job's options, these
    are wrong."""
    for one in _each_device(target):
        try:
            _require_right_answer(model, one)
        except ProviderError as error:
            if not one.options:
                raise
            _require_right_answer(model, replace(one, options={}))
            given = ", ".join(f"{key}: {value}" for key, value in one.options.items())
            raise UsageError(
                f"provider.options: found {given}; provider {one.provider.name} works without "
                f"them, and with them it does not: {error}"
            ) from error


def _each_device(target: Target) -> list[Target]:
    """The target, and first each device that an AUTO, MULTI or HETERO lists, by itself: together,
    OpenVINO passes over a device or a setting that does not work."""
    names = device_names(target.device_type)
    if names == [target.device_type]:
        return [target]
    require_fitting(target.device_type, target.options)
    alone = (
        replace(target, device_type=name, options=options_of_one(name, target.options))
        for name in names
    )
    return [*alone, target]


def _require_right_answer(model: Path, target: Target) -> None:
    classify = open_classifier(model, target)
    scores = warm_up(classify, np.ones((1, 3, 8, 8), np.float32))
    if not np.allclose(scores, 1.5, atol=1e-2):
        raise ProviderError(
            f"provider {target.provider.name}: a convolution gave {scores.flat[0]:.3g}, not 1.5; "
            "the provider or its device is broken"
        )
