"""Names and labels that would do harm where a page took them for more than text."""

import json
from pathlib import Path

from batchclf.results.records import Failure
from tests.outputs import Outcome, predicted, write_output

DEED = "document.documentElement.dataset.harmed=1"
"""What each tries to run."""
TEXTS = (
    f"<script>{DEED}</script>",
    f"</script><script>{DEED}</script>",
    f"</style><script>{DEED}</script>",
    f"</title><script>{DEED}</script>",
    f"<img src=x onerror={DEED}>",
    f'"><img src=x onerror={DEED}>',
    f"'><svg onload={DEED}>",
    f'" onmouseover="{DEED}" x="',
    f"' autofocus onfocus='{DEED}",
    f'" tabindex=1 autofocus onfocus={DEED} "',
    f"<svg><animate onbegin={DEED} attributeName=x dur=1s>",
    f"<iframe srcdoc='<script>parent.{DEED}</script>'>",
    f"<details open ontoggle={DEED}>",
    f"<math><mtext></math><img src=x onerror={DEED}>",
    f"<noscript><p title='</noscript><img src=x onerror={DEED}>'>",
    f"javascript:{DEED}",
    f"<a href=javascript:{DEED}>click</a>",
    f"<meta http-equiv=refresh content='0;url=javascript:{DEED}'>",
    "<base href=https://example.org/>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<img src=https://example.org/pixel.png>",
    "<form action=https://example.org/><button>go",
    "<!-- <table><tr><td>",
    "{{ 7*7 }}{% raw %}{{ config }}",
    "${7*7}`}$\\alpha_{x}^$",
    "&lt;script&gt;&#60;b&#62;",
    "\u202etxt.gpj\u2066exe\u2069",
    "line\nbreak\r\x1b[31mred\x07\x9b2J",
    "\ufeff\u200b\u2028 \U000e0041 ̷̸̡",
    "x" * 300,
)
"""The last but three are no HTML: templates, entities, direction of text, control characters."""


def hostile_outcomes() -> dict[str, Outcome]:
    """Images of such names, some of them failed with such messages; classes in turn."""
    found: dict[str, Outcome] = {}
    for number, text in enumerate(TEXTS):
        name = f"{text}/{number}{text[:100]}.jpg"
        if number % 5 == 4:
            found[name] = Failure("corrupt" if number % 2 else f"<b>{number}", f"bad: {text}")
        else:
            other = (number + 1) % len(TEXTS)
            found[name] = predicted(TEXTS, number, other, score=0.5 + number / 100)
    return found


def write_hostile(template: Path, folder: Path) -> Path:
    """The output of a job over such images; the truth of them beside it, as truth.jsonl."""
    outcomes = hostile_outcomes()
    labels = [text.replace("\n", " ").replace("\r", " ") for text in TEXTS]
    write_output(template, folder, labels, outcomes, input=str(folder))
    rows = ({"path": path, "index": 3} for path in outcomes)
    (folder / "truth.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder
