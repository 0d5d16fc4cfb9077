"""The models that a job names, of the libraries that build them: torchvision, timm, transformers.

Each has a module of its own with `build` and `check`, imported where its library is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from batchclf.models.activation import settled
from batchclf.models.export import BuiltModel, TwoLogits
from batchclf.spec.job import ModelSpec

Log = Callable[[str], None]


class Library(Protocol):
    """What the module of a library offers."""

    def build(self, spec: ModelSpec, log: Log) -> BuiltModel:
        """Build the model; raises what `build` below does."""

    def check(self, spec: ModelSpec) -> None:
        """Refuse it; raises what `check` below does."""


def build(spec: ModelSpec, log: Log = lambda text: None) -> BuiltModel:
    """Build the model that `spec.name` names, with pretrained, own or random weights.

    `log` is told of a download.

    Raises:
        ModelError: unknown model or weights, a file that does not fit the model, or one output
            and no word of what it means.
        WeightsUnavailable: the download failed.
    """
    model = library(spec).build(spec, log)
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


def library(spec: ModelSpec) -> Library:
    """The module that builds what `spec.name` names; importing it imports that library."""
    if spec.library == "timm":
        from batchclf.models.zoo import timm

        return timm
    if spec.library == "hf":
        from batchclf.models.zoo import hf

        return hf
    from batchclf.models.zoo import torchvision

    return torchvision
