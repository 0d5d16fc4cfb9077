"""The charts of a report, as SVG that stands in the page and takes its colours.

A strict Content-Security-Policy allows no `style` in elements, so what matplotlib writes there is
written as attributes. No text of a user's is drawn: labels stand in tables.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any
from xml.etree import ElementTree as Xml

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from batchclf.commands.report.pace import Pace
from batchclf.scoring.figures import Calibration

MAX_LINES = 12
"""Shards that are drawn."""
_INK = "#010203"
"""Drawn in the page's own colour of text."""
_COLOURS = ("#3b82f6", "#d97706", "#16a34a")
"""Seen well on white and on black."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "batchclf",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
Draw = Callable[[Any], None]
"""Draws on the axes of a figure."""


def throughput(paces: Sequence[Pace]) -> str:
    """Images per second over the time that the job ran, a line per shard."""

    def draw(axes: Any) -> None:
        scale, unit = _unit(max(pace.seconds for pace in paces))
        for number, pace in enumerate(paces[:MAX_LINES]):
            edges = [one / scale for one in _edges(pace)]
            rates = [step.images_per_s for step in pace.steps]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.stairs(rates, edges, baseline=None, color=colour, linewidth=1.5)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"running time ({unit})")
        axes.set_ylabel("images/s")

    return _svg("throughput", draw)


def stages(pace: Pace) -> str:
    """How the stages' seconds were divided, over the time that the job ran."""

    def draw(axes: Any) -> None:
        scale, unit = _unit(pace.seconds)
        edges = [one / scale for one in _edges(pace)]
        below = [0.0] * len(pace.steps)
        names = ("waiting for pixels", "inference", "writing")
        for name, colour, shares in zip(
            names, _COLOURS, zip(*(step.shares for step in pace.steps), strict=True), strict=True
        ):
            tops = [100 * share + low for share, low in zip(shares, below, strict=True)]
            axes.stairs(tops, edges, baseline=below, fill=True, color=colour, label=name)
            below = tops
        axes.set_ylim(0, 100)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"running time ({unit})")
        axes.set_ylabel("share of stage time (%)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, columnspacing=1.0)

    return _svg("stages", draw)


def scores(bins: Sequence[int]) -> str:
    """How many images have which top score; `bins` are of equal width from 0 to 1."""

    def draw(axes: Any) -> None:
        width = 1 / len(bins)
        lefts = [number * width for number in range(len(bins))]
        axes.bar(lefts, bins, width=0.9 * width, align="edge", color=_COLOURS[0])
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("score of the top class")
        axes.set_ylabel("images")

    return _svg("scores", draw)


def calibration(found: Calibration) -> str:
    """How often images of a score are right; on the diagonal, as often as the score says."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], "--", color=_INK, alpha=0.5, linewidth=1, label="ideal")
        filled = [
            (one.mean_score, one.accuracy)
            for one in found.bins
            if one.mean_score is not None and one.accuracy is not None
        ]
        axes.plot(
            [score for score, _ in filled],
            [accuracy for _, accuracy in filled],
            "o-",
            color=_COLOURS[0],
            label="found",
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("mean score")
        axes.set_ylabel("share that is right")
        axes.legend(loc="upper left")

    return _svg("calibration", draw)


def _edges(pace: Pace) -> list[float]:
    return [0.0, *accumulate(step.seconds for step in pace.steps)]


def _unit(seconds: float) -> tuple[float, str]:
    if seconds > 7200:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds > 300 else (1.0, "seconds")


def _svg(name: str, draw: Draw) -> str:
    """A chart as an element of HTML; `name` tells its ids from those of others."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = Xml.fromstring(file.getvalue())  # noqa: S314 - matplotlib wrote it
    _strip(root)
    for element in root.iter():
        _without_style(element)
        _with_own_ids(element, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("aria-hidden", "true")  # its caption says what it shows
    Xml.register_namespace("", _SVG)
    Xml.register_namespace("xlink", _XLINK)
    return Xml.tostring(root, encoding="unicode")


def _strip(root: Xml.Element) -> None:
    """Remove what says nothing that is seen: metadata, and a style sheet."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)


def _without_style(element: Xml.Element) -> None:
    for key, value in _declarations(element.attrib.pop("style", "")):
        element.set(key, value.replace(_INK, "currentColor"))


def _declarations(style: str) -> Iterator[tuple[str, str]]:
    for declaration in filter(None, map(str.strip, style.split(";"))):
        key, _, value = declaration.partition(":")
        if key == "font":  # no attribute; the page has fonts of its own
            size = next(one for one in value.split() if one.endswith("px"))
            yield "font-size", size
        elif key != "font-family":
            yield key.strip(), value.strip()


def _with_own_ids(element: Xml.Element, name: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.attrib['id']}")
    for key, value in element.attrib.items():
        if value.startswith("#") and key.endswith("href"):
            element.set(key, f"#{name}-{value[1:]}")
        elif value.startswith("url(#"):
            element.set(key, value.replace("url(#", f"url(#{name}-"))
