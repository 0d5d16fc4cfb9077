"""Export one model of each of timm's families and measure how near ONNX Runtime is to PyTorch.

    python -m tests.sweep_timm --output docs/reference/timm.md

A family is a module of timm's; of each the model is taken whose name promises to be the smallest.
`tests/sweep.py` says how; all families take about an hour on two cores.
"""

import re

import timm

from tests.sweep import Swept, main

_SIZES = (
    *("test_", "atto", "femto", "pico", "zepto", "nano", "xxs", "tiny", "_xt", "_t", "mini"),
    *("lite", "_xs", "_s0", "_b0", "_m0", "_0", "small", "_s", "10", "12", "18", "26", "32"),
)
"""Parts of names, from those of the smallest models up."""


def _promise(name: str) -> tuple[int, int, str]:
    """Sorts first what is likely small, in its weights and in its images."""
    rank = next((rank for rank, part in enumerate(_SIZES) if part in name), len(_SIZES))
    sizes = [int(found) for found in re.findall(r"_(\d{3,4})(?=_|$)", name)]
    return max(sizes, default=0) > 256, rank, name


def families() -> list[str]:
    """A model of each module of timm's that has classifiers."""
    return [
        min(names, key=_promise)
        for module in timm.list_modules()
        if (names := timm.list_models(module=module))
    ]


TIMM = Swept(
    library="timm",
    prefix="timm/",
    names=families,
    what="A model of each of timm's families",
    page="docs/reference/timm.md",
)

if __name__ == "__main__":
    main(TIMM)
