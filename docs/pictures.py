"""Makes the pictures of the README from a real run: `python docs/pictures.py`, in 2 minutes.

Needs batchclf with the extras cpu and report, Chromium (Debian's package `chromium`), and
playwright (`pip install playwright`). The images are the sample's digits: for the gallery as they
are, for the rest each tilted many times. Only the temporary folder has another name: /data.
"""

import fcntl
import json
import os
import pty
import random
import re
import shutil
import struct
import sys
import termios
from collections.abc import Iterator
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
DIGITS = ROOT / "samples" / "digits"
NUM_TILTED = 100
MAX_TILT = 35
"""Degrees: some are hard to tell."""
COLUMNS = 104
STOP = 40
"""Where Ctrl-C is pressed: the percentage that the bar shows then, or a little more."""
RUN = "batchclf run job.yaml"
SHOWN = (RUN, RUN, "head -n 2 runs/night/predictions.jsonl")
"""What is typed, one after the other."""
REPORT = "batchclf report runs/night -o night.html --truth photos"
VIEW = {"width": 1000, "height": 850}


def main() -> None:
    """Draw the terminal in which a job is stopped and run again, and photograph two reports."""
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        tilt_digits(folder / "photos")
        write_job(folder / "job.yaml")
        lines: list[str] = []
        for number, command in enumerate(SHOWN):
            lines.append(f"$ {command}")
            seen = typed(command, folder, STOP if number == 0 else None)
            lines += screen(seen.replace(name, "/data"))
        (PICTURES / "terminal.svg").write_text(terminal_svg(lines))
        typed(REPORT, folder)
        photograph(folder / "night.html", "main", "report.png")
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(DIGITS, folder / "photos")
        write_job(folder / "job.yaml")
        typed(f"{RUN} && {REPORT}", folder)
        photograph(folder / "night.html", "pictures", "gallery.png")


def tilt_digits(folder: Path) -> None:
    """The sample's digits, tilted, in a folder for each class; the same ones each time."""
    chance = random.Random(0)  # noqa: S311 - no secret
    for path in sorted(DIGITS.rglob("*.*")):
        place = folder / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as digit:
            for number in range(NUM_TILTED):
                angle = chance.uniform(-MAX_TILT, MAX_TILT)
                tilted = digit.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255)
                tilted.save(place / f"{path.stem}-{number:02d}.jpg")
    for whole in sorted(folder.glob("3/*-00.jpg"))[:3]:
        (folder / "0" / f"broken-{whole.name}").write_bytes(whole.read_bytes()[:400])


def write_job(path: Path) -> None:
    """Of the model that comes with the samples."""
    job = {
        "input": "photos",
        "output": "runs/night",
        "model": {"bundle": str(ROOT / "samples" / "digits.bundle")},
        "top_k": 2,
    }
    path.write_text(json.dumps(job))


# ---- a terminal ----------------------------------------------------------------------------------


def typed(command: str, folder: Path, stop_at: int | None = None) -> str:
    """All that a command writes to a terminal, on which Ctrl-C is pressed at a percentage."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvp("bash", ["bash", "-c", command])  # noqa: S606, S607 - the user's own shell
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    written = b""
    for part in parts(terminal):
        written += part
        shown = max(map(int, re.findall(rb"(\d+)%", written)), default=0)
        if stop_at is not None and shown >= stop_at:
            os.write(terminal, b"\x03")
            stop_at = None
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, 130) or stop_at is not None:
        raise RuntimeError(f"{command}: exit code {code}\n{written.decode()}")
    return written.decode()


def parts(terminal: int) -> Iterator[bytes]:
    """What comes out of a terminal until nobody has it open any more."""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # EIO: how Linux tells the end
            return
        if not part:
            return
        yield part


def screen(written: str) -> list[str]:
    """The lines that stand on a terminal in the end: a bar is drawn over itself."""
    lines = [""]
    column = 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\r\n\x1b]+", written):
        if piece == "\n":
            lines.append("")
        elif piece == "\r":
            column = 0
        elif not piece.startswith("\x1b"):
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines if line.strip()]


FOLD = COLUMNS + 2
"""Where a line goes on in the next one: behind the ^C that stands after a full one."""
WIDTH, HEIGHT, MARGIN = 8, 19, 18
"""Of a character, and around all, in pixels."""
INK = {"$": "#7ee787", "batchclf:": "#e6edf3", "": "#a5b4c4"}
"""By how a line starts."""


def terminal_svg(lines: list[str]) -> str:
    """Lines of text on a dark ground; long ones are folded, as a terminal folds them."""
    rows = [
        (
            line[start : start + FOLD],
            next(ink for word, ink in INK.items() if line.startswith(word)),
        )
        for line in lines
        for start in range(0, len(line), FOLD)
    ]
    width, height = FOLD * WIDTH + 2 * MARGIN, len(rows) * HEIGHT + 2 * MARGIN
    texts = "".join(
        f'<text x="{MARGIN}" y="{MARGIN + number * HEIGHT + 14}" fill="{ink}" '
        f'textLength="{len(text) * WIDTH}">{drawn(text)}</text>\n'
        for number, (text, ink) in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        'font-size="13">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n{texts}</svg>\n'
    )


def drawn(text: str) -> str:
    """Text as it stands in SVG, with spaces that are kept wherever they stand."""
    return escape(text, quote=False).replace(" ", "\u00a0")


# ---- a page --------------------------------------------------------------------------------------


def photograph(page: Path, part: str, picture: str) -> None:
    """What a browser shows of a page from one of its parts on, as a PNG of few colours."""
    page.write_text(page.read_text().replace(str(page.parent), "/data"))
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        view = browser.new_page(viewport=VIEW, color_scheme="light")
        view.goto(page.as_uri())
        if part != "main":
            view.evaluate(f"document.getElementById('{part}').parentElement.scrollIntoView()")
        view.screenshot(path=PICTURES / picture)
        browser.close()
    with Image.open(PICTURES / picture) as whole:
        few = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(PICTURES / picture, optimize=True)


if __name__ == "__main__":
    main()
