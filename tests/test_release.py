"""What a release is made of: its version, the changes, workflows and forms as GitHub takes them."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchclf import __version__
from tests.conftest import ROOT, Batchclf
from tests.test_wheel import PYTHONS

GITHUB = ROOT / ".github"
SCHEMAS = {"workflows": "vendor.github-workflows", "CITATION.cff": "vendor.citation-file-format"}
CHANGES = (ROOT / "CHANGELOG.md").read_text()
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""The kinds of changes of https://keepachangelog.com/en/1.1.0/, in its order."""


def releases() -> dict[str, str]:
    """What has changed in each release, the newest first, by the heading of it."""
    parts = re.split(r"^## (.+)\n", CHANGES, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_newest_release_of_the_changelog_is_this_version_with_its_date() -> None:
    unreleased, newest, *earlier = releases()
    assert unreleased == "[Unreleased]"
    assert newest.startswith(f"[{__version__}] - ")
    for heading in (newest, *earlier):
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading)


def test_the_changelog_tells_changes_by_kind() -> None:
    for heading, changes in releases().items():
        kinds = re.findall(r"^### (.+)$", changes, re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds], heading
        first_change = changes.find("\n- ")
        assert first_change < 0 or 0 <= changes.find("### ") < first_change, heading


def test_the_version_is_written_in_one_place() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    assert "\nversion = attr: batchclf.__version__\n" in setup
    elsewhere = [
        path.name
        for path in (ROOT / "setup.py", ROOT / "pyproject.toml", GITHUB / "CITATION.cff")
        if __version__ in path.read_text()
    ]
    assert elsewhere == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_file_for_github_is_of_its_published_schema(kind: str) -> None:
    pytest.importorskip("check_jsonschema")
    found = GITHUB / kind
    files = sorted(found.glob("*.yml")) if found.is_dir() else [found]
    assert files
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[kind], *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def jobs(workflow: str) -> dict[str, Any]:
    """The jobs of a workflow by name."""
    found: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / workflow).read_text())["jobs"]
    return found


def scripts(workflow: str) -> str:
    """All that a workflow's jobs run in a shell."""
    steps = [step for job in jobs(workflow).values() for step in job.get("steps", ())]
    return "\n".join(step["run"] for step in steps if "run" in step)


def test_what_the_workflows_run_and_call_is_there() -> None:
    for workflow in ("test.yml", "release.yml"):
        paths = re.findall(r"(?<![\w/.$-])\.?[\w-]+/[\w./-]+\w", scripts(workflow))
        called = [job["uses"] for job in jobs(workflow).values() if "uses" in job]
        assert paths + called
        assert [one for one in (*paths, *called) if not (ROOT / one).exists()] == []
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".ci/run" in scripts("test.yml")


def test_a_tag_that_is_not_the_version_is_no_release() -> None:
    (check,) = re.findall(r"^test .+$", scripts("release.yml"), re.M)
    for tag, code in ((f"v{__version__}", 0), ("v0.0.1", 1)):
        env = {**os.environ, "GITHUB_REF_NAME": tag}
        assert (
            subprocess.run(["bash", "-c", check], cwd=ROOT, env=env, check=False).returncode == code
        )


def test_nothing_is_published_that_was_not_tested() -> None:
    found = jobs("release.yml")
    assert set(found["publish"]["needs"]) == set(found) - {"publish", "images"}
    assert found["images"]["needs"] == "publish"


def test_the_quick_start_is_tried_on_every_python_that_setup_cfg_names() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)$", setup, re.M)
    assert jobs("test.yml")["pythons"]["strategy"]["matrix"]["python"] == named
    assert tuple(named) == PYTHONS
    typed = scripts("test.yml").splitlines()[-1].replace("| bash -eux", "")
    line = subprocess.run(
        ["bash", "-c", typed], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert line.stdout.count("\n") == 1
    assert "'.[cpu]'" in line.stdout


def test_a_wheel_that_was_built_is_tried_by_a_command_that_works(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    name, *arguments = shlex.split(told["test-command"].replace("{project}", str(ROOT)))
    assert name == "batchclf"
    assert batchclf(*arguments, "-o", tmp_path / "out").exit_code == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 300


def test_a_release_builds_every_image_of_the_dockerfile() -> None:
    builds = jobs("release.yml")["images"]["strategy"]["matrix"]["include"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    args = {build["target"]: build.get("args", "") for build in builds}
    assert set(args) <= set(re.findall(r"^FROM .+ AS ([a-z]+)$", dockerfile, re.M))
    assert set(args) == {"cpu", "gpu", "openvino"}
    given = dict(line.split("=") for line in "".join(args.values()).splitlines())
    assert set(given) <= set(re.findall(r"^ARG ([A-Z_]+)=", dockerfile, re.M))
    assert f"PYTHON_IMAGE={given['PYTHON_IMAGE']}" in dockerfile, "as the Dockerfile advises"
    assert given["INTEL_GPU"] == "1", "no image without what it is for"


@pytest.mark.parametrize(
    "form", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: str(form.name)
)
def test_a_form_asks_for_what_is_needed(form: Path) -> None:
    asked = yaml.safe_load(form.read_text())
    assert asked["name"]
    assert asked["description"]
    ids = [one["id"] for one in asked["body"]]
    assert len(set(ids)) == len(ids) > 0


@pytest.mark.parametrize("page", sorted(GITHUB.glob("*.md")), ids=lambda page: str(page.name))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / target.partition("#")[0]).exists(), target
