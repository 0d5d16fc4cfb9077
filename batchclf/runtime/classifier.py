"""Pixels to class scores through ONNX Runtime: the seam every other room sees as a function.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from batchclf.errors import ModelError, ProviderError
from batchclf.results.records import ActiveProvider, Pixels, Scores
from batchclf.runtime.sessions import (
    NOTHING,
    ORT_ERRORS,
    Target,
    avoid_crash,
    last_sentence,
    not_accepted,
    open_session,
)

Classifier = Callable[[Pixels], Scores]
"""uint8 pixels of shape NHWC to float32 scores of shape NK; may be called from several threads."""


class OnnxClassifier:
    """One ONNX Runtime session over a bundle's model, on the provider asked for and no other."""

    def __init__(self, session: ort.InferenceSession, active: ActiveProvider) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name
        self.active = active

    @property
    def takes_any_batch(self) -> bool:
        """Whether it may be called with batches of any size, one after the other."""
        return isinstance(self._session.get_inputs()[0].shape[0], str)

    def __call__(self, pixels_NHWC: Pixels) -> Scores:
        (scores_NK,) = self._session.run([self._output], {self._input: pixels_NHWC})
        return np.asarray(scores_NK, np.float32)


class BoundClassifier(OnnxClassifier):
    """A classifier whose pixels go to one fixed place in the device's memory, for one caller.

    Binding spares ONNX Runtime an allocation and a staging copy per batch. Two of these, called
    from two threads, overlap one batch's copy with the other's computation. That place has one
    shape: where memory does not suffice for it, the job goes on with half in a new session.
    """

    takes_any_batch = False

    def __init__(
        self,
        session: ort.InferenceSession,
        active: ActiveProvider,
        device: str,
        device_id: int,
    ) -> None:
        super().__init__(session, active)
        self._place = (device, device_id)
        self._binding = session.io_binding()
        self._pixels: ort.OrtValue | None = None

    def __call__(self, pixels_NHWC: Pixels) -> Scores:
        if self._pixels is None:
            self._pixels = ort.OrtValue.ortvalue_from_shape_and_type(
                pixels_NHWC.shape, pixels_NHWC.dtype, *self._place
            )
            self._binding.bind_output(self._output, *self._place)
        self._pixels.update_inplace(pixels_NHWC)
        # Where a node on the CPU takes the pixels, binding copies them: so for every batch.
        self._binding.bind_ortvalue_input(self._input, self._pixels)
        self._session.run_with_iobinding(self._binding)
        (scores_NK,) = self._binding.copy_outputs_to_cpu()
        return np.array(scores_NK, np.float32)


def open_classifier(
    model: Path,
    target: Target,
    *,
    batch_size: int | None = None,
    compile_cache: Path | None = None,
    bind: bool | None = None,
) -> OnnxClassifier:
    """Open a bundle's model (one uint8 NHWC input, one output of scores NK) on a target.

    With one thread, concurrent calls each run on their caller's thread and share the weights. A
    bound classifier (`BoundClassifier`; by default on CUDA, where it pays) is for one caller.

    Raises:
        ModelError: ONNX Runtime does not accept the model.
        ProviderError: the session would run elsewhere than on the target.
        UsageError: an option that the provider does not know.
    """
    session, active = open_session(
        model, target, batch_size=batch_size, compile_cache=compile_cache
    )
    on_cuda = target.provider.name == "cuda"
    if on_cuda if bind is None else bind:
        place = ("cuda", target.device_id) if on_cuda else ("cpu", 0)
        return BoundClassifier(session, active, *place)
    return OnnxClassifier(session, active)


def warm_up(classify: OnnxClassifier, pixels_NHWC: Pixels) -> Scores:
    """Run a first batch, which is when a provider plans, compiles and allocates.

    Raises:
        ProviderError: it does not run.
    """
    try:
        return classify(pixels_NHWC)
    except ORT_ERRORS as error:
        active = classify.active
        raise ProviderError(
            f"provider {active.requested}: a first batch of {len(pixels_NHWC)} does not run on "
            f"{active.device}: {error}"
        ) from error


def open_reference(
    model: Path, output: str | None = None
) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Any one-input ONNX model as a plain function on arrays, on the CPU, for comparisons.

    Raises:
        ModelError: ONNX Runtime does not accept the model, or running it fails.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = NOTHING
    avoid_crash(settings)
    try:
        session = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise not_accepted(model, str(error)) from error
    input_name = session.get_inputs()[0].name
    output_name = output or session.get_outputs()[0].name

    def run(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            (result,) = session.run([output_name], {input_name: array})
        except ORT_ERRORS as error:
            cause = last_sentence(str(error))
            raise ModelError(f"{model}: running it on {array.shape} fails: {cause}") from error
        return np.asarray(result)

    return run
