"""Every command, job and key of the README and of the guide works as it stands there."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from batchclf import errors
from batchclf.cli import COMMANDS
from batchclf.errors import JobFileError
from batchclf.results.codes import ERROR_CODES, WARNING_CODES
from batchclf.spec.file import load_job, parse_set
from batchclf.spec.job import JobSpec
from batchclf.system.interrupt import SIGNALS
from tests.conftest import ROOT, Batchclf
from tests.run.test_keys import keys_of

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = {"README.md": README} | {
    page.relative_to(ROOT).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))
}
WHOLE = "\n".join(PAGES.values())
CONSOLE = [
    line
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
PROSE = re.sub(r"^```.*?^```$", "", WHOLE, flags=re.DOTALL | re.MULTILINE)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
INLINE = list(dict.fromkeys(span for span in SPANS if span.startswith("batchclf ")))
BLOCKS = {
    f"{page} {number}": block
    for page, text in PAGES.items()
    if page not in ("docs/images.md", "docs/models.md")  # run by test_forms.py, test_own_model.py
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
}
TUNE = [command for command in INLINE if command.startswith("batchclf tune ")]
INIT = "batchclf init job.yaml -i photos"
TAKES_A_JOB = ("run", "validate", "export", "verify", "tune")
RANDOM_WEIGHTS = ("--set", "model.weights=none", "--set", "model.name=resnet18")
"""In place of a download."""


def test_the_quick_start_is_three_lines_that_ci_runs() -> None:
    lines = [line for line in CONSOLE if line.startswith("python3 -m venv ")]
    assert len(lines) == 3
    assert [line for line in CONSOLE if not line.startswith("batchclf ")] == lines
    assert "grep '^python3 -m venv ' \"$root/README.md\"" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "commands",
    [
        [line for line in CONSOLE if line.startswith("batchclf ")],
        [INIT, *(one for one in INLINE if one not in TUNE and not one.startswith("batchclf init"))],
    ],
    ids=["console", "inline"],
)
def test_the_commands_of_the_pages_run_as_they_stand(
    commands: list[str], batchclf: Batchclf, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    assert len(commands) >= 3
    for command in commands:
        arguments = command.split()[1:]
        if arguments[0] in TAKES_A_JOB:
            arguments += RANDOM_WEIGHTS
        done = batchclf(*arguments, cwd=tmp_path)
        assert done.exit_code == 0, f"{command}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("command", TUNE)
def test_the_tuning_of_the_pages_runs_as_it_stands_but_for_its_time(
    command: str, batchclf: Batchclf, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    assert batchclf(*INIT.split()[1:], cwd=tmp_path).exit_code == 0
    shorter = ("--budget", "15")  # the last one counts
    done = batchclf(*command.split()[1:], *RANDOM_WEIGHTS, *shorter, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "written into job.yaml" in done.stderr


# ---- options and keys in the prose ---------------------------------------------------------------


def options_in(text: str) -> list[tuple[str, list[str]]]:
    """The options in code spans, as (command or empty, the arguments with them)."""
    found = []
    for span in re.findall(r"`([^`]+)`", text):
        first, *rest = span.replace("batchclf ", "", 1).split()
        if first in COMMANDS:
            found.append((first, rest))
        elif first.startswith("-") and first not in OF_OTHERS:
            found.append(("", [first, *rest]))
    return [(name, words) for name, words in found if any(one[0] == "-" for one in words)]


OF_OTHERS = ("--build-arg",)
"""Options of other commands that stand by themselves: of docker."""


def is_accepted(name: str, words: list[str]) -> bool:
    """Whether a command takes these arguments, and the job the keys that they set."""
    module = importlib.import_module(f"batchclf.cli.{name}")
    takes_a_job = any(isinstance(one, click.Argument) for one in module.command.params)
    given = ["jobs/cpu.yaml", *words] if takes_a_job and words[0].startswith("-") else [*words]
    try:
        context = module.command.make_context(name, given)
        sets = [parse_set(one) for one in context.params.get("sets", ())]
        load_job(ROOT / "jobs" / "cpu.yaml", sets)
    except (click.ClickException, JobFileError):
        return False
    return True


def refused(text: str) -> list[str]:
    """The options in a text that no command takes, or not the one that they stand with."""
    return [
        " ".join([name, *words]).strip()
        for name, words in options_in(text)
        if not any(is_accepted(one, words) for one in ([name] if name else COMMANDS))
    ]


def test_every_option_in_the_prose_is_one() -> None:
    assert len(options_in(PROSE)) >= 10
    assert refused(PROSE) == []


@pytest.mark.parametrize(
    "text",
    [
        "`run --retry-errors` tries again",
        "`--retry-errors`",
        "`--set loader.threads=8`",
        "`batchclf tune job.yaml --budgets 60`",
        "`-q 64`",
        "`validate --retry-failed`",
        "`--budget soon`",
    ],
)
def test_an_invented_option_would_be_noticed(text: str) -> None:
    assert len(refused(text)) == 1


def keys_in(text: str) -> list[str]:
    """What stands, as code or in bold, like a key of the job file that lies deeper."""
    spans = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`]*)?`", text.replace("**", "`"))
    files = (".txt", ".json", ".jsonl")
    return [
        one
        for one in spans
        if one.split(".")[0] in JobSpec.model_fields and not one.endswith(files)
    ]


def test_every_key_in_the_prose_is_one() -> None:
    assert keys_in("`loader.threads: 8`, `loader.workers`") == ["loader.threads", "loader.workers"]
    assert len(keys_in(PROSE)) >= 4
    assert set(keys_in(PROSE)) <= set(keys_of(JobSpec))


def test_the_program_of_the_guide_runs_as_it_stands(batchclf: Batchclf, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", WHOLE, re.DOTALL)
    shutil.copytree(ROOT / "samples" / "photos", tmp_path / "photos")
    assert batchclf("init", "job.yaml", "-i", "photos", cwd=tmp_path).exit_code == 0
    job = tmp_path / "job.yaml"
    text = job.read_text()
    found = load_job(job)
    assert found.model.name is not None
    text = text.replace(f"name: {found.model.name}", "name: resnet18")
    job.write_text(text.replace("weights: DEFAULT", "weights: none"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_photos = len(list((tmp_path / "photos").iterdir()))
    assert done.stdout.startswith(f"{num_photos} of {num_photos}\n")
    assert len(done.stdout.splitlines()) == 1 + num_photos


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert (ROOT / file).exists(), target
        assert not heading or heading in headings(ROOT / file), target


def headings(page: Path) -> set[str]:
    """What links to the sections of a page end with."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in found}


