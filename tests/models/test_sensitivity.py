"""How far a model's answers move when what its layers take is rounded to bf16."""

import numpy as np

from batchclf.models.bundle import GOLDEN_FILE
from batchclf.models.sensitivity import open_rounded
from batchclf.runtime.classifier import open_reference
from tests.models.bundles import digits_model, pixels_of, scores_of
from tests.tiny import DIGITS


def test_a_bundle_says_how_far_rounding_moves_each_of_its_answers() -> None:
    with np.load(digits_model().bundle.folder / GOLDEN_FILE) as arrays:
        error_N = arrays["bf16_error_N"]
        assert error_N.shape == (len(arrays["scores_NK"]),)
    assert ((error_N > 1e-4) & (error_N < 0.2)).all()


def test_the_rounded_model_is_off_by_the_steps_of_8_bits() -> None:
    model = digits_model()
    pixels_NHWC = pixels_of(DIGITS, model)[::20]
    expected_NK = scores_of(model.bundle.model_path, pixels_NHWC)
    found_NK = open_rounded(model.bundle.folder, open_reference)(pixels_NHWC)
    relative = np.abs(found_NK - expected_NK).max() / np.abs(expected_NK).max()
    assert 2**-12 < relative < 2**-4
    assert (found_NK.argmax(1) == expected_NK.argmax(1)).mean() > 0.95
