"""What a release is made of: its version, the changes, workflows and forms as GitHub takes them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from batchclf import __version__
from tests.conftest import ROOT

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


def test_a_release_builds_every_image_of_the_dockerfile() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())
    targets = workflow["jobs"]["images"]["strategy"]["matrix"]["target"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(targets) <= set(re.findall(r"^FROM .+ AS ([a-z]+)$", dockerfile, re.M))
    assert set(targets) == {"cpu", "gpu", "openvino"}


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
