"""What of an input is not listed: how much of each kind, and the first of it."""

from collections import Counter

from batchclf.system.text import escaped

MAX_SHOWN_BYTES = 60
"""Of an example's name."""


class Omissions:
    """Counts what is left out, by kind: words that follow a number, such as `of macOS`."""

    def __init__(self) -> None:
        self._nums: Counter[str] = Counter()
        self._examples: dict[str, bytes] = {}

    @property
    def num(self) -> int:
        """Of all kinds."""
        return self._nums.total()

    def add(self, kind: str, example: bytes, num: int = 1) -> None:
        """Count `num` more of a kind, of which `example` is the first."""
        self._nums[kind] += num
        self._examples.setdefault(kind, example)

    def __add__(self, other: "Omissions") -> "Omissions":
        both = Omissions()
        both._nums = self._nums + other._nums
        both._examples = {**other._examples, **self._examples}
        return both

    def __str__(self) -> str:
        """In words, the most first: `12 hidden (.git), 3 of macOS (._1.JPG)`."""
        return ", ".join(
            f"{num:,} {kind} ({_shown(self._examples[kind])})"
            for kind, num in self._nums.most_common()
        )


def _shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return escaped(text if len(name) <= MAX_SHOWN_BYTES else f"{text[:MAX_SHOWN_BYTES]}...")