# ---- figures and pictures ------------------------------------------------------------------------

PEERS = {
    "batchclf, fp32": "batchclf cpu fp32",
    "A loop, one image at a time": "tutorial loop",
    "torch's DataLoader, ONNX Runtime": "DataLoader + ONNX Runtime",
    "OpenVINO's own queue, batch 8": "OpenVINO async f32, batch 8",
    "Ray Data, on one machine": "Ray Data",
    "timm's `inference.py`": "timm's inference.py",
}
"""The rows of the README's table that were measured, and what the results call them."""


def measured(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A file of results of MobileNetV2, and its rows by contestant."""
    found = json.loads((ROOT / "tests" / "benchmarks" / "results" / name).read_text())
    rows = {row["contestant"]: row for row in found["rows"] if row["model"] == "mobilenet_v2"}
    return found, rows


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    why = " ".join(README.partition("## Why not a loop?")[2].partition("\n## ")[0].split())
    found, rows = measured("throughput-peers.json")
    for name, contestant in PEERS.items():
        row = rows[contestant]
        assert f"| {name} | {row['images_per_s']:.1f} | {row['peak_mb']:,} MB |" in why
    assert f"{found['num_images']:,} photos" in why
    machine = found["machine"]
    told = f"{machine['usable_cores']} cores of an {machine['cpu']} on {found['date']};"
    assert told in why
    later, rows = measured("throughput.json")
    speeds = [rows[f"batchclf cpu {one}"]["images_per_s"] for one in ("fp32", "int8")]
    peer = rows["OpenVINO async f32, batch 1"]["images_per_s"]
    assert (
        f"On {later['num_images']:,} photos and an {later['machine']['cpu']}, batchclf did "
        f"{speeds[0]:.1f} images/s on {later['date']}, at int8 {speeds[1]:.1f}, and OpenVINO "
        f"{peer:.1f} (batch 1)."
    ) in why


def test_the_pictures_are_small_have_words_for_who_does_not_see_them_and_are_all_shown() -> None:
    shown = {target: words for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", README)}
    pictures = sorted((DOCS / "pictures").iterdir())
    assert sorted(shown) == [one.relative_to(ROOT).as_posix() for one in pictures]
    assert all(shown.values())
    assert sum(one.stat().st_size for one in pictures) < 300_000
    assert "<script" not in (DOCS / "pictures" / "terminal.svg").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("block", BLOCKS)
def test_a_job_of_the_guide_is_one(block: str) -> None:
    whole = {"input": "photos", "output": "results", "model": {"name": "resnet18"}}
    job = JobSpec.model_validate({**whole, **yaml.safe_load(BLOCKS[block])})
    assert job.input


# ---- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_the_site_has_every_page_and_asks_no_other_server(site: Path) -> None:
    pages = [page.relative_to(DOCS).with_suffix("") for page in DOCS.rglob("*.md")]
    for page in pages:
        built = (site / ("" if page.name == "index" else page) / "index.html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", built)
        loaded += re.findall(r"<link[^>]* rel=[\"']?stylesheet[^>]* href=[\"']?([^\"' >]+)", built)
        assert loaded
        assert [one for one in loaded if "//" in one] == [], page


def test_the_site_lists_every_key_and_every_code(site: Path) -> None:
    keys = (site / "reference" / "job" / "index.html").read_text()
    assert [key for key in keys_of(JobSpec) if f"<code>{key}</code>" not in keys] == []
    codes = (site / "reference" / "codes" / "index.html").read_text()
    shown = [*ERROR_CODES, *WARNING_CODES, "loader.max_seconds"]
    assert [code for code in shown if f"<code>{code}</code>" not in codes] == []


def test_the_site_lists_every_exit_code() -> None:
    table = (DOCS / "reference" / "codes.md").read_text().partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.M)
    told = {int(code) for row in rows for code in row.split(",")}
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    own = {one.exit_code for one in kinds if issubclass(one, errors.BatchclfError)}
    assert told == {0, *own, *(128 + number for number in SIGNALS)}


def test_every_command_has_help_and_an_example_or_needs_none(batchclf: Batchclf) -> None:
    overview = batchclf("--help").stdout
    for name in COMMANDS:
        assert name in overview
        done = batchclf(name, "--help")
        assert done.exit_code == 0
        assert f"batchclf {name}" in done.stdout
