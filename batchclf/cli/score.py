"""`batchclf score`: a job's predictions compared with true labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from batchclf.cli.options import json_option, output_folder
from batchclf.cli.streams import as_lines, print_result

if TYPE_CHECKING:
    from batchclf.scoring.figures import ClassScore, Figures, Share
    from batchclf.scoring.score import Score

MAX_CLASSES = 20
MAX_PAIRS = 10
MAX_LEFT_OUT = 10


@click.command("score")
@click.argument("output")
@click.option(
    "--truth",
    required=True,
    metavar="TRUTH",
    help="Folder with a folder per class, .csv, .tsv or .jsonl file, or `input`: what stands "
    "beside the images in the input (WebDataset, Parquet).",
)
@click.option(
    "--allow-unmatched",
    is_flag=True,
    help="Leave out images without a true label that is a class of the model.",
)
@json_option("Print all figures as one JSON object.")
def command(output: str, truth: str, allow_unmatched: bool, as_json: bool) -> None:
    """Compare the predictions in OUTPUT, a folder or an address in a bucket, with true labels.

    Images are found by their paths, or else by file names that are unique. A table has the columns
    `path` and `label` (or `index`). Images that failed count as wrong. Intervals are Wilson's, of
    95%.

    \b
      batchclf score runs/night --truth photos
      batchclf score runs/night --truth truth.csv --json
    """
    import json
    from dataclasses import asdict

    from batchclf.scoring.score import score_output

    with output_folder(output) as folder:
        score = score_output(folder, truth, allow_unmatched=allow_unmatched)
    print_result(json.dumps(asdict(score)) if as_json else as_lines(*_lines(score)))


def _lines(score: "Score") -> Iterator[str]:
    figures = score.figures
    so_far = "" if score.num_done == score.num_images else f" of {score.num_images:,} so far"
    codes = "".join(f", {count:,} {code}" for code, count in figures.errors_by_code.items())
    yield f"truth:     {score.truth}"
    yield f"labels:    {score.labels}"
    yield f"names:     {_names(score)}"
    yield (
        f"images:    {score.num_done:,}{so_far}: {figures.num_images:,} scored, of which "
        f"{figures.num_errors:,} failed and count as wrong{codes}"
    )
    for one in score.left_out[:MAX_LEFT_OUT]:
        yield f"left out:  {one.num_images:,} images, such as {one.example}: {one.why}"
    if len(score.left_out) > MAX_LEFT_OUT:
        rest = score.left_out[MAX_LEFT_OUT:]
        yield f"left out:  {sum(one.num_images for one in rest):,} images for other reasons"
    yield from _overall(figures)
    yield ""
    yield from _classes(figures.classes)
    yield from _pairs(figures)


def _names(score: "Score") -> str:
    """How many were found and how; an example of each that is not written alike."""
    labels = {one.index: one.label for one in score.figures.classes}
    counts = Counter(one.how for one in score.names)
    examples = {one.how: f" ({one.name} → {labels[one.index]})" for one in reversed(score.names)}
    told = (
        f"{count:,} {how}{'' if how == 'exact' else examples[how]}"
        for how, count in counts.most_common()
    )
    return ", ".join(told)


def _overall(figures: "Figures") -> Iterator[str]:
    yield f"top 1:     {_share(figures.top1)}"
    if figures.num_errors:
        yield f"           {_share(figures.top1_of_ok)} of those that did not fail"
    less = "" if figures.depth == 5 else f" (of {figures.depth}: the job's top_k)"
    yield f"top 5:     {_share(figures.top5)}{less}"
    mean = figures.mean
    yield (
        f"mean:      precision {mean.precision:.4f}, recall {mean.recall:.4f}, F1 {mean.f1:.4f}, "
        "over the classes that have images"
    )
    if figures.calibration is None:
        yield "ECE:       none: there is no score, or one outside of 0 to 1"
    else:
        bins = len(figures.calibration.bins)
        yield f"ECE:       {figures.calibration.ece:.4f}, of {bins} bins of equal width"


def _share(one: "Share") -> str:
    return f"{one.value:.4f} ({one.low:.4f} to {one.high:.4f}), {one.num:,} of {one.of:,}"


def _classes(classes: "Sequence[ClassScore]") -> Iterator[str]:
    shown = list(classes)
    title = "class"
    if len(classes) > MAX_CLASSES:
        with_images = [one for one in classes if one.support]
        shown = sorted(with_images, key=lambda one: (one.f1, -one.support))[:MAX_CLASSES]
        title = f"class ({len(shown)} of {len(classes):,}, the worst; --json has all)"
    width = max(len(title), *(len(_cut(one.label)) for one in shown))
    yield f"{title:<{width}}  precision  recall      F1  support"
    for one in shown:
        yield (
            f"{_cut(one.label):<{width}}  {one.precision.value:>9.4f}  {one.recall.value:>6.4f}"
            f"  {one.f1:>6.4f}  {one.support:>7,}"
        )


def _pairs(figures: "Figures") -> Iterator[str]:
    """The classes most often taken for others."""
    labels = {one.index: _cut(one.label) for one in figures.classes}
    wrong = [
        (count, labels[truth], labels[predicted])
        for truth, predicted, count in figures.confusion
        if predicted is not None and truth != predicted
    ]
    if wrong:
        yield ""
        yield "most often taken for another:"
    for count, truth, predicted in sorted(wrong, key=lambda one: -one[0])[:MAX_PAIRS]:
        yield f"{count:>7,}  {truth} → {predicted}"


def _cut(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:39]}…"
