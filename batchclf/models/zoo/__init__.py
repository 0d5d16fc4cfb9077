"""The models that a job names, of the libraries that build them: torchvision, timm, transformers.

Each has a module of its own with `build` and `check`, imported where its library is asked for.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from batchclf.models.activation import settled
from batchclf.models.export import BuiltModel, TwoLogits
from batchclf.spec.job import ModelSpec


def build(spec: ModelSpec, log: Callable[[str], None] = lambda text: None) -> BuiltModel:
    """Build the model that `spec.name` names, with pretrained, own or random weights.

    `log` is told of a download.

    Raises:
        ModelError: unknown model or weights, a file that does not fit the model, or one output
            and no word of what it means.
        WeightsUnavailable: the download failed.
    """
    model: BuiltModel = library(spec).build(spec, log)
    num_outputs = len(model.labels)
    activation = settled(
        spec.activation, num_outputs, f"model.name: {spec.display_name}", model.activation
    )
    if num_outputs == 1 and activation == "softmax":
        model = replace(model, module=TwoLogits(model.module), labels=("0", "1"))
    return replace(model, activation=activation)


def check(spec: ModelSpec) -> None:
    """Refuse what `build` would refuse, as far as it can be told without building or downloading.

    Raises:
        ModelError: as `build`.
    """
    library(spec).check(spec)


def library(spec: ModelSpec) -> Any:
    """The module that builds what `spec.name` names; importing it imports that library."""
    return importlib.import_module(f"batchclf.models.zoo.{spec.library}")
