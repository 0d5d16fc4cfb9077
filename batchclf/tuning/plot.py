"""The picture of a tuning: throughput and latency over batch size."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from batchclf.tuning.records import Result, Tuned


def draw(tuned: Tuned) -> bytes:
    """The picture as a PNG, 1500 x 1350 pixels.

    Above: images/s reached at each batch size by its fastest streams and workers, a line per
    precision and decode mode, with their bound dashed. Below: milliseconds of one batch.
    """
    with mpl.rc_context({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(10, 9), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        figure.suptitle(
            f"{tuned.model} on {tuned.device} ({tuned.provider}), {tuned.num_cores} cores",
            fontweight="bold",
        )
        for number, group in enumerate(_lines(tuned)):
            _draw_line(above, below, group, f"C{number}")
        _mark_best(above, tuned.best)
        sizes = {one.settings.session.batch_size for one in tuned.results}
        for precision, size in tuned.too_large.items():
            sizes.add(size)
            above.axvline(size, color="red", linestyle=":", label=f"too large at {precision}")
        _label(above, below, sorted(sizes))
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _lines(tuned: Tuned) -> list[list[Result]]:
    """For each precision and decode mode, the fastest result at each batch size, ascending."""
    fastest: dict[tuple[str, str], dict[int, Result]] = {}
    for one in tuned.results:  # the fastest first
        session = one.settings.session
        line = fastest.setdefault((session.precision, one.settings.decode), {})
        line.setdefault(session.batch_size, one)
    return [[line[size] for size in sorted(line)] for _, line in sorted(fastest.items())]


def _draw_line(above: Any, below: Any, group: Sequence[Result], colour: str) -> None:
    first = group[0].settings
    name = f"{first.session.precision}, decode {first.decode}"
    sizes = [one.settings.session.batch_size for one in group]
    above.plot(sizes, [one.images_per_s for one in group], "o-", color=colour, label=name)
    above.plot(
        sizes,
        [one.predicted.limit_images_per_s for one in group],
        "--",
        color=colour,
        label=f"its limit by decoding and inference ({name})",
    )
    for percentile, style in (("p50", "o-"), ("p95", "^:")):
        times_ms = [one.batch_ms[percentile] for one in group]
        below.plot(sizes, times_ms, style, color=colour, label=f"{percentile}, {name}")


def _mark_best(above: Any, best: Result) -> None:
    settings = best.settings
    session = settings.session
    above.plot(
        session.batch_size,
        best.images_per_s,
        "*",
        color="black",
        markersize=18,
        label=f"chosen: batch {session.batch_size} in parts of {session.part}, streams "
        f"{session.streams} x threads {session.threads}, workers {settings.workers}: "
        f"{best.images_per_s:,.1f} images/s",
    )


def _label(above: Any, below: Any, sizes: Sequence[int]) -> None:
    above.set_ylabel("throughput (images/s)")
    above.set_ylim(bottom=0)
    above.legend(loc="best", fontsize=10)
    below.set_ylabel("inference of one batch (ms)")
    below.set_yscale("log")
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_major_formatter("{x:g}")
    below.legend(loc="best", fontsize=10)
    below.set_xlabel("batch size (images)")
    below.set_xscale("log", base=2)
    below.set_xticks(sizes, [str(size) for size in sizes])
    below.minorticks_off()
