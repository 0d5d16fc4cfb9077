"""Export every torchvision classification model and measure how near ONNX Runtime is to PyTorch.

    python -m tests.sweep_torchvision --output docs/reference/torchvision.md

Small models first; `tests/sweep.py` says how. All 80 models take about an hour on two cores, and
the largest about 10 GB of memory.
"""

from torchvision import models as zoo

from tests.sweep import Swept, main


def _num_params(name: str) -> int:
    return max(int(member.meta["num_params"]) for member in zoo.get_model_weights(name))


TORCHVISION = Swept(
    library="torchvision",
    prefix="",
    names=lambda: sorted(zoo.list_models(module=zoo), key=_num_params),
    what="torchvision's classification models",
    page="docs/reference/torchvision.md",
)

if __name__ == "__main__":
    main(TORCHVISION)
