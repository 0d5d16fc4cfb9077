"""Globs: what they select, and what would have been selected where that is nothing.

`*`, `?` and `[...]` are those of `fnmatch`, within a name; `**` is any number of folders; `{a,b}`
stands for one pattern with each, and a backslash before `{`, `,` or `}` takes its meaning away. A
name that is there as it is written is itself.
"""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

from batchclf.errors import UsageError
from batchclf.images.formats import suffix_format

MAX_ALTERNATIVES = 1000
"""Patterns that the braces of one may stand for: each path is compared with all of them."""
Selects = Callable[[bytes], bool]
"""Whether a path, relative to an input's root, is one of its images."""
_Name = tuple[str, re.Pattern[str]]


def split_glob(spec: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder above the first name with a wildcard, and the names from there on."""
    root = Path()
    for number, part in enumerate(spec.parts):
        if re.search(r"[*?\[{]", part) and not os.path.lexists(root / part):
            return root, spec.parts[number:]
        root /= part
    return root, ()


def expand(names: Sequence[str]) -> list[str]:
    """The patterns that one with braces stands for; itself where it has none.

    Raises:
        UsageError: they are too many.
    """
    pattern = "/".join(names)
    expanded = list(islice(_expanded(pattern), MAX_ALTERNATIVES + 1))
    if len(expanded) > MAX_ALTERNATIVES:
        raise UsageError(
            f"input: {pattern[:300]}: its braces stand for more than {MAX_ALTERNATIVES:,} "
            "patterns; write fewer, or a list"
        )
    return expanded


def _expanded(pattern: str) -> Iterator[str]:
    left = [pattern]
    while left:
        pattern = left.pop()
        if (found := _first_set(pattern)) is None:
            yield re.sub(r"\\([{},])", r"\1", pattern)
        else:
            start, options, end = found
            left += [pattern[:start] + one + pattern[end:] for one in reversed(options)]


def _first_set(pattern: str) -> tuple[int, list[str], int] | None:
    """Where the first `{a,b}` begins, its options, and where it ends."""
    marks = [found for found in re.finditer(r"\\.|[{},]", pattern) if len(found[0]) == 1]
    for number, opening in enumerate(marks):
        if opening[0] != "{":
            continue
        depth, borders = 0, [opening.start()]
        for mark in marks[number:]:
            depth += (mark[0] == "{") - (mark[0] == "}")
            if depth == 0 or (depth == 1 and mark[0] == ","):
                borders.append(mark.start())
            if depth == 0:
                break
        if depth == 0 and len(borders) > 2:
            options = [pattern[a + 1 : b] for a, b in pairwise(borders)]
            return borders[0], options, borders[-1] + 1
    return None


def selects(names: Sequence[str]) -> Selects:
    """What a glob selects, by the names from the first with a wildcard on.

    Raises:
        UsageError: its braces stand for too many patterns.
    """
    patterns = dict.fromkeys([*expand(names), "/".join(names)])
    all_names = [_compiled(pattern) for pattern in patterns]
    return lambda path: any(_matches(one, os.fsdecode(path).split("/")) for one in all_names)


def _compiled(pattern: str) -> list[_Name | None]:
    """A pattern for each name; None: any number of folders."""
    return [
        None if name == "**" else (name, re.compile(fnmatch.translate(name)))
        for name in pattern.split("/")
        if name
    ]


def _matches(patterns: Sequence[_Name | None], names: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] is None:
        return any(_matches(patterns[1:], names[at:]) for at in range(len(names) + 1))
    text, pattern = patterns[0]
    is_like = bool(names) and (names[0] == text or pattern.match(names[0]) is not None)
    return is_like and _matches(patterns[1:], names[1:])


# ---- where nothing is selected -------------------------------------------------------------------


def describe_others(names: Sequence[str], root: str, paths: Sequence[bytes]) -> str:
    """What lies below the root of a glob that selects nothing of it, and what would select some."""
    if not paths:
        return f"no files are below {root}"
    suffixes = Counter(
        os.fsdecode(os.path.splitext(path)[1]) for path in paths if suffix_format(path)
    ).most_common()
    files = f"{len(paths):,} files are below {root}"
    if not suffixes:
        return f"{files}, and none has the suffix of an image"
    suffix, count = suffixes[0]
    told = f"{files}, {count:,} of which end in {suffix}"
    for tail in _variants(names, [suffix for suffix, _ in suffixes]):
        if any(map(selects(tail), paths)):
            return f"{told}; write {'/'.join([root, *tail]).removeprefix('./')}"
    return told


def _variants(names: Sequence[str], suffixes: Sequence[str]) -> Iterator[list[str]]:
    """Globs like one: with the suffix's letters in another case, in deeper folders, of any name."""
    stem, dot, ending = names[-1].rpartition(".")
    same = [suffix for suffix in suffixes if suffix.lower() == dot + ending.lower()]
    lasts = [names[-1], *(stem + suffix for suffix in same[: len(same) == 1])]
    if "[" not in ending and stem:
        lasts.append(stem + dot + "".join(map(_any_case, ending)))
    lasts.append(f"*{suffixes[0]}")
    for last in lasts:
        yield [*names[:-1], last]
        yield [*names[:-1], "**", last]
    yield ["**", lasts[-1]]


def _any_case(letter: str) -> str:
    return letter if letter.lower() == letter.upper() else f"[{letter.lower()}{letter.upper()}]"
