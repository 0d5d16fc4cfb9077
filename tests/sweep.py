"""Export every model of a library and measure how near ONNX Runtime is to PyTorch.

What `tests.sweep_torchvision` and `tests.sweep_timm` share. Each model is built with random
weights, exported and compared in a process of its own, so that its memory is returned. Results are
appended to `--results` (JSON, one line per model); run the same command again to go on where a
sweep stopped, or delete a line to measure that model anew. With `--keep`, rows of the page that
`--results` does not hold stay as they are.

Freshly built models hide errors: a head of zeros (ViT) or vanishing activations (MNASNet) give
logits that do not depend on the image, and a layer scale of 1e-6 (ConvNeXt) mutes whole blocks. So
each model is woken first: parameters that are constant (zero biases, norms of one) get noise, and
batch normalisation takes its statistics from the sample images.

That makes deep networks amplify rounding, so where a model is not within `LADDER[1]`, PyTorch's own
rounding is measured too, against float64: a difference of that order is no fault of the export. A
model that is refused when woken gets a second row, as built.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchclf.errors import ModelError
from batchclf.models import zoo
from batchclf.models.checks import sample_pixels, tiled
from batchclf.models.export import BuiltModel, export_model
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec

BATCH_SIZE = 4
LADDER = ((1e-6, 1e-6), (1e-5, 1e-5), (1e-4, 1e-5), (1e-3, 1e-4))
"""(rtol, atol), tight to loose; atol is in units of the model's largest |logit|."""
LEAST_SPREAD = 0.01
"""Below this change of the logits between images, a match says little."""
TIME_LIMIT_S = 2400.0
COLUMNS = (
    "model", "crop", "result", "within rtol / atol", "largest difference", "relative",
    "own rounding", "spread", "MB", "files", "export s", "peak GB",
)  # fmt: skip
AS_BUILT = " (as built)"
MATCHES = "matches"
NOT_RUN = "not run"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Swept:
    """A library whose models are swept."""

    library: str
    prefix: str
    """Of its models' names in a job."""
    names: Callable[[], list[str]]
    """In the order in which they are measured."""
    what: str
    page: str
    """Where the table is kept."""

    @property
    def packages(self) -> tuple[str, ...]:
        return ("torch", self.library, "onnx", "onnxscript", "onnxruntime")


@dataclass(slots=True)
class Row:
    """What came of one model; `error` is empty when it was exported and accepted."""

    name: str
    error: str = ""
    crop: int | None = None
    difference: float | None = None
    """Largest |ONNX Runtime - PyTorch| over the logits at all batch sizes tried."""
    largest: float | None = None
    """Largest |logit| of PyTorch."""
    spread: float | None = None
    """Largest change of a logit between the sample images, over the largest |logit|."""
    rung: int | None = None
    """The first step of `LADDER` that holds; `len(LADDER)` when none does."""
    rounding: float | None = None
    """Largest |PyTorch in float32 - in float64|, over the largest |logit|."""
    megabytes: float | None = None
    files: int | None = None
    export_s: float | None = None
    total_s: float | None = None
    peak_gb: float | None = None


def measure(swept: Swept, name: str) -> Row:
    """Build, export and compare one model in this process; it is woken unless named as built."""
    row = Row(name)
    started = time.perf_counter()
    outputs: list[Array] = []

    def recording_open(path: Path, output: str | None = None) -> Callable[[Array], Array]:
        run = open_reference(path)

        def record(array: Array) -> Array:
            outputs.append(run(array))
            return outputs[-1]

        return record

    with tempfile.TemporaryDirectory() as temporary:
        try:
            spec = ModelSpec(name=swept.prefix + name.removesuffix(AS_BUILT), weights="none")
            model = zoo.build(spec)
            row.crop = model.preprocess.crop[0]
            if not name.endswith(AS_BUILT):
                wake(model)
            expected_NK = _pytorch_logits(model)
            exporting = time.perf_counter()
            export_model(
                model, Path(temporary), batch_size=BATCH_SIZE, open_reference=recording_open
            )
            row.export_s = time.perf_counter() - exporting
        except ModelError as error:
            row.error = str(error).splitlines()[0]
        written = [path.stat().st_size for path in Path(temporary).iterdir()]
    if written:
        row.megabytes, row.files = sum(written) / 1e6, len(written)
    if outputs:
        _compare(row, outputs, expected_NK)
    row.peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if row.rung is not None and row.rung > 1 and row.largest:
        row.rounding = _rounding(model, expected_NK) / row.largest
    row.total_s = time.perf_counter() - started
    return row


