"""A report as HTML: one file that shows itself, runs only its own script and asks for nothing.

Whatever others wrote (names of files, labels, messages) is escaped twice: it cannot leave its place
in the HTML, nor turn the direction of text or hide in it.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchclf import __version__
from batchclf.commands.report import charts
from batchclf.commands.report.confusion import confusions_of
from batchclf.commands.report.digest import ClassCount, Digest
from batchclf.commands.report.gallery import Card, Pictures
from batchclf.commands.report.pace import Pace
from batchclf.commands.status import Status
from batchclf.results.records import precision_name
from batchclf.results.run_record import RunRecord, now
from batchclf.scoring.figures import ClassScore, Share
from batchclf.scoring.score import Score
from batchclf.spec.input import shown
from batchclf.spec.job import recorded_job
from batchclf.system.text import escaped
from batchclf.system.words import duration, images

MAX_TEXT = 160
"""Characters of a name, a label or a message."""
MAX_CLASSES = 1000
_ADVICE = {
    "decode": "Reading and decoding images limited its last run: <code>batchclf tune</code> finds "
    "the best number of workers, and <code>loader.decode: fast</code> reads large JPEGs at a "
    "fraction of the cost.",
    "infer": "The model limited its last run: <code>batchclf tune</code> finds the best batch size "
    "and streams, and a reduced <code>precision</code> is checked against fp32 before it is used.",
    "write": "Writing records limited its last run: give an <code>output</code> on a faster disk.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """All that a report is made of."""

    record: RunRecord
    status: Status
    digest: Digest
    cards: Sequence[Card]
    pictures: Pictures
    paces: Sequence[Pace]
    """Of the shards that have figures."""
    score: Score | None
    """None: true labels are not known."""
    labels: Mapping[int, str]
    """Of classes, where true labels are known."""


@dataclass(frozen=True, slots=True)
class _ClassRow:
    """One class in the table: how often it was predicted, and how right that was."""

    label: str
    index: int
    count: ClassCount | None
    """None: it was never predicted."""
    score: ClassScore | None
    """None: nothing is known of true labels."""


def page_html(page: Page) -> bytes:
    """The page, whole."""
    style, script = _part("report.css"), _part("report.js")
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            input=shown(recorded_job(page.record.job).input),
            style=Markup(style),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            style_hash=_hash(style),
            script_hash=_hash(script),
            charts=_charts(page),
            images_per_s=_images_per_s(page),
            advice=Markup(_ADVICE.get(_bottleneck(page) or "", "")),  # noqa: S704 - our own text
            rows=(rows := list(_rows(page)))[:MAX_CLASSES],
            num_rows=len(rows),
            most=max((row.count.num_images for row in rows if row.count), default=1),
            gallery_labels=_gallery_labels(page.cards),
            confusions=None if page.score is None else confusions_of(page.score.figures),
            precision=precision_name(page.record.precision, page.record.precision_check),
            job=_job(page.record),
            written_at=now(),
            version=__version__,
        )
    )
    return html.encode("utf-8", "backslashreplace")


def _part(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an element by its text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchclf.commands.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "text": _text,
        "count": "{:,}".format,
        "images": images,
        "percent": lambda share: f"{100 * share:.1f} %",
        "score": "{:.3f}".format,
        "duration": _duration,
        "interval": _interval,
        "picture": lambda jpeg: f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
    }
    return environment


def _text(value: object) -> str:
    """What others wrote, on one line, without what drives or hides text, and not too long."""
    text = escaped(str(value))
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _interval(one: Share) -> str:
    return f"{100 * one.low:.1f} to {100 * one.high:.1f} %"


def _charts(page: Page) -> dict[str, Markup]:
    """Those of which there is something to draw."""
    found: dict[str, str] = {}
    if page.paces:
        found["throughput"] = charts.throughput(page.paces)
    if len(page.paces) == 1:
        found["stages"] = charts.stages(page.paces[0])
    if page.digest.num_ok and page.digest.has_probabilities:
        found["scores"] = charts.scores(page.digest.bins)
    if page.score is not None and page.score.figures.calibration is not None:
        found["calibration"] = charts.calibration(page.score.figures.calibration)
    return {name: Markup(svg) for name, svg in found.items()}  # noqa: S704 - no text of others


def _images_per_s(page: Page) -> float | None:
    """Over all runs, as it is drawn; of shards, that of those at work together."""
    if len(page.status.parts) == len(page.paces) == 1:
        return page.paces[0].images_per_s
    return page.status.images_per_s


def _bottleneck(page: Page) -> str | None:
    """Of the last run of the job, or of most of its shards."""
    named = Counter(part.bottleneck for part in page.status.parts if part.bottleneck is not None)
    return named.most_common(1)[0][0] if named else None


def _rows(page: Page) -> Iterator[_ClassRow]:
    """Classes that were predicted, the most frequent first; then those that should have been."""
    figures = () if page.score is None else page.score.figures.classes
    scores = {one.index: one for one in figures}
    for count in page.digest.classes():
        yield _ClassRow(count.label, count.index, count, scores.pop(count.index, None))
    for score in sorted(scores.values(), key=lambda one: -one.support):
        yield _ClassRow(score.label, score.index, None, score)


def _gallery_labels(cards: Sequence[Card]) -> list[tuple[int, str, int]]:
    """Index and label of each class that a shown image has on top, and of how many; by label."""
    counts: Counter[tuple[int, str]] = Counter()
    for card in cards:
        for top in card.example.line.get("predictions", ())[:1]:
            counts[top["index"], top["label"]] += 1
    found = [(index, label, count) for (index, label), count in counts.items()]
    return sorted(found, key=lambda one: (one[1].casefold(), one[0]))


def _job(record: RunRecord) -> str:
    """The resolved job, without keys that say nothing."""
    return _escaped_lines(json.dumps(_said(record.job), indent=2, ensure_ascii=False))


def _said(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _said(one) for key, one in value.items() if one is not None}
    return value


def _escaped_lines(text: str) -> str:
    """Text of several lines, each `escaped`."""
    return "\n".join(map(escaped, text.split("\n")))
