"""What makes scores of a model's output, where nothing but the job can tell."""

from batchclf.errors import ModelError
from batchclf.results.records import Activation


def settled(
    given: Activation | None, num_outputs: int, what: str, own: Activation = "softmax"
) -> Activation:
    """What a model of logits still lacks, by the job's `model.activation` if it says.

    `own` is what the model itself says, and holds where the job says nothing: with a sigmoid of its
    own, one output is one label that is there or not.

    One output with a sigmoid stands for two classes, and is to become the logits (0, output): their
    softmax is 1 - sigmoid and sigmoid.

    Raises:
        ModelError: one output, of which a softmax would make 1.0 whatever the image.
    """
    if given is None and own != "softmax":
        return own
    activation = given or "softmax"
    if num_outputs > 1:
        return activation
    if activation == "softmax":
        raise ModelError(
            f"{what}: gives one number per image, whose softmax is always 1; say with "
            "model.activation what it is: sigmoid (two classes, and the number speaks for the "
            "second) or none (the number itself is the score)"
        )
    return "softmax" if activation == "sigmoid" else "none"