def wake(model: BuiltModel) -> None:
    """Make the logits depend on every parameter and on the image; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    norms = [part for part in model.module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # plain average over the batches seen: here, one
            norm.train()
        if norms:
            model.module(_normalised(model))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.module.eval()


def _normalised(model: BuiltModel) -> Tensor:
    """The sample as torchvision's transforms hand it over: written out apart from the export."""
    assert model.preprocess.mean is not None
    assert model.preprocess.std is not None
    images_NCHW = torch.from_numpy(sample_pixels(*model.preprocess.crop)).permute(0, 3, 1, 2) / 255
    mean_C11 = torch.tensor(model.preprocess.mean).view(3, 1, 1)
    std_C11 = torch.tensor(model.preprocess.std).view(3, 1, 1)
    return (images_NCHW - mean_C11) / std_C11


def _pytorch_logits(model: BuiltModel) -> Array:
    with torch.inference_mode():
        logits_NK: Array = model.module(_normalised(model)).numpy()
    return logits_NK


def _rounding(model: BuiltModel, logits_NK: Array) -> float:
    """How far PyTorch's float32 logits are from float64's; leaves the model in float64."""
    with torch.inference_mode():
        exact_NK = model.module.double()(_normalised(model).double()).numpy()
    return float(np.abs(logits_NK - exact_NK).max())


def _compare(row: Row, outputs: Sequence[Array], expected_NK: Array) -> None:
    """Fill in how far `outputs`, one per batch size, are from the expected rows."""
    found = np.concatenate(outputs)
    expected = np.concatenate([tiled(expected_NK, len(output)) for output in outputs])
    if found.shape != expected.shape:
        return  # then `error` says so
    row.largest = largest = float(np.abs(expected).max())
    if not np.isfinite(found).all() or not 0 < largest < np.inf:
        row.error = row.error or "logits are all zero, NaN or infinite"
        return
    row.difference = float(np.abs(found - expected).max())
    row.spread = float(np.ptp(expected_NK, axis=0).max()) / largest
    row.rung = len(LADDER)
    for rung, (rtol, atol) in reversed(list(enumerate(LADDER))):
        if np.allclose(found, expected, rtol=rtol, atol=atol * largest):
            row.rung = rung


def sweep(
    swept: Swept,
    names: Sequence[str],
    results: Path,
    time_limit_s: float,
    after_each: Callable[[], None],
) -> None:
    """Measure the models that `results` does not hold yet, each in a process of its own."""
    done = read_results(results)
    for number, name in enumerate(names, 1):
        if name in done:
            continue
        rows = [_measure_apart(swept, name, time_limit_s)]
        if rows[0].error and rows[0].difference is not None:
            rows.append(_measure_apart(swept, name + AS_BUILT, time_limit_s))
        with results.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        for row in rows:
            print(f"{number}/{len(names)} {row.name}: {_result(row)}, {row.total_s or 0:.0f} s")
        sys.stdout.flush()
        after_each()


def _measure_apart(swept: Swept, name: str, time_limit_s: float) -> Row:
    command = [sys.executable, "-m", f"tests.sweep_{swept.library}", "--measure", name]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=time_limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Row(name, error=f"not done after {time_limit_s:g} s")
    if child.returncode < 0:
        return Row(name, error=f"killed by signal {-child.returncode} (9: out of memory?)")
    if child.returncode > 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        return Row(name, error=lines[-1])
    return Row(**json.loads(child.stdout.splitlines()[-1]))


def read_results(results: Path) -> dict[str, Row]:
    """The rows measured so far, by name."""
    if not results.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in results.read_text().splitlines()]
    return {row.name: row for row in rows}


def kept_lines(swept: Swept, text: str) -> dict[str, str]:
    """The lines of a page's table, by model, of those that were run.

    Raises:
        ValueError: the page was made with other versions of the libraries.
    """
    if _versions(swept) not in text:
        raise ValueError(f"the page was not made with {_versions(swept)}; measure all models anew")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {_cells(line)[0]: line for line in lines[1:] if _cells(line)[2] != NOT_RUN}


