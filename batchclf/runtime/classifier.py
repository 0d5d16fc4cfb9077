"""Pixels to class scores through ONNX Runtime: the seam every other room sees as a function.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import ctypes
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
Copy = Callable[[int, int, int], object]
"""Copies to an address, from an address, so many bytes; one of them may be in a device's memory."""


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
    from two threads, overlap one batch's copy with the other's computation, and other threads run
    meanwhile. That place has one shape: where memory does not suffice for it, the job goes on with
    half in a new session. Scores come from one fixed place as well, as CUDA graphs need.
    """

    takes_any_batch = False

    def __init__(
        self,
        session: ort.InferenceSession,
        active: ActiveProvider,
        place: tuple[str, int],
        copy: Copy,
    ) -> None:
        """`place`: kind and number of the device, as ONNX Runtime calls it."""
        super().__init__(session, active)
        self._place = place
        self._copy = copy
        self._binding = session.io_binding()
        self._pixels: ort.OrtValue | None = None
        self._scores: ort.OrtValue | None = None

    def __call__(self, pixels_NHWC: Pixels) -> Scores:
        if self._pixels is None:
            self._pixels = ort.OrtValue.ortvalue_from_shape_and_type(
                pixels_NHWC.shape, pixels_NHWC.dtype, *self._place
            )
            self._binding.bind_output(self._output, *self._place)
        pixels_NHWC = np.ascontiguousarray(pixels_NHWC)
        if pixels_NHWC.shape != tuple(self._pixels.shape()):
            raise ValueError(f"{pixels_NHWC.shape} pixels in the place of {self._pixels.shape()}")
        self._copy(self._pixels.data_ptr(), pixels_NHWC.ctypes.data, pixels_NHWC.nbytes)
        # Where a node on the CPU takes the pixels, binding copies them: so for every batch.
        self._binding.bind_ortvalue_input(self._input, self._pixels)
        self._session.run_with_iobinding(self._binding)
        if self._scores is None:
            (self._scores,) = self._binding.get_outputs()
            assert self._scores.data_type() == "tensor(float)", "so bundles have it"
            self._binding.bind_ortvalue_output(self._output, self._scores)
        scores_NK = np.empty(self._scores.shape(), np.float32)
        self._copy(scores_NK.ctypes.data, self._scores.data_ptr(), scores_NK.nbytes)
        return scores_NK


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
    on_cuda = target.provider.name == "cuda"
    is_bound = on_cuda if bind is None else bind
    if on_cuda and not is_bound:
        from batchclf.runtime.cuda import refuse_graph

        refuse_graph(target.options)
    session, active = open_session(
        model, target, batch_size=batch_size, compile_cache=compile_cache
    )
    if not is_bound:
        return OnnxClassifier(session, active)
    if not on_cuda:
        return BoundClassifier(session, active, ("cpu", 0), ctypes.memmove)
    from batchclf.runtime.cuda import Copies

    place = ("cuda", target.device_id)
    return BoundClassifier(session, active, place, Copies(target.device_id))


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
