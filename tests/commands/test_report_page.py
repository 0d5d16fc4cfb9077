"""A report in a real browser: quiet, harmless, readable by all, and filtered by mouse and keyboard.

Needs Chromium (Debian's package `chromium`), playwright (`pip install playwright`), and for one
test axe-core (`npm install axe-core`, in the repository's folder or one above it).
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from batchclf.commands.report.report import report_output
from batchclf.models.labels import imagenet_labels
from tests.commands.hostile import write_hostile
from tests.conftest import BY_HAND, PHOTOS, ROOT, data
from tests.outputs import predicted, write_output
from tests.tiny import DIGITS, run_here, write_tiny_job

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WITH_PEAK = """
import re, sys
from batchclf.cli import main
main(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
"""Runs a command, and tells its peak memory in KiB; that of a child counts the parent's as well."""
SIZES_AND_THEMES = [(width, theme) for width in (390, 1280) for theme in ("light", "dark")]
AXE = next(
    (
        found
        for folder in (ROOT, *ROOT.parents)
        if (found := folder / "node_modules" / "axe-core" / "axe.min.js").exists()
    ),
    None,
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, path: Path, width: int = 1280, **options: Any) -> Iterator[Any]:
    """A page in the browser, which logs nothing, meets no error and asks for nothing else."""
    page = chromium.new_page(viewport={"width": width, "height": 800}, **options)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert page.url.partition("#")[0] == path.as_uri()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a job over 300 digits, one of them broken, with true labels."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(DIGITS, folder / "in")
    sorted((folder / "in").rglob("*.jpg"))[7].write_bytes(b"no image")
    run_here(write_tiny_job(folder, input=str(folder / "in")))
    report_output(folder / "out", folder / "page.html", truth=str(folder / "in"))
    return folder / "page.html"


@pytest.fixture(scope="module")
def hostile(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of images whose names and labels try to run something."""
    folder = tmp_path_factory.mktemp("hostile")
    out = write_hostile(template, folder / "out")
    report_output(out, folder / "page.html", truth=str(out / "truth.jsonl"))
    return folder / "page.html"


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [*(("report", *one) for one in SIZES_AND_THEMES), ("hostile", 390, "light")],
)
def test_nothing_is_logged_asked_for_or_wider_than_the_window(
    name: str, width: int, theme: str, chromium: Any, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    with opened(chromium, path, width, color_scheme=theme) as page:
        beyond = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, .skip')"
            " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)"
        )
        assert beyond == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        margins = page.evaluate(
            "[...document.querySelectorAll('h1, section, footer p')].map(one =>"
            " one.getBoundingClientRect()).map(one => Math.min(one.left, innerWidth - one.right))"
        )
        assert min(margins) >= 12
        charts = page.locator("figure svg")
        assert charts.count() >= 2
        for text in charts.locator("text").all():
            colour = text.evaluate("one => getComputedStyle(one).fill")
            assert colour == page.evaluate("getComputedStyle(document.body).color")


def test_names_and_labels_run_nothing_whatever_is_done_with_them(
    hostile: Path, chromium: Any
) -> None:
    with opened(chromium, hostile) as page:
        for card in page.locator(".card:visible").all():
            card.hover()
            card.click()
        for pick in page.locator(".pick").all():
            pick.click()
        page.locator("#filter-reset").click()
        for _ in range(60):
            page.keyboard.press("Tab")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.dataset.harmed") is None
        assert page.locator("iframe, form, a[href^=java], img[src^=http]").count() == 0


@pytest.mark.skipif(AXE is None, reason="axe-core is not installed: npm install axe-core")
@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_serious(width: int, theme: str, report: Path, chromium: Any) -> None:
    assert AXE is not None
    with opened(chromium, report, width, color_scheme=theme) as page:
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    serious = [
        (one["id"], one["nodes"][0]["html"])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_pictures_are_filtered_with_the_mouse(report: Path, chromium: Any) -> None:
    with opened(chromium, report) as page:
        cards, visible = page.locator(".card"), page.locator(".card:visible")
        total = cards.count()
        assert visible.count() == 42 < total
        page.locator("#more").click()
        assert visible.count() == min(84, total)
        page.locator("#filter-status").select_option("error")
        assert visible.count() == 1
        assert "not_an_image" in visible.inner_text()
        page.locator("#filter-reset").click()
        page.locator(".pick").first.click()
        label = page.locator(".pick").first.get_attribute("data-label")
        found = {card.get_attribute("data-label") for card in visible.all()}
        assert found == {label}
        page.locator("#filter-reset").click()
        page.locator("#filter-kind").select_option("mistake")
        page.locator("#filter-low").fill("0.3")
        page.locator("#filter-high").fill("0.9")
        scores = [float(card.get_attribute("data-score")) for card in visible.all()]
        assert scores
        assert all(0.3 <= score <= 0.9 for score in scores)
        page.locator("#filter-low").fill("0.95")
        assert page.locator("#none").is_visible()


def test_pictures_are_filtered_with_the_keyboard_alone(report: Path, chromium: Any) -> None:
    with opened(chromium, report) as page:
        visible = page.locator(".card:visible")

        def go_to(element: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement.id") == element:
                    return
            raise AssertionError(f"{element} is never reached")

        go_to("filter-status")
        page.keyboard.type("error")
        assert visible.count() == 1
        assert page.locator("#filter-count").inner_text().startswith("1 of ")
        go_to("filter-reset")
        page.keyboard.press("Enter")
        assert visible.count() == 42
        go_to("more")
        page.keyboard.press("Enter")
        assert visible.count() > 42
        first = page.evaluate(
            "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        )
        assert first == 42, "it goes on with the first of those that were added"


def test_the_theme_can_be_changed_and_follows_the_system_until_then(
    report: Path, chromium: Any
) -> None:
    with opened(chromium, report, color_scheme="dark") as page:
        colour = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(colour)
        page.locator("#theme").click()
        light = page.evaluate(colour)
        assert light != dark
        page.emulate_media(color_scheme="light")
        assert page.evaluate(colour) == light


def test_without_scripts_all_is_shown(report: Path, chromium: Any) -> None:
    with opened(chromium, report, java_script_enabled=False) as page:
        cards = page.locator(".card")
        assert page.locator(".card:visible").count() == cards.count()
        assert page.locator("#filters:visible, #theme:visible, #more:visible").count() == 0


def pages_cpu_s(chromium: Any) -> float:
    """The CPU time of all processes that show pages, until now."""
    session = chromium.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return sum(float(one["cpuTime"]) for one in processes if one["type"] == "renderer")


@BY_HAND
def test_a_million_records_are_a_page_of_10_mb_that_opens_with_2_s_of_cpu_time(
    template: Path, tmp_path: Path, chromium: Any
) -> None:
    labels = imagenet_labels()
    images = tmp_path / "in"
    shutil.copytree(data(PHOTOS), images)
    photos = sorted(images.iterdir())
    outcomes = {}
    for number in range(1_000_000):
        path = f"a folder/with a longer name/{number:09d}.jpg"
        index = number * 7919 % 1000
        outcomes[path] = predicted(labels, index, (index + 1) % 1000, score=number % 997 / 1000)
    (images / "a folder" / "with a longer name").mkdir(parents=True)
    for number, path in enumerate(outcomes):
        os.link(photos[number % len(photos)], images / path)
    out = write_output(template, tmp_path / "out", labels, outcomes, top_k=2, input=str(images))
    del outcomes
    began = time.monotonic()
    arguments = ("report", out, "-o", tmp_path / "page.html")
    done = subprocess.run(
        [sys.executable, "-c", WITH_PEAK, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    took_s = time.monotonic() - began
    peak_mb = int(done.stdout.split()[-1]) / 1024
    size = (tmp_path / "page.html").stat().st_size
    before_s = pages_cpu_s(chromium)
    with opened(chromium, tmp_path / "page.html") as page:
        opened_cpu_s = pages_cpu_s(chromium) - before_s
        assert page.locator("img").count() > 200
    print(
        f"{took_s:.1f} s, {peak_mb:.0f} MB; {size:,} bytes, opened in {opened_cpu_s:.2f} s of CPU",
        file=sys.stderr,
    )
    assert size < 10_000_000
    assert opened_cpu_s < 2
    assert peak_mb < 250