def _versions(swept: Swept) -> str:
    return ", ".join(f"{name} {version(name)}" for name in swept.packages)


def _cells(line: str) -> list[str]:
    return line.removeprefix("| ").split(" | ")


def page(swept: Swept, names: Sequence[str], rows: dict[str, Row], kept: dict[str, str]) -> str:
    """The markdown page: one table row per model, in alphabetical order.

    `kept` has lines of an earlier page, for models that are not in `rows`.
    """
    table = kept | {name: _line(row) for name, row in rows.items()}
    num_run = sum(name in table for name in names)
    accepted = sum(name in table and _cells(table[name])[2].startswith(MATCHES) for name in names)
    of_all = f"{len(names)} models export"
    if num_run < len(names):
        left = f"the other {len(names) - num_run} of {len(names)} were not run"
        of_all = f"the {num_run} models that were run export ({left})"
    lines = [
        f"# {swept.what}, exported",
        "",
        f"{accepted} of {of_all} with a dynamic batch axis and give PyTorch's "
        f"logits at batch sizes 1, 2, 3 and {BATCH_SIZE}, with random weights, on the CPU. A model "
        "that gives other logits is refused at export.",
        "",
        f"Made on {datetime.now(UTC):%Y-%m-%d} with "
        + _versions(swept)
        + ". To make it again (tests/sweep.py says how the weights are drawn):",
        "",
        f"    python -m tests.sweep_{swept.library} --output {swept.page}",
        "",
        "- **within**: the tightest of "
        + ", ".join(f"{rtol:.0e} / {atol:.0e}" for rtol, atol in LADDER)
        + " that holds for every logit: |difference| <= atol x largest + rtol x |logit|.",
        "- **relative**: the largest difference over the model's largest |logit|.",
        "- **own rounding**: PyTorch in float32 against float64, over the largest |logit|; "
        f"measured where {LADDER[1][0]:.0e} / {LADDER[1][1]:.0e} does not hold. A relative "
        "difference of that order is explained by rounding, which random weights can amplify.",
        "- **spread**: the largest change of a logit between the three sample images, over the "
        f"largest |logit|; below {LEAST_SPREAD} a match says little.",
        "- **export s**: writing model.onnx and checking it at four batch sizes.",
        "- **files**: 2 where the weights lie beside the graph, as they must above 2 GB.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    table = {name: _line(Row(name, error=NOT_RUN)) for name in names} | table
    lines += [table[name] for name in sorted(table)]
    return "\n".join(lines) + "\n"


def _result(row: Row) -> str:
    if row.error:
        return row.error.replace("|", r"\|")
    return MATCHES if (row.spread or 0) >= LEAST_SPREAD else f"{MATCHES}, but hardly sees the image"


def _line(row: Row) -> str:
    within = ""
    if row.rung is not None:
        steps = [f"{rtol:.0e} / {atol:.0e}" for rtol, atol in LADDER]
        within = [*steps, "none"][row.rung]
    relative = row.difference / row.largest if row.difference is not None and row.largest else None
    cells = [
        row.name, _figure(row.crop, "d"), _result(row), within, _figure(row.difference, ".1e"),
        _figure(relative, ".1e"), _figure(row.rounding, ".1e"), _figure(row.spread, ".2f"),
        _figure(row.megabytes, ",.0f"), _figure(row.files, "d"), _figure(row.export_s, ".0f"),
        _figure(row.peak_gb, ".1f"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(swept: Swept) -> None:
    """Parse the command line and sweep, or measure one model for the sweep."""
    parser = argparse.ArgumentParser(description=f"Export {swept.what} and compare.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--results", type=Path, default=Path(f"sweep_{swept.library}.jsonl"))
    parser.add_argument("--output", type=Path, help="markdown page, written anew after each model")
    parser.add_argument("--keep", action="store_true", help="the other rows of the page")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(asdict(measure(swept, arguments.measure))))
        return
    known = swept.names()
    kept = kept_lines(swept, arguments.output.read_text()) if arguments.keep else {}

    def write_page() -> None:
        if arguments.output:
            rows = read_results(arguments.results)
            arguments.output.write_text(page(swept, known, rows, kept))

    names = arguments.only or known
    sweep(swept, names, arguments.results, arguments.time_limit, write_page)
    write_page()
